"""Lengths of every stream against published sizes and the golden runs."""
import numpy as np
import pytest

from mmaudio_jax.sequence import Sequence
from tests.conftest import GOLDEN


@pytest.mark.parametrize('rate, name', [
    ('16k', 'net_small_16k_8s'), ('16k', 'net_small_16k_5.3s'), ('44k', 'net_small_44k_8s'), ('44k', 'net_large_44k_v2_8s')])
def test_lengths_of_the_official_runs(rate, name):
    golden = np.load(GOLDEN / f'{name}.npz')
    sequence = Sequence(rate, float(golden['duration']))
    lengths = (sequence.latent_length, sequence.clip_length, sequence.sync_length)
    assert lengths == tuple(int(golden[k]) for k in ('latent_seq_len', 'clip_seq_len', 'sync_seq_len'))


@pytest.mark.parametrize('rate, samples', [('16k', 128_000), ('44k', 353_280)])
def test_waveform_of_eight_seconds(rate, samples):
    assert Sequence(rate, 8.0).waveform_length == samples


@pytest.mark.parametrize('rate, duration_s, message', [
    ('48k', 8.0, '48k'), ('16k', 0.5, 'too short'), ('16k', float('nan'), 'duration_s is nan; a finite number'),
    ('16k', float('inf'), 'duration_s is inf; a finite number')])
def test_bad_input_is_named(rate, duration_s, message):
    with pytest.raises(ValueError, match=message):
        Sequence(rate, duration_s)
