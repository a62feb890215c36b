"""Changes the sampling rate of sound with the windowed sinc that the official features were made with (SPEC section 4)."""
import functools
import math

import numpy as np
import scipy.signal

ZERO_CROSSINGS = 64  # of the sinc, on each side
ROLLOFF = 0.9475937167399596  # of the lower Nyquist frequency
BETA = 14.769656459379492  # of the Kaiser window
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

    A Kaiser-windowed sinc of 64 zero crossings, roll-off 0.9476, beta 14.77 (librosa's kaiser_best), SPEC section 4. The
    polyphase filter is written as a matrix product, which is many times quicker than summing it result by result.
    """
    waveform = np.asarray(waveform, np.float32)
    if from_hz == to_hz:
        return waveform
    common = math.gcd(from_hz, to_hz)
    up, down = to_hz // common, from_hz // common
    length = -(-len(waveform) * up // down)
    if up > MOST_PHASES:
        return _result_by_result(waveform, up, down, length)
    matrix, before, step, block = _matrix(up, down)
    blocks = -(-length // block)
    padded = np.pad(waveform, (before, max(0, (blocks - 1) * step + len(matrix) - before - len(waveform))))
    rows = np.lib.stride_tricks.sliding_window_view(padded, len(matrix))[::step]
    parts = [np.ascontiguousarray(rows[at:min(at + ROWS, blocks)]) @ matrix for at in range(0, blocks, ROWS)]
    return np.concatenate(parts).ravel()[:length] if parts else waveform


def _result_by_result(waveform: np.ndarray, up: int, down: int, length: int) -> np.ndarray:
    """The same without a matrix."""
    kernel = _resample_filter(up, down)
    half = len(kernel) // 2
    lead = -(-half // down)  # whole output samples before the first one
    kernel = np.concatenate([np.zeros(lead * down - half), kernel])
    result = scipy.signal.upfirdn(kernel, waveform.astype(np.float64), up, down)[lead:lead + length]
    return np.pad(result, (0, length - len(result))).astype(np.float32)
