"""Signals of few channels with several steps side by side, `[B, T, D]` → `[B, T / S, S · D]`, and their convolutions.

A TPU takes as long for 24 channels as for 128. Reading in order, a fold changes nothing: step t is row t // S, place t % S.
"""
from collections.abc import Callable
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

LANES = 128  # of a TPU
MOST_STEPS = 8  # of a row
_CHANNELS_LAST = ('NHC', 'HIO', 'NHC')


def steps_a_row(width: int, length: int) -> int:
    """S for a signal `[B, length, width]`: the largest power of two to 8 that divides the length and fits into the lanes."""
    steps = 1
    while steps < MOST_STEPS and 2 * steps * width <= LANES and length % (2 * steps) == 0:
        steps *= 2
    return steps


def fold(x: jax.Array, steps: int) -> jax.Array:
    """`[B, T, D]` → `[B, T / steps, steps · D]`."""
    batch, length, width = x.shape
    return x.reshape(batch, length // steps, steps * width)


def unfold(x: jax.Array, steps: int) -> jax.Array:
    """`[B, T / steps, steps · D]` → `[B, T, D]`."""
    batch, rows, channels = x.shape
    return x.reshape(batch, rows * steps, channels // steps)


def on_rows(x: jax.Array, function: Callable[[jax.Array, int], jax.Array], rate: int = 1) -> jax.Array:
    """function(x folded to fill a TPU's lanes, its steps a row), unfolded: `[B, T, D]` → `[B, T · rate, O]`."""
    steps = steps_a_row(x.shape[2], x.shape[1])
    return unfold(function(fold(x, steps), steps), steps * rate)


def conv(x: jax.Array, kernel: jax.Array, dilation: int = 1, steps: int = 1) -> jax.Array:
    """Zero-padded convolution of the same length.

    Args:
      x: `[B, T / steps, steps · D]`.
      kernel: `[taps, D, O]`, odd taps.
      dilation: steps between taps.
      steps: of a row.

    Returns:
      `[B, T / steps, steps · O]`.
    """
    if steps > 1:
        kernel, dilation = kernel_of_rows(kernel, _conv_places(kernel.shape[0], dilation, steps)), 1
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(x, kernel, (1,), [(pad, pad)], rhs_dilation=(dilation,), dimension_numbers=_CHANNELS_LAST)


def upsample(x: jax.Array, taps: jax.Array, rate: int, steps: int) -> jax.Array:
    """Transposed convolution: output n is the sum of x[i] · tap[n + rate / 2 - rate · i].

    Args:
      x: `[B, T / steps, steps · D]`.
      taps: `[2 · rate, D, O]`.
      rate: outputs a step, even.
      steps: of a row of x.

    Returns:
      `[B, T / steps, steps · rate · O]`.
    """
    return conv(x, kernel_of_rows(taps, _upsample_places(rate, steps)))


def kernel_of_rows(taps: jax.Array, places: np.ndarray) -> jax.Array:
    """A kernel between rows.

    Args:
      taps: `[taps, D, O]`.
      places: int `[rows, S, P]`, the tap from place s of a row to place p of the result, or their number for none. The middle
        row is the result's own.

    Returns:
      `[rows, S · D, P · O]`.
    """
    rows, steps, out_steps = places.shape
    padded = jnp.concatenate([taps, jnp.zeros_like(taps[:1])])
    return padded[places].swapaxes(2, 3).reshape(rows, steps * taps.shape[1], out_steps * taps.shape[2])


@functools.cache
def _conv_places(taps: int, dilation: int, steps: int) -> np.ndarray:
    reach = dilation * (taps // 2)
    rows = -(-reach // steps)
    row, place, out = np.ogrid[-rows:rows + 1, :steps, :steps]
    tap, beside = np.divmod(row * steps + place - out + reach, dilation)
    return np.where((beside == 0) & (0 <= tap) & (tap < taps), tap, taps)


@functools.cache
def _upsample_places(rate: int, steps: int) -> np.ndarray:
    row, place, out = np.ogrid[-1:2, :steps, :steps * rate]
    tap = out + rate // 2 - rate * (row * steps + place)
    return np.where((0 <= tap) & (tap < 2 * rate), tap, 2 * rate)
