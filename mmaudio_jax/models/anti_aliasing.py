"""BigVGAN's anti-aliased activation: snake at twice the rate, between two filters of twelve taps.

Source: BigVGAN (arXiv 2206.04658) and its released code. Three forms that compute the same: by matrices, of a few steps; by
shifted multiply-adds; and by convolutions between rows of channels, for TPUs.
"""
import functools
import math

from flax import struct
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import folded

TAPS = 12  # of the filters
REACH = 6  # steps that an activation looks back and ahead
_EDGE = 3  # steps that one of its two filters does
_END = folded.MOST_STEPS  # steps next to an end that `folded_activation` computes apart: at least REACH, and whole rows


class Parameters(struct.PyTreeNode):
    """The checkpoint's two filters `[12]`, and snake's frequency and amplitude `[D]`; or stacks of these."""
    up: jax.Array
    down: jax.Array
    frequency: jax.Array
    amplitude: jax.Array

    @classmethod
    def make(cls, module: nn.Module, stack: tuple[int, ...], channels: int) -> 'Parameters':
        """Declares the four as parameters of `module`."""
        return cls(
            up=module.param('up', nn.initializers.constant(1 / TAPS), (*stack, TAPS)),
            down=module.param('down', nn.initializers.constant(1 / TAPS), (*stack, TAPS)),
            frequency=module.param('frequency', nn.initializers.ones, (*stack, channels)),
            amplitude=module.param('amplitude', nn.initializers.ones, (*stack, channels)),
        )


def activation(x: jax.Array, parameters: Parameters) -> jax.Array:
    """Up-sample ×2, x + amplitude · sin²(frequency · x), down-sample ×2.

    The filters run as shifted multiply-adds over the phases of the doubled rate, which XLA fuses: the doubled signal is
    never interleaved. Results next to the ends see how the signals are padded; they are computed apart, on a few steps,
    so that the rest is free of padding.
    """
    batch, length, _ = x.shape
    if length < 2 * REACH:
        return _short_activation(x, parameters)
    ends = _short_activation(jnp.concatenate([x[:, :2 * REACH], x[:, -2 * REACH:]]), parameters)
    return jnp.concatenate([ends[:batch, :REACH], _inner_activation(x, parameters), ends[batch:, -REACH:]], axis=1)


def folded_activation(x: jax.Array, parameters: Parameters, steps: int) -> jax.Array:
    """`activation` of x `[B, T / steps, steps · D]`, a filter being a convolution with a diagonal matrix for each tap.

    A TPU reads a signal anew for every shift of it; one convolution reads it once, and snake and the second filter are
    fused with the first. At its default precision both round what they multiply to bfloat16, as its other products do.
    Many channels are cut into groups of folded.LANES, whose filters are equal.
    """
    batch, rows, channels = x.shape
    width = channels // steps
    if rows * steps < 2 * _END:
        return folded.fold(_short_activation(folded.unfold(x, steps), parameters), steps)
    groups = width // folded.LANES if width % folded.LANES == 0 else 1
    diagonal = jnp.eye(width // groups, dtype=x.dtype)
    up, down = (folded.kernel_of_rows(taps[:, None, None] * diagonal, places)
                for taps, places in zip((2 * parameters.up, parameters.down), _row_places(steps)))
    doubled = folded.conv(_groups_first(x, groups), up)
    a_row = lambda values: jnp.tile(values.reshape(groups, 1, 1, -1), 2 * steps)
    snake = _snake(doubled.reshape(groups, batch, rows, -1),
                   parameters.replace(frequency=a_row(parameters.frequency), amplitude=a_row(parameters.amplitude)))
    inner = folded.conv(snake.reshape(doubled.shape), down)
    inner = jnp.moveaxis(inner.reshape(groups, batch, rows, -1), 0, 2).reshape(x.shape)
    near = 2 * _END // steps  # rows
    ends = folded.unfold(jnp.concatenate([x[:, :near], x[:, -near:]]), steps)
    ends = folded.fold(_short_activation(ends, parameters), steps)
    inner = lax.dynamic_update_slice(inner, ends[:batch, :near // 2], (0, 0, 0))
    return lax.dynamic_update_slice(inner, ends[batch:, near // 2:], (0, rows - near // 2, 0))


def _groups_first(x, groups):
    """`[B, T, D]` → `[groups · B, T, D / groups]`."""
    batch, length, width = x.shape
    return jnp.moveaxis(x.reshape(batch, length, groups, width // groups), 2, 0).reshape(groups * batch, length, -1)


@functools.cache
def _row_places(steps):
    """`places` (folded.kernel_of_rows) of both filters: `[rows, S, 2 S]` up, `[rows, 2 S, S]` down."""
    rows = -(-_EDGE // steps)
    row, place, out = np.ogrid[-rows:rows + 1, :steps, :2 * steps]
    up = out + 5 - 2 * (row * steps + place)
    row, place, out = np.ogrid[-rows:rows + 1, :2 * steps, :steps]
    down = row * 2 * steps + place - 2 * out + 5
    return tuple(np.where((0 <= taps) & (taps < TAPS), taps, TAPS) for taps in (up, down))


def _short_activation(x, parameters):
    """The activation of a few steps x `[B, T, D]` by matrices; both signals continue with their first and last value."""
    up, down = _filter_places(x.shape[1])
    doubled = _snake(jnp.einsum('MTK,K,BTD->BMD', up, parameters.up, x), parameters)
    return jnp.einsum('TMK,K,BMD->BTD', down, parameters.down, doubled)


@functools.cache
def _filter_places(length):
    """Which tap weighs which sample: `[2T, T, 12]` from steps to the doubled rate, gain 2, and `[T, 2T, 12]` back."""
    up, down = np.zeros((2 * length, length, TAPS), np.float32), np.zeros((length, 2 * length, TAPS), np.float32)
    for tap in range(TAPS):
        for sample in range(2 * length):
            if (sample - tap) % 2:
                up[sample, np.clip((sample - tap + 5) // 2, 0, length - 1), tap] += 2
        for step in range(length):
            down[step, np.clip(2 * step + tap - 5, 0, 2 * length - 1), tap] += 1
    return up, down


def _inner_activation(x, parameters):
    """The activation of steps 6 … T - 7 of x `[B, T, D]`, which reach no end."""
    length = x.shape[1] - 2 * REACH
    even, odd = _snake_phases(x, parameters)
    down, after = parameters.down, even[:, 1:]
    return sum(down[2 * j + 1] * after[:, j:j + length] + down[2 * j] * odd[:, j:j + length] for j in range(TAPS // 2))


def _snake_phases(x, parameters):
    """The doubled rate's samples at and after each of the steps 3 … T - 4 of x, through snake: `[2, B, T - 6, D]`.

    One array behind a barrier: XLA would otherwise compute every sample anew for each tap of the filter that reads it.
    """
    length = x.shape[1] - 2 * _EDGE
    up = 2 * parameters.up
    even = sum(up[2 * j + 1] * x[:, 5 - j:5 - j + length] for j in range(TAPS // 2))
    odd = sum(up[2 * j] * x[:, 6 - j:6 - j + length] for j in range(TAPS // 2))
    return lax.optimization_barrier(jnp.stack([_snake(even, parameters), _snake(odd, parameters)]))


def _snake(x, parameters):
    return x + parameters.amplitude * _sin_squared(parameters.frequency * x)


def _sin_squared(x):
    """sin² by a polynomial in the squared distance to the nearest multiple of π, error below 1e-6 for |x| < 1e4.

    XLA's own sine costs more than the rest of the activation; the square needs neither quadrant nor sign.
    """
    periods = jnp.round(x * np.float32(1 / math.pi))
    rest = (x - periods * _PI_HIGH) - periods * _PI_LOW
    square = rest * rest
    result = _SIN_SQUARED[-1]
    for coefficient in _SIN_SQUARED[-2::-1]:
        result = result * square + coefficient
    return result * square


def _fit_sin_squared(degree: int) -> np.ndarray:
    """Coefficients of q with sin²(r) ≈ r² q(r²) for |r| ≤ π/2, float32."""
    end = (math.pi / 2)**2
    squares = end * (0.5 - 0.5 * np.cos(np.pi * (np.arange(400) + 0.5) / 400))
    fit = np.polynomial.Chebyshev.fit(squares, np.sin(np.sqrt(squares))**2 / squares, degree, domain=[0, end])
    return fit.convert(kind=np.polynomial.Polynomial).coef.astype(np.float32)


_PI_HIGH = np.float32(3.140625)  # few bits, so that its multiples are exact
_PI_LOW = np.float32(math.pi - 3.140625)
_SIN_SQUARED = _fit_sin_squared(6)
