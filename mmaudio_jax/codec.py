"""Audio codecs behind one interface: waveform → latents → waveform.

official: mel VAE and BigVGAN (official_codec.py).
pca, which needs no weights and is fitted to a dataset: two neighbouring log-mel frames → principal components → latents;
back by the inverse, the pseudo-inverse of the mel filters and Griffin-Lim.
"""
from collections.abc import Callable
import functools
import pathlib
from typing import Any, Iterable, Protocol
import zipfile

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import calls
from mmaudio_jax import media
from mmaudio_jax import mel
from mmaudio_jax import official_codec
from mmaudio_jax.sequence import AUDIO_RATES
from mmaudio_jax.sequence import LATENT_DOWNSAMPLING
from mmaudio_jax.sequence import Sequence

CODECS = ('official', 'pca')
PCA_VERSION = 1
POSTERIOR_STD = 0.02  # of the component's deviation in the fitted set: a little noise, as a VAE's posterior has
GRIFFIN_LIM_ITERATIONS = 32  # twice as many bring the log-mel 9 % nearer and onsets no nearer (median 7 ms late)
GRIFFIN_LIM_MOMENTUM = 0.99
GRIFFIN_LIM_SEED = 0  # the same latents give the same sound


class Codec(Protocol):
    """What every codec offers. N, C and samples are those of its sequence."""

    def encode(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """float32 `[B, samples]` → mean and standard deviation of the latents, float32 `[B, N, C]`."""

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """`[B, N, C]`, any N → float32 `[B, N · 2 · hop]` within ±1."""

    def program(self) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
        """(parameters, function): function(parameters, latents) is `decode` as part of a jitted program."""


class PCACodec:
    """Principal components of log-mel frames; made by `make('pca', ...)`."""

    def __init__(self, sequence: Sequence, path: pathlib.Path):
        self._sequence = sequence
        self._mean, self._components, self._std = _read(path, sequence)

    def encode(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """See Codec; raises ValueError when the waveform is not `[B, waveform_length]`."""
        mean = (_stacked_frames(waveform, self._sequence) - self._mean) @ self._components.T
        return mean, np.broadcast_to(self._std, mean.shape)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        """See Codec."""
        parameters, decode = self.program()
        return np.asarray(decode(parameters, jnp.asarray(latents, jnp.float32)))

    def program(self) -> tuple[Any, Callable[[Any, jax.Array], jax.Array]]:
        """See Codec."""
        return (self._mean, self._components), functools.partial(_decode_pca, rate=self._sequence.rate)


@functools.partial(jax.jit, static_argnames='rate')
def _decode_pca(parameters, latents, rate):
    (mean, components), (batch, length, _) = parameters, latents.shape
    frames = jnp.matmul(latents, components, precision='highest') + mean
    magnitude = mel.mel_to_linear(frames.reshape(batch, LATENT_DOWNSAMPLING * length, -1), rate)
    return jnp.clip(griffin_lim(magnitude, rate), -1, 1)


def _overlap_add(frames: jax.Array, hop: int) -> jax.Array:
    """`[B, F, n_fft]` → `[B, F · hop + n_fft - hop]`; n_fft is a multiple of hop."""
    batch, length, n_fft = frames.shape
    parts = frames.reshape(batch, length, n_fft // hop, hop)
    last = n_fft // hop - 1
    shifted = [jnp.pad(parts[:, :, i], ((0, 0), (i, last - i), (0, 0))) for i in range(last + 1)]
    return jnp.sum(jnp.stack(shifted), axis=0).reshape(batch, -1)


@functools.partial(jax.jit, static_argnames='rate')
def griffin_lim(magnitude: jax.Array, rate: str) -> jax.Array:
    """A waveform whose short-time spectrum has nearly these magnitudes (fast Griffin-Lim, Perraudin et al. 2013).

    Batched on the device: three times quicker than librosa's, which transforms one clip at a time in numpy.

    Args:
      magnitude: float32 `[B, frames, n_fft / 2 + 1]`, framed as in mel.log_mel.
      rate: '16k' or '44k'.

    Returns:
      float32 `[B, frames · hop]`.
    """
    n_fft, hop = mel.SETTINGS[rate].n_fft, AUDIO_RATES[rate].hop_length
    length, window = magnitude.shape[1], mel.window(rate)
    # At the very ends only the tails of a window reach: those samples are padding, cut off below.
    weight = jnp.maximum(_overlap_add(jnp.broadcast_to(window**2, (1, length, n_fft)), hop), 1e-3)

    def synthesize(phases):
        return _overlap_add(jnp.fft.irfft(magnitude * phases, n_fft) * window, hop) / weight

    def analyse(waveform):
        parts = waveform.reshape(len(waveform), -1, hop)
        return jnp.fft.rfft(jnp.concatenate([parts[:, i:i + length] for i in range(n_fft // hop)], axis=-1) * window)

    def iterate(_, carry):
        phases, previous = carry
        rebuilt = analyse(synthesize(phases))
        accelerated = rebuilt - GRIFFIN_LIM_MOMENTUM / (1 + GRIFFIN_LIM_MOMENTUM) * previous
        return accelerated / jnp.maximum(jnp.abs(accelerated), 1e-16), rebuilt

    # One draw for all clips: a clip sounds the same in any batch.
    angles = 2 * np.pi * jax.random.uniform(jax.random.key(GRIFFIN_LIM_SEED), magnitude.shape[1:])
    phases = jnp.broadcast_to(jnp.exp(1j * angles), magnitude.shape)
    phases, _ = jax.lax.fori_loop(0, GRIFFIN_LIM_ITERATIONS, iterate, (phases, jnp.zeros_like(phases)))
    pad = mel.padding(rate)
    return synthesize(phases)[:, pad:pad + length * hop]


def _stacked_frames(waveform: np.ndarray, sequence: Sequence) -> np.ndarray:
    """`[B, samples]` → pairs of log-mel frames, float32 `[B, N, 2 · mels]`."""
    official_codec.check_waveform(waveform, sequence)
    frames = np.asarray(mel.log_mel(waveform, sequence.rate))
    return frames.reshape(len(frames), sequence.latent_length, -1)


def fit_pca(waveforms: Iterable[np.ndarray], sequence: Sequence, path: pathlib.Path) -> None:
    """Fits the pca codec and writes it to `path` (beside, then renamed).

    Args:
      waveforms: batches `[B, samples]`; streamed, sums in float64.
      sequence: rate and lengths; the fitted codec serves any duration.
      path: npz file to write.

    Raises:
      ValueError: fewer frames than components, no waveform at all, or a waveform of another length.
      media.MediaError: disk full, no such folder, no permission.
    """
    channels = sequence.latent_channels
    width = LATENT_DOWNSAMPLING * sequence.audio.mel_bins
    count, total, squares = 0, np.zeros(width), np.zeros((width, width))
    for batch in waveforms:
        frames = _stacked_frames(batch, sequence).reshape(-1, width).astype(np.float64)
        count += len(frames)
        total += frames.sum(axis=0)
        squares += frames.T @ frames
    if count <= channels:
        raise ValueError(f'{count} frames are too few to fit {channels} principal components; '
                         'config.extract.codec_fit_dataset needs more sound in its split train')
    mean = total / count
    values, vectors = np.linalg.eigh(squares / count - np.outer(mean, mean))
    values, components = values[::-1][:channels], vectors.T[::-1][:channels]
    largest = np.take_along_axis(components, np.abs(components).argmax(axis=1)[:, None], axis=1)
    components = components * np.sign(largest)  # an eigenvector's sign is arbitrary: fixed, so that a refit gives the same
    # A component without variance (digital silence only) keeps a positive deviation: a posterior needs one.
    std = POSTERIOR_STD * np.sqrt(np.maximum(values, 1e-4))
    with media.atomic_file(path, synced=True) as beside, open(beside, 'wb') as file:
        np.savez(file,
                 version=PCA_VERSION,
                 rate=sequence.rate,
                 mean=mean.astype(np.float32),
                 components=components.astype(np.float32),
                 std=std.astype(np.float32))


def _read(path: pathlib.Path, sequence: Sequence) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [2 · mels], components [C, 2 · mels] and posterior deviation [C] of a fitted pca codec."""
    if not path.is_file():
        raise FileNotFoundError(f'{path}: the fitted pca codec is missing; make it with --mode=extract, or say where '
                                'the folder with records/ is (config.data_dir, in Python data_dir=)')
    try:
        with np.load(path) as data:
            stored = {name: data[name] for name in ('version', 'rate', 'mean', 'components', 'std')}
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f'{path}: not a fitted pca codec ({error}); delete it and run --mode=extract') from error
    expected = (('version', int(stored['version']), PCA_VERSION), ('rate', str(stored['rate']), sequence.rate))
    for field, found, wanted in expected:
        if found != wanted:
            raise ValueError(f'{path}: {field} is {found!r}, not {wanted!r}; delete it and run --mode=extract, or correct '
                             'config.sequence')
    return stored['mean'], stored['components'], stored['std']


def make(name: str, sequence: Sequence, path: pathlib.Path | None, load: official_codec.Load,
         mesh: Mesh | None = None) -> Codec:
    """The codec of that name.

    Args:
      name: config.extract.codec, 'pca' or 'official'.
      sequence: rate and lengths of the clips.
      path: pca: the file that `fit_pca` wrote. None where there is none.
      load: official: gives the parameters of an official model, such as 'vae_16k' and 'bigvgan_16k', when they are first
        needed. Codecs made with the same `load` and `mesh` share them.
      mesh: official: splits the clips over its devices; None: the default device.

    Raises:
      FileNotFoundError: pca was not fitted.
      ValueError: an unknown name, a file of another rate, or 'pca' without a path.
    """
    if name == 'official':
        parts = calls.shared(official_codec.Parts, load, sequence.rate, mesh)  # a clip of another length loads nothing again
        return official_codec.OfficialCodec(sequence, parts)
    if name != 'pca':
        raise ValueError(f'config.extract.codec is {name!r}; it must be one of {", ".join(CODECS)}')
    if path is None:
        raise ValueError('the pca codec needs the path of its fitted file')
    return PCACodec(sequence, pathlib.Path(path))
