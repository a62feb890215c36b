"""Changes the sampling rate of sound with the windowed sinc that the official features were made with (SPEC section 4)."""
import functools
import math

import numpy as np
import scipy.signal

ZERO_CROSSINGS = 64  # of the sinc, on each side
ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
BETA = 14.769656459379492  # of the Kaiser window


@functools.lru_cache(maxsize=16)
def _resample_filter(up: int, down: int) -> np.ndarray:
    """Kaiser-windowed sinc at up times the source rate, float64 [odd]."""
    cutoff = ROLLOFF * min(up, down) / down  # of the source's Nyquist frequency
    half = math.ceil(ZERO_CROSSINGS / cutoff * up)
    crossings = np.arange(-half, half + 1) / up * cutoff
    inside = np.clip(1 - (crossings / ZERO_CROSSINGS) ** 2, 0, None)
    window = np.where(np.abs(crossings) < ZERO_CROSSINGS, np.i0(BETA * np.sqrt(inside)) / np.i0(BETA), 0)
    return np.sinc(crossings) * window * cutoff


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Changes the sampling rate: float [samples] to float32 [ceil(samples * to_hz / from_hz)].

    A Kaiser-windowed sinc of 64 zero crossings, roll-off 0.9476, beta 14.77 (librosa's kaiser_best), SPEC section 4.
    """
    if from_hz == to_hz:
        return np.asarray(waveform, np.float32)
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    length = -(-len(waveform) * up // down)
    kernel = _resample_filter(up, down)
    half = len(kernel) // 2
    lead = -(-half // down)  # whole output samples before the first one
    kernel = np.concatenate([np.zeros(lead * down - half), kernel])
    result = scipy.signal.upfirdn(kernel, np.asarray(waveform, np.float64), up, down)[lead:lead + length]
    return np.pad(result, (0, length - len(result))).astype(np.float32)
