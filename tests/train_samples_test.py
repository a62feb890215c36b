"""Samples during training never end a run. What they hold when all goes well, train_test holds."""
import errno
import os
import re

import numpy as np
import pytest

from mmaudio_jax import codec
from mmaudio_jax import train
from mmaudio_jax import train_samples
from mmaudio_jax.sequence import Sequence
from tests import tiny_run


@pytest.fixture(name='workdir')
def fixture_workdir(tmp_path, monkeypatch):
    tiny_run.write_records(tmp_path)
    monkeypatch.setattr(train.mmaudio, 'build', tiny_run.build_network)
    return tmp_path


@pytest.mark.parametrize('what, reason', [
    ('sound', 'MediaError: .*/00_clip-024.flac: cannot be written: the waveform is not finite'),
    ('picture', 'OSError: .* No space left on device'), ('codec', 'FileNotFoundError: .*codec.npz: no such file')])
def test_a_sample_that_cannot_be_written_ends_no_run(workdir, monkeypatch, capfd, what, reason):
    """The checkpoint of the step comes after it."""
    config = tiny_run.make_config(total_steps=3, sample_every=2, checkpoint_every=2, validate_every=0)
    sequence = Sequence(**config.sequence)
    sounds = np.random.default_rng(0).normal(size=(4, sequence.waveform_length)).astype(np.float32) / 10
    codec.fit_pca([sounds], sequence, workdir / 'records' / 'codec.npz')

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def broken_codec(*args, make=codec.make):
        decoder = make(*args)
        if what == 'codec' and (workdir / 'logs').exists():  # training has begun
            raise FileNotFoundError(f'{args[2]}: no such file')
        if what == 'sound':
            decoder.decode = lambda latents: np.full((len(latents), sequence.waveform_length), np.nan, np.float32)
        return decoder

    monkeypatch.setattr(codec, 'make', broken_codec)
    if what == 'picture':
        monkeypatch.setattr(train_samples.plots, 'spectrogram', fail)
    train.train(config, workdir)
    said = [line for line in capfd.readouterr().out.splitlines() if 'no samples' in line]
    assert all(re.fullmatch(f'step {step}: no samples: {reason}', line) for step, line in zip((2, 3), said, strict=True))
    assert sorted(int(entry.name) for entry in (workdir / 'checkpoints').iterdir()) == [2, 3]
    assert not any(workdir.glob('samples/*')) and not any(workdir.glob('samples/.*'))
