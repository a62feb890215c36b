"""The pca codec: what comes back, when it strikes, and what is said of a bad file."""
import numpy as np
import pytest

from mmaudio_jax import codec
from mmaudio_jax import media
from mmaudio_jax import mel
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store
from tests import full_disk

ONSETS_S = (0.31, 0.92, 1.57)


def strikes(sequence: Sequence, seed: int) -> np.ndarray:
    """Decaying tones at ONSETS_S over faint noise, float32 [samples]."""
    rng = np.random.default_rng(seed)
    time_s = np.arange(sequence.waveform_length) / sequence.sample_rate_hz
    waveform = 0.001 * rng.normal(size=len(time_s))
    for onset in ONSETS_S:
        since = np.maximum(time_s - onset, 0)
        tone = np.sin(2 * np.pi * rng.uniform(300, 3000) * since)
        waveform += 0.3 * (time_s >= onset) * np.exp(-rng.uniform(8, 25) * since) * tone
    return waveform.astype(np.float32)


@pytest.fixture(name='fitted', params=['16k', '44k'], scope='module')
def fixture_fitted(request, tmp_path_factory):
    tmp_path = tmp_path_factory.mktemp('codec')
    sequence = Sequence(request.param, 2.0)
    waveforms = np.stack([strikes(sequence, seed) for seed in range(12)])
    codec.fit_pca(iter([waveforms[:5], waveforms[5:]]), sequence, tmp_path / 'codec.npz')
    return sequence, waveforms, codec.make('pca', sequence, tmp_path / 'codec.npz', store.load)


def test_round_trip_keeps_spectrum_and_onsets(fitted):
    sequence, waveforms, pca = fitted
    mean, std = pca.encode(waveforms[:3])
    assert mean.shape == std.shape == (3, sequence.latent_length, sequence.latent_channels)
    assert mean.dtype == std.dtype == np.float32 and (std > 0).all()
    decoded = pca.decode(mean)
    assert decoded.shape == waveforms[:3].shape and decoded.dtype == np.float32
    original, again = (np.asarray(mel.log_mel(w, sequence.rate)) for w in (waveforms[:3], decoded))
    explained = 1 - np.square(again - original).mean() / original.var()
    assert explained > 0.8  # measured: 0.83 (16k), 0.82 (44k); the rest is the noise, which has no fixed spectrum
    for waveform in decoded:
        loudness = np.convolve(np.abs(waveform), np.ones(64) / 64, 'same')
        for onset in ONSETS_S:
            near = slice(*(int((onset + d) * sequence.sample_rate_hz) for d in (-0.15, 0.15)))
            step = int(0.01 * sequence.sample_rate_hz)
            rise = loudness[near][step:] - loudness[near][:-step]
            found = (rise.argmax() + step) / sequence.sample_rate_hz - 0.15
            assert abs(found) < 0.03  # measured: at most 0.016 s


def test_a_clip_is_the_same_in_any_batch(fitted):
    _, waveforms, pca = fitted
    mean, _ = pca.encode(waveforms[:3])
    np.testing.assert_allclose(pca.decode(mean)[2], pca.decode(mean[2:])[0], atol=1e-3)  # measured: 4e-5 (16k), 1.0e-4 (44k)


def test_components_are_the_principal_ones(fitted):
    """Against the singular value decomposition of all frames at once."""
    sequence, waveforms, pca = fitted
    frames = np.asarray(mel.log_mel(waveforms, sequence.rate)).reshape(-1, 2 * sequence.audio.mel_bins).astype(np.float64)
    values = np.linalg.svd(frames - frames.mean(axis=0), compute_uv=False)[:sequence.latent_channels]
    mean, _ = pca.encode(waveforms)
    scores = mean.reshape(-1, sequence.latent_channels).astype(np.float64)
    np.testing.assert_allclose(np.sqrt(np.square(scores).sum(axis=0)), values, rtol=1e-6)  # measured: 5e-8
    np.testing.assert_allclose(scores.mean(axis=0), 0, atol=3e-6)  # measured: 4e-7


def test_any_length_is_decoded(fitted):
    sequence, _, pca = fitted
    short = pca.decode(np.zeros((1, 10, sequence.latent_channels)))
    assert short.shape == (1, 20 * sequence.audio.hop_length) and np.isfinite(short).all()


def test_processes_of_one_number_do_not_disturb_each_other(tmp_path, monkeypatch):
    """Containers number their processes alike: while one writes, another fits the same codec to the end."""
    sequence, savez = Sequence('16k', 2.0), np.savez

    def fit():
        codec.fit_pca([strikes(sequence, 0)[None]], sequence, tmp_path / 'codec.npz')

    def overtaken(*arguments, **arrays):
        monkeypatch.setattr(np, 'savez', savez)
        fit()
        savez(*arguments, **arrays)

    monkeypatch.setattr(np, 'savez', overtaken)
    fit()
    with full_disk.after(1000), pytest.raises(media.MediaError, match='codec.npz: File too large'):
        fit()
    codec.make('pca', sequence, tmp_path / 'codec.npz', store.load)
    assert [path.name for path in tmp_path.iterdir()] == ['codec.npz']


def test_errors_name_the_file_and_the_field(tmp_path):
    sequence = Sequence('16k', 2.0)
    with pytest.raises(FileNotFoundError, match='codec.npz: the fitted pca codec is missing'):
        codec.make('pca', sequence, tmp_path / 'codec.npz', store.load)
    (tmp_path / 'codec.npz').write_bytes(b'PK\x03\x04 half a file')
    with pytest.raises(ValueError, match='codec.npz: not a fitted pca codec'):
        codec.make('pca', sequence, tmp_path / 'codec.npz', store.load)
    codec.fit_pca([strikes(sequence, 0)[None]], sequence, tmp_path / 'codec.npz')
    with pytest.raises(ValueError, match="codec.npz: rate is '16k', not '44k'"):
        codec.make('pca', Sequence('44k', 2.0), tmp_path / 'codec.npz', store.load)
    with pytest.raises(ValueError, match=r'takes waveforms \[B, 32256\]'):
        codec.make('pca', sequence, tmp_path / 'codec.npz', store.load).encode(np.zeros((1, 32000), np.float32))
    with pytest.raises(ValueError, match='config.extract.codec is .mp3.; it must be one of official, pca'):
        codec.make('mp3', sequence, None, store.load)
    with pytest.raises(ValueError, match='0 frames are too few'):
        codec.fit_pca([], sequence, tmp_path / 'other.npz')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['codec.npz']
