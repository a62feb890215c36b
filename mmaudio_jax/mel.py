"""Waveform → log-mel spectrogram, as the official VAEs and vocoders take it.

Source: BigVGAN (arXiv 2206.04658), whose 16 kHz and 44.1 kHz spectrograms these are; librosa's Slaney filters.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np

from mmaudio_jax.sequence import AUDIO_RATES

MAGNITUDE_EPS = 1e-9  # under the root
FLOOR = 1e-5  # before the logarithm


@dataclasses.dataclass(frozen=True)
class MelSettings:
    """What one rate's spectrogram fixes; window length = n_fft, frequencies in Hz, log 'log10' or 'ln'."""
    n_fft: int
    min_hz: float
    max_hz: float
    log: str


SETTINGS = {
    '16k': MelSettings(n_fft=1024, min_hz=0.0, max_hz=8_000.0, log='log10'),
    '44k': MelSettings(n_fft=2048, min_hz=0.0, max_hz=22_050.0, log='ln'),
}


@functools.cache
def filters(rate: str) -> np.ndarray:
    """Mel filters of `rate`, float32 [mels, n_fft / 2 + 1]."""
    audio, settings = AUDIO_RATES[rate], SETTINGS[rate]
    return librosa.filters.mel(sr=audio.sample_rate_hz,
                               n_fft=settings.n_fft,
                               n_mels=audio.mel_bins,
                               fmin=settings.min_hz,
                               fmax=settings.max_hz)


def hann(length: int, n_fft: int, periodic: bool) -> np.ndarray:
    """A Hann window of `length` in the middle of n_fft zeros, float32 [n_fft]."""
    values = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length if periodic else length - 1))
    before = (n_fft - length) // 2
    return np.pad(values, (before, n_fft - length - before)).astype(np.float32)


def window(rate: str) -> np.ndarray:
    """The periodic Hann window, float32 [n_fft]."""
    return hann(SETTINGS[rate].n_fft, SETTINGS[rate].n_fft, True)


def frames(waveform: jax.Array, length: int, hop: int) -> jax.Array:
    """`[B, samples]` → `[B, frames, length]`; a last frame that is not full is left out."""
    starts = np.arange(0, waveform.shape[1] - length + 1, hop)
    return waveform[:, starts[:, None] + np.arange(length)]


def padding(rate: str) -> int:
    """Samples of reflection on each side, so that a waveform of k hops has k frames."""
    return (SETTINGS[rate].n_fft - AUDIO_RATES[rate].hop_length) // 2


@functools.partial(jax.jit, static_argnames='rate')
def log_mel(waveform: jax.Array, rate: str) -> jax.Array:
    """The log-mel spectrogram.

    Args:
      waveform: float32 `[B, samples]`, clipped to ±1 here; more than `padding(rate)` samples.
      rate: '16k' or '44k'.

    Returns:
      float32 `[B, samples // hop, mels]`, log10 at 16k and natural logarithm at 44k.
    """
    settings, hop = SETTINGS[rate], AUDIO_RATES[rate].hop_length
    pad = padding(rate)
    padded = jnp.pad(jnp.clip(waveform.astype(jnp.float32), -1, 1), ((0, 0), (pad, pad)), mode='reflect')
    spectrum = jnp.fft.rfft(frames(padded, settings.n_fft, hop) * window(rate))
    magnitude = jnp.sqrt(spectrum.real**2 + spectrum.imag**2 + MAGNITUDE_EPS)
    mel = jnp.maximum(jnp.einsum('btf,mf->btm', magnitude, filters(rate), precision='highest'), FLOOR)
    return jnp.log10(mel) if settings.log == 'log10' else jnp.log(mel)


def mel_to_linear(mel: jax.Array, rate: str) -> jax.Array:
    """Linear magnitudes of log-mel frames by the pseudo-inverse of the filters.

    Args:
      mel: `[..., frames, mels]`, as of `log_mel`.
      rate: '16k' or '44k'.

    Returns:
      float32 `[..., frames, n_fft / 2 + 1]`, not negative.
    """
    magnitude = jnp.power(10, mel) if SETTINGS[rate].log == 'log10' else jnp.exp(mel)
    return jnp.maximum(jnp.matmul(magnitude - FLOOR, _inverse_filters(rate).T, precision='highest'), 0)


@functools.cache
def _inverse_filters(rate: str) -> np.ndarray:
    return np.linalg.pinv(filters(rate)).astype(np.float32)
