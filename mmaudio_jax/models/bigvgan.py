"""The vocoders BigVGAN (16k) and BigVGAN v2 (44k): log-mel spectrograms → waveforms.

Source: BigVGAN (arXiv 2206.04658) and its released code. Sequences are `[B, T, D]`, channels last. Parameters are what
weights/bigvgan.py makes: weight norm is multiplied out, and snake's logarithmic parameters are exponentiated.
"""
import functools
import math
from typing import Any

from flax import struct
import flax.linen as nn
import jax
from jax import flatten_util
from jax import lax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import tiled_conv

_RATES_16K = (4, 4, 2, 2, 2, 2)
_RATES_44K = (8, 4, 2, 2, 2, 2)
VARIANTS: dict[str, dict[str, Any]] = {
    '16k': dict(mel_bins=80, width=1536, rates=_RATES_16K, tanh=True),
    '44k': dict(mel_bins=128, width=1536, rates=_RATES_44K, tanh=False),
}
_KERNELS = (3, 7, 11)  # taps of the AMP blocks of a stage
_DILATIONS = (1, 3, 5)  # of the three pairs of convolutions in a block
_TILED_TAPS = (7, 11)  # of the convolutions that a CPU computes in Fourier tiles; three taps are not worth it
_TILED_WIDTH = 96  # channels from which they are
_TILE = 32  # steps of a tile
_WIDE, _WIDE_TILE = 512, 24  # shorter tiles from that many channels on: their transformed kernels are smaller
_TAPS = 12  # of the anti-aliasing filters
_REACH = 6  # steps that an anti-aliased activation looks back and ahead
_EDGE = 3  # steps that one of its two filters does
_CHANNELS_LAST = ('NHC', 'HIO', 'NHC')


def build(rate: str) -> 'BigVGAN':
    """The vocoder of an audio rate, '16k' or '44k'.

    Raises:
      ValueError: an unknown rate.
    """
    if rate not in VARIANTS:
        raise ValueError(f'rate {rate!r} has no vocoder; choose one of {", ".join(VARIANTS)}')
    return BigVGAN(**VARIANTS[rate])


class BigVGAN(nn.Module):
    """Log-mel `[B, T, mel_bins]` → waveform `[B, T · hop]` in [-1, 1], float32; hop is the product of `rates`.

    Attributes:
      mel_bins: channels of the input.
      width: channels after the first convolution; every stage halves them.
      rates: factors by which the stages up-sample.
      tanh: the 16k model's end, tanh after a convolution with bias; otherwise no bias, and clipping.
    """
    mel_bins: int
    width: int
    rates: tuple[int, ...]
    tanh: bool

    @property
    def reach(self) -> int:
        """How many mel frames before and after its own a sample of the waveform depends on, rounded up."""
        widest = (max(_KERNELS) - 1) // 2
        block = sum(2 * _REACH + widest * (dilation + 1) for dilation in _DILATIONS)  # steps at the rate of a stage
        frames, steps = 3.0, 1  # conv_pre; steps a frame
        for rate in self.rates:
            frames += 1.5 / steps  # the transposed convolution
            steps *= rate
            frames += block / steps
        return math.ceil(frames + (_REACH + 3) / steps)  # the last activation and conv_post

    @nn.compact
    def __call__(self, mel):
        x = Conv(self.width, 7, use_bias=True, name='conv_pre')(mel)
        for stage, rate in enumerate(self.rates):
            width = self.width >> (stage + 1)
            x = Upsample(width, rate, name=f'ups_{stage}')(x)
            blocks = range(len(_KERNELS) * stage, len(_KERNELS) * (stage + 1))
            x = sum(AMPBlock(width, taps, name=f'resblocks_{i}')(x) for i, taps in zip(blocks, _KERNELS)) / len(_KERNELS)
        x = Activation(name='activation_post')(x)
        x = Conv(1, 7, use_bias=self.tanh, name='conv_post')(x)[..., 0]
        return jnp.tanh(x) if self.tanh else jnp.clip(x, -1, 1)


class AMPBlock(nn.Module):
    """Three times x + conv(activation(dilated conv(activation(x)))), `[B, T, width]` → `[B, T, width]`.

    The six pairs of an activation and a convolution are one loop with stacked parameters: compiled once, not six times.
    """
    width: int
    taps: int

    @nn.compact
    def __call__(self, x):
        layers = 2 * len(_DILATIONS)
        stacked = (
            ActivationParameters.make(self, (layers,), self.width),
            self.param('kernel', nn.initializers.normal(0.01), (layers, self.taps, self.width, self.width)),
            self.param('bias', nn.initializers.zeros, (layers, self.width)),
        )
        convolutions = [functools.partial(_block_conv, dilation=dilation) for dilation in _DILATIONS]

        def layer(carry, step):
            total, h = carry
            index, activation, kernel, bias = step
            activation, bias = _materialized((activation, bias))
            second = index % 2 == 1
            h = lax.switch(jnp.where(second, 0, index // 2), convolutions, _activation(h, activation), kernel) + bias
            return lax.cond(second, lambda: (total + h, total + h), lambda: (total, h)), None

        return lax.scan(layer, (x, x), (jnp.arange(layers), *stacked))[0][0]


class Conv(nn.Module):
    """Zero-padded convolution, `[B, T, D]` → `[B, T, out]`, kernel `[taps, D, out]`."""
    out: int
    taps: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        x = _conv(x, self.param('kernel', nn.initializers.normal(0.01), (self.taps, x.shape[-1], self.out)), 1)
        return x + self.param('bias', nn.initializers.zeros, (self.out,)) if self.use_bias else x


class Upsample(nn.Module):
    """Transposed convolution of twice as many taps as its rate, `[B, T, D]` → `[B, T · rate, out]`.

    Output n is the sum of x[i] · tap[n + rate/2 - rate · i]. Two taps meet each output, so that all phases are one product
    of (x[t], x[t-1]) with the kernel `[2, D, rate · out]`: tap rate · s + q at `[s, :, q · out:(q + 1) · out]`.
    """
    out: int
    rate: int

    @nn.compact
    def __call__(self, x):
        batch, length, channels = x.shape
        kernel = self.param('kernel', nn.initializers.normal(0.01), (2, channels, self.rate * self.out))
        bias = self.param('bias', nn.initializers.zeros, (self.out,))
        padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
        pairs = jnp.concatenate([padded[:, 1:], padded[:, :-1]], axis=-1)
        phases = pairs.reshape(-1, 2 * channels) @ kernel.reshape(2 * channels, -1)
        start = self.rate // 2
        return phases.reshape(batch, (length + 1) * self.rate, self.out)[:, start:start + length * self.rate] + bias


class ActivationParameters(struct.PyTreeNode):
    """The checkpoint's two filters `[12]`, and snake's frequency and amplitude `[D]`; or stacks of these."""
    up: jax.Array
    down: jax.Array
    frequency: jax.Array
    amplitude: jax.Array

    @classmethod
    def make(cls, module: nn.Module, stack: tuple[int, ...], channels: int) -> 'ActivationParameters':
        """Declares the four as parameters of `module`."""
        return cls(
            up=module.param('up', nn.initializers.constant(1 / _TAPS), (*stack, _TAPS)),
            down=module.param('down', nn.initializers.constant(1 / _TAPS), (*stack, _TAPS)),
            frequency=module.param('frequency', nn.initializers.ones, (*stack, channels)),
            amplitude=module.param('amplitude', nn.initializers.ones, (*stack, channels)),
        )


class Activation(nn.Module):
    """One anti-aliased activation, `[B, T, D]` → `[B, T, D]`."""

    @nn.compact
    def __call__(self, x):
        return _activation(x, ActivationParameters.make(self, (), x.shape[-1]))


def _materialized(tree):
    """The arrays of `tree` as parts of one array behind a barrier; XLA would slice the stacks anew for every element else."""
    flat, restore = flatten_util.ravel_pytree(tree)
    return restore(lax.optimization_barrier(flat))


def _conv(x, kernel, dilation):
    """Zero-padded convolution of the same length: x `[B, T, D]`, kernel `[taps, D, out]`, odd taps → `[B, T, out]`."""
    pad = dilation * (kernel.shape[0] // 2)
    return lax.conv_general_dilated(x, kernel, (1,), [(pad, pad)], rhs_dilation=(dilation,), dimension_numbers=_CHANNELS_LAST)


def _block_conv(x, kernel, dilation):
    """_conv; on CPU in Fourier tiles where that is faster, for which the steps must outweigh the kernel's own transform."""
    direct = functools.partial(_conv, dilation=dilation)
    taps, width, _ = kernel.shape
    if taps not in _TILED_TAPS or width < _TILED_WIDTH or x.shape[0] * x.shape[1] < width or x.dtype != jnp.float32:
        return direct(x, kernel)
    tiled = functools.partial(tiled_conv.conv, dilation=dilation, size=_TILE if width < _WIDE else _WIDE_TILE)
    return lax.platform_dependent(x, kernel, cpu=tiled, default=direct)


def _activation(x, parameters):
    """Up-sample ×2, x + amplitude · sin²(frequency · x), down-sample ×2, `[B, T, D]` → `[B, T, D]`.

    The filters run as shifted multiply-adds over the phases of the doubled rate, which XLA fuses: the doubled signal is
    never interleaved. Results next to the ends see how the signals are padded; they are computed apart, on a few steps,
    so that the rest is free of padding.
    """
    batch, length, _ = x.shape
    if length < 2 * _REACH:
        return _short_activation(x, parameters)
    ends = _short_activation(jnp.concatenate([x[:, :2 * _REACH], x[:, -2 * _REACH:]]), parameters)
    return jnp.concatenate([ends[:batch, :_REACH], _inner_activation(x, parameters), ends[batch:, -_REACH:]], axis=1)


def _short_activation(x, parameters):
    """The activation of a few steps x `[B, T, D]` by matrices; both signals continue with their first and last value."""
    up, down = _filter_places(x.shape[1])
    doubled = _snake(jnp.einsum('MTK,K,BTD->BMD', up, parameters.up, x), parameters)
    return jnp.einsum('TMK,K,BMD->BTD', down, parameters.down, doubled)


@functools.cache
def _filter_places(length):
    """Which tap weighs which sample: `[2T, T, 12]` from steps to the doubled rate, gain 2, and `[T, 2T, 12]` back."""
    up, down = np.zeros((2 * length, length, _TAPS), np.float32), np.zeros((length, 2 * length, _TAPS), np.float32)
    for tap in range(_TAPS):
        for sample in range(2 * length):
            if (sample - tap) % 2:
                up[sample, np.clip((sample - tap + 5) // 2, 0, length - 1), tap] += 2
        for step in range(length):
            down[step, np.clip(2 * step + tap - 5, 0, 2 * length - 1), tap] += 1
    return up, down


def _inner_activation(x, parameters):
    """The activation of steps 6 … T - 7 of x `[B, T, D]`, which reach no end."""
    length = x.shape[1] - 2 * _REACH
    even, odd = _snake_phases(x, parameters)
    down, after = parameters.down, even[:, 1:]
    return sum(down[2 * j + 1] * after[:, j:j + length] + down[2 * j] * odd[:, j:j + length] for j in range(_TAPS // 2))


def _snake_phases(x, parameters):
    """The doubled rate's samples at and after each of the steps 3 … T - 4 of x, through snake: `[2, B, T - 6, D]`.

    One array behind a barrier: XLA would otherwise compute every sample anew for each tap of the filter that reads it.
    """
    length = x.shape[1] - 2 * _EDGE
    up = 2 * parameters.up
    even = sum(up[2 * j + 1] * x[:, 5 - j:5 - j + length] for j in range(_TAPS // 2))
    odd = sum(up[2 * j] * x[:, 6 - j:6 - j + length] for j in range(_TAPS // 2))
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
