"""Log-mel against the official computation, and its inverse."""
import numpy as np
import pytest

from mmaudio_jax import mel
from mmaudio_jax.sequence import Sequence
from tests.conftest import GOLDEN


@pytest.mark.parametrize('rate', ['16k', '44k'])
def test_matches_the_golden(rate):
    golden = np.load(GOLDEN / f'mel_{rate}.npz')
    result = np.asarray(mel.log_mel(golden['waveform'], rate))
    expected = golden['mel'].transpose(0, 2, 1)
    assert result.shape == expected.shape and result.dtype == np.float32
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-4)  # measured: 3e-7 (16k), 2e-6 (44k)


@pytest.mark.parametrize('rate, duration_s', [('16k', 4.0), ('44k', 2.0)])
def test_a_clip_has_the_frames_of_its_sequence(rate, duration_s):
    sequence = Sequence(rate, duration_s)
    frames = mel.log_mel(np.zeros((2, sequence.waveform_length), np.float32), rate)
    assert frames.shape == (2, sequence.mel_length, sequence.audio.mel_bins)
    floor = np.log10(mel.FLOOR) if rate == '16k' else np.log(mel.FLOOR)
    # Silence is not quite the floor, because of the eps under the root: wide filters see 3e-5 · their weight.
    assert np.asarray(frames).min() >= floor - 1e-5


@pytest.mark.parametrize('rate', ['16k', '44k'])
def test_linear_magnitudes_have_the_same_mel(rate):
    rng = np.random.default_rng(0)
    frames = np.asarray(mel.log_mel(rng.normal(0, 0.2, (1, 32 * 512)).astype(np.float32), rate))[0]
    again = np.log(mel.mel_to_linear(frames, rate) @ mel.filters(rate).T + mel.FLOOR)
    expected = frames * np.log(10) if rate == '16k' else frames
    assert np.abs(again - expected).mean() < 1e-3  # measured: 1.0e-4 (16k), 4.1e-5 (44k): the cut at zero
