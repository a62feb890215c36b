"""Changes the sampling rate of sound: windowed sincs, one for features (MMAudio's extraction) and one for evaluation.

The published scores depend on their resampler: another one moves Fréchet distances by tens. So evaluation has the one that they
were computed with, which is shorter and lets more alias through.
"""
import functools
import math

import numpy as np

ZERO_CROSSINGS = 64  # of the sinc, on each side
ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
BETA = 14.769656459379492  # of the Kaiser window
EVALUATION_ZERO_CROSSINGS = 6
EVALUATION_ROLLOFF = 0.99
BLOCK = 80  # results that one row of the matrix product gives, about: more repeat less input, and multiply more zeros
ROWS = 2048  # rows of one product: memory stays flat
MOST_PHASES = 1024  # rates with a small common divisor have more: their matrix would be too large


@functools.lru_cache(maxsize=16)
def _resample_filter(up: int, down: int) -> np.ndarray:
    """Kaiser-windowed sinc at up times the source rate, float64 [odd]."""
    cutoff = ROLLOFF * min(up, down) / down  # of the source's Nyquist frequency
    half = math.ceil(ZERO_CROSSINGS / cutoff * up)
    crossings = np.arange(-half, half + 1) / up * cutoff
    inside = np.clip(1 - (crossings / ZERO_CROSSINGS) ** 2, 0, None)
    window = np.where(np.abs(crossings) < ZERO_CROSSINGS, np.i0(BETA * np.sqrt(inside)) / np.i0(BETA), 0)
    return np.sinc(crossings) * window * cutoff


@functools.lru_cache(maxsize=16)
def _matrix(up: int, down: int) -> tuple[np.ndarray, int, int, int]:
    """The filter as one matrix product for a block of results.

    Returns:
      (float32 [inputs, block] matrix, inputs before the block's first one, step in inputs from block to block, block).
    """
    kernel = _resample_filter(up, down)
    half = len(kernel) // 2
    cycles = max(1, BLOCK // up)  # the filter's phases repeat after `up` results, which is `down` inputs
    block, step = cycles * up, cycles * down
    before = half // up
    inputs = before + ((block - 1) * down + half) // up + 1
    # Result n weighs input k by kernel[half + k * up - n * down].
    place = half + (np.arange(inputs)[:, None] - before) * up - np.arange(block) * down
    inside = (place >= 0) & (place < len(kernel))
    return np.where(inside, kernel[np.where(inside, place, 0)], 0).astype(np.float32), before, step, block


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Changes the sampling rate: float [samples] to float32 [ceil(samples * to_hz / from_hz)].

    A Kaiser-windowed sinc of 64 zero crossings, roll-off 0.9476, beta 14.77 (librosa's kaiser_best). The
    polyphase filter is written as a matrix product, which is many times quicker than summing it result by result.
    """
    waveform = np.asarray(waveform, np.float32)
    if from_hz == to_hz:
        return waveform
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    length = -(-len(waveform) * up // down)
    if up > MOST_PHASES:
        return _filtered(waveform, _resample_filter(up, down), up, down)
    matrix, before, step, block = _matrix(up, down)
    blocks = -(-length // block)
    padded = np.pad(waveform, (before, max(0, (blocks - 1) * step + len(matrix) - before - len(waveform))))
    rows = np.lib.stride_tricks.sliding_window_view(padded, len(matrix))[::step]
    parts = [np.ascontiguousarray(rows[at:min(at + ROWS, blocks)]) @ matrix for at in range(0, blocks, ROWS)]
    return np.concatenate(parts).ravel()[:length] if parts else waveform


@functools.lru_cache(maxsize=16)
def _evaluation_filter(up: int, down: int) -> np.ndarray:
    """Sinc under a squared cosine at up times the source rate, float64 [odd]."""
    cutoff = EVALUATION_ROLLOFF * min(up, down) / down
    half = math.ceil(EVALUATION_ZERO_CROSSINGS / cutoff * up)
    crossings = np.arange(-half, half + 1) / up * cutoff
    crossings = np.clip(crossings, -EVALUATION_ZERO_CROSSINGS, EVALUATION_ZERO_CROSSINGS)  # where the window is zero
    window = np.cos(np.pi * crossings / 2 / EVALUATION_ZERO_CROSSINGS) ** 2
    return np.sinc(crossings) * window * cutoff


def resample_for_evaluation(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """Changes the sampling rate as the published scores do: float [samples] to float32 [ceil(samples * to_hz / from_hz)].

    A sinc of 6 zero crossings, roll-off 0.99, under a squared cosine (torchaudio's default).
    """
    if from_hz == to_hz:
        return np.asarray(waveform, np.float32)
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    return _filtered(waveform, _evaluation_filter(up, down), up, down)


def _filtered(waveform: np.ndarray, kernel: np.ndarray, up: int, down: int) -> np.ndarray:
    """Raises the rate by up, filters, lowers it by down, without delay; zeros beyond the ends."""
    from scipy.signal import resample_poly  # here: it takes most of a second, which the Pipeline and decoding do without
    result = resample_poly(np.asarray(waveform, np.float64), up, down, window=kernel / up)  # which it multiplies by up
    return result.astype(np.float32)
