"""Waveform → the spectrogram that each evaluation network reads, as the network's authors compute it.

They differ in everything: window, centring, mel scale, where the triangles are straight, logarithm, floor. Each function says
which it is. Waveforms are float32 `[B, samples]` at the network's rate, amplitude ±1; float32 arithmetic, all may be jitted.
Sources: PANNs (arXiv 1912.10211), VGGish (1609.09430), PaSST (2110.05069), Synchformer (2401.16423), ImageBind (2305.05665),
LAION-CLAP (2211.06687), and the code they were released with.
"""
import functools

import jax
import jax.numpy as jnp
import librosa
import numpy as np

from mmaudio_jax.mel import frames
from mmaudio_jax.mel import hann

VGGISH_PATCH = 96  # frames
PASST_SAMPLES = 320_000  # 10 s at 32 kHz, always
SYNCHFORMER_SEGMENT = 10_240  # samples, 0.64 s
IMAGEBIND_CLIP = 32_000  # samples, 2 s
IMAGEBIND_FRAMES = 204  # of a clip, the last six of zeros
CLAP_SAMPLES = 480_000  # 10 s at 48 kHz


@functools.cache
def htk_filters(sample_rate_hz: int, n_fft: int, bins: int, min_hz: float, max_hz: float) -> np.ndarray:
    """The HTK mel scale, triangles straight in Hz and of unit height, float32 [n_fft / 2 + 1, bins]."""
    return librosa.filters.mel(sr=sample_rate_hz, n_fft=n_fft, n_mels=bins, fmin=min_hz, fmax=max_hz, htk=True, norm=None).T


@functools.cache
def kaldi_filters(sample_rate_hz: int, n_fft: int, bins: int, min_hz: float, max_hz: float) -> np.ndarray:
    """Mel 1127 ln(1 + f / 700), triangles straight in mel and of unit height; zero at DC and Nyquist.

    Returns:
      float32 [n_fft / 2 + 1, bins].
    """
    frequencies = np.arange(n_fft // 2 + 1) * sample_rate_hz / n_fft
    mel, (low, high) = _mel(frequencies)[:, None], _mel(np.array([min_hz, max_hz]))
    edges = np.linspace(low, high, bins + 2)
    rising = (mel - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - mel) / (edges[2:] - edges[1:-1])
    filters = np.maximum(0, np.minimum(rising, falling))
    filters[[0, -1]] = 0
    return filters.astype(np.float32)


def _mel(hz: np.ndarray) -> np.ndarray:
    return 1127 * np.log1p(hz / 700)


def power(waveform: jax.Array, window: np.ndarray, hop: int, centred: bool) -> jax.Array:
    """Power spectrogram `[B, samples]` → `[B, frames, n_fft / 2 + 1]`; `centred` reflects n_fft / 2 samples at each end."""
    if centred:
        half = len(window) // 2
        waveform = jnp.pad(waveform, ((0, 0), (half, half)), mode='reflect')
    return _power(frames(waveform, len(window), hop) * window)


def _power(parts: jax.Array) -> jax.Array:
    spectrum = jnp.fft.rfft(parts.astype(jnp.float32))
    return jnp.square(spectrum.real) + jnp.square(spectrum.imag)


def _mix(spectrum: jax.Array, filters: jax.Array | np.ndarray) -> jax.Array:
    return jnp.matmul(spectrum, filters, precision='highest')


def panns_power(waveform: jax.Array) -> jax.Array:
    """16 kHz → power `[B, T, 257]`, hop 10 ms, T = samples // 160 + 1; its filters are in the checkpoint."""
    return power(waveform, hann(512, 512, True), 160, True)


def clap_power(waveform: jax.Array) -> jax.Array:
    """48 kHz → power `[B, samples // 480 + 1, 513]`; its filters are in the checkpoint."""
    return power(waveform, hann(1024, 1024, True), 480, True)


def vggish_patches(waveform: jax.Array) -> jax.Array:
    """16 kHz → ln(mel magnitude + 0.01) in patches of 0.96 s, `[B, P, 96, 64]`; what fills no patch is left out."""
    window = np.pad(hann(400, 400, True), (0, 112))
    magnitude = jnp.sqrt(_power(jnp.pad(frames(waveform, 400, 160), ((0, 0), (0, 0), (0, 112))) * window))
    log_mel = jnp.log(_mix(magnitude, kaldi_filters(16_000, 512, 64, 125.0, 7_500.0)) + 0.01)
    patches = log_mel.shape[1] // VGGISH_PATCH
    return log_mel[:, :patches * VGGISH_PATCH].reshape(log_mel.shape[0], patches, VGGISH_PATCH, log_mel.shape[2])


def vggish_patch_count(samples: int) -> int:
    """Patches of a waveform of that many samples at 16 kHz."""
    return max(0, (samples - 400) // 160 + 1) // VGGISH_PATCH


def passt_mel(waveform: jax.Array) -> jax.Array:
    """32 kHz, 10 s → normalised log-mel `[B, 1000, 128]`. Pre-emphasis over the whole signal, window of 25 ms."""
    emphasised = waveform[:, 1:] - 0.97 * waveform[:, :-1]
    mel = _mix(power(emphasised, hann(800, 1024, False), 320, True), kaldi_filters(32_000, 1024, 128, 0.0, 15_000.0))
    return (jnp.log(mel + 1e-5) + 4.5) / 5


def synchformer_mel(segments: jax.Array) -> jax.Array:
    """16 kHz segments `[B, 10 240]` → normalised log-mel `[B, 66, 128]`; the last frame is padding (a logarithm of 0)."""
    mel = _mix(power(segments, hann(400, 1024, True), 160, True), htk_filters(16_000, 1024, 128, 0.0, 8_000.0))
    return (jnp.pad(jnp.log(mel + 1e-6), ((0, 0), (0, 1), (0, 0))) + 4.2677393) / (2 * 4.5689974)


def imagebind_mel(clips: jax.Array) -> jax.Array:
    """16 kHz clips `[B, 32 000]` without mean → normalised log-mel `[B, 204, 128]`; the last six frames are padding."""
    parts = frames(clips, 400, 160)
    parts = parts - parts.mean(-1, keepdims=True)
    parts = parts - 0.97 * jnp.concatenate([parts[..., :1], parts[..., :-1]], axis=-1)
    spectrum = _power(jnp.pad(parts * hann(400, 400, False), ((0, 0), (0, 0), (0, 112))))
    mel = _mix(spectrum, kaldi_filters(16_000, 512, 128, 20.0, 8_000.0))
    log_mel = jnp.log(jnp.maximum(mel, float(np.finfo(np.float32).eps)))
    log_mel = jnp.pad(log_mel, ((0, 0), (0, IMAGEBIND_FRAMES - log_mel.shape[1]), (0, 0)))
    return (log_mel + 4.268) / 9.138
