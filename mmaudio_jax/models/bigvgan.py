"""The vocoders BigVGAN (16k) and BigVGAN v2 (44k): log-mel spectrograms → waveforms.

Source: BigVGAN (arXiv 2206.04658) and its released code. Sequences are `[B, T, D]`, channels last. Parameters are what
weights/bigvgan.py makes: weight norm is multiplied out, and snake's logarithmic parameters are exponentiated.
"""
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax import flatten_util
from jax import lax
import jax.numpy as jnp

from mmaudio_jax.models import anti_aliasing
from mmaudio_jax.models import folded
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
        block = sum(2 * anti_aliasing.REACH + widest * (dilation + 1) for dilation in _DILATIONS)  # steps of a stage
        frames, steps = 3.0, 1  # conv_pre; steps a frame
        for rate in self.rates:
            frames += 1.5 / steps  # the transposed convolution
            steps *= rate
            frames += block / steps
        return math.ceil(frames + (anti_aliasing.REACH + 3) / steps)  # the last activation and conv_post

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

    Parameters of the six pairs of an activation and a convolution are stacked.
    """
    width: int
    taps: int

    @nn.compact
    def __call__(self, x):
        layers = 2 * len(_DILATIONS)
        stacked = (
            anti_aliasing.Parameters.make(self, (layers,), self.width),
            self.param('kernel', nn.initializers.normal(0.01), (layers, self.taps, self.width, self.width)),
            self.param('bias', nn.initializers.zeros, (layers, self.width)),
        )
        return lax.platform_dependent(x, *stacked, tpu=_folded_block, default=_block)


class Conv(nn.Module):
    """Zero-padded convolution, `[B, T, D]` → `[B, T, out]`, kernel `[taps, D, out]`."""
    out: int
    taps: int
    use_bias: bool

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.normal(0.01), (self.taps, x.shape[-1], self.out))
        x = lax.platform_dependent(x, kernel, tpu=_folded_conv, default=folded.conv)
        return x + self.param('bias', nn.initializers.zeros, (self.out,)) if self.use_bias else x


class Upsample(nn.Module):
    """Transposed convolution of twice as many taps as its rate, `[B, T, D]` → `[B, T · rate, out]`.

    Output n is the sum of x[i] · tap[n + rate/2 - rate · i]; the kernel `[2, D, rate · out]` has tap rate · s + q at
    `[s, :, q · out:(q + 1) · out]`.
    """
    out: int
    rate: int

    @nn.compact
    def __call__(self, x):
        kernel = self.param('kernel', nn.initializers.normal(0.01), (2, x.shape[-1], self.rate * self.out))
        bias = self.param('bias', nn.initializers.zeros, (self.out,))
        folded_form, form = (functools.partial(function, rate=self.rate) for function in (_folded_upsample, _upsample))
        return lax.platform_dependent(x, kernel, tpu=folded_form, default=form) + bias


class Activation(nn.Module):
    """One anti-aliased activation, `[B, T, D]` → `[B, T, D]`."""

    @nn.compact
    def __call__(self, x):
        parameters = anti_aliasing.Parameters.make(self, (), x.shape[-1])
        return lax.platform_dependent(x, parameters, tpu=_folded_activation, default=anti_aliasing.activation)


def _materialized(tree):
    """The arrays of `tree` as parts of one array behind a barrier; XLA would slice the stacks anew for every element else."""
    flat, restore = flatten_util.ravel_pytree(tree)
    return restore(lax.optimization_barrier(flat))


def _upsample(x, kernel, rate):
    """Two taps meet each output, so that all phases are one product of (x[t], x[t-1]) with the kernel."""
    batch, length, channels = x.shape
    padded = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    pairs = jnp.concatenate([padded[:, 1:], padded[:, :-1]], axis=-1)
    phases = pairs.reshape(-1, 2 * channels) @ kernel.reshape(2 * channels, -1)
    start = rate // 2
    return phases.reshape(batch, (length + 1) * rate, -1)[:, start:start + length * rate]


def _folded_upsample(x, kernel, rate):
    taps = kernel.reshape(2, x.shape[2], rate, -1).swapaxes(1, 2).reshape(2 * rate, x.shape[2], -1)
    return folded.on_rows(x, lambda rows, steps: folded.upsample(rows, taps, rate, steps), rate)


def _folded_conv(x, kernel):
    return folded.on_rows(x, lambda rows, steps: folded.conv(rows, kernel, 1, steps))


def _folded_activation(x, parameters):
    return folded.on_rows(x, lambda rows, steps: anti_aliasing.folded_activation(rows, parameters, steps))


def _block_conv(x, kernel, dilation):
    """folded.conv; on CPU in Fourier tiles where that is faster: the steps must outweigh the transform of the kernel."""
    direct = functools.partial(folded.conv, dilation=dilation)
    taps, width, _ = kernel.shape
    if taps not in _TILED_TAPS or width < _TILED_WIDTH or x.shape[0] * x.shape[1] < width or x.dtype != jnp.float32:
        return direct(x, kernel)
    tiled = functools.partial(tiled_conv.conv, dilation=dilation, size=_TILE if width < _WIDE else _WIDE_TILE)
    return lax.platform_dependent(x, kernel, cpu=tiled, default=direct)


def _block(x, activations, kernels, biases):
    """The six pairs as a loop with stacked parameters: compiled once, not six times."""
    convolutions = [functools.partial(_block_conv, dilation=dilation) for dilation in _DILATIONS]

    def pair(carry, step):
        total, h = carry
        index, activation, kernel, bias = step
        activation, bias = _materialized((activation, bias))
        second = index % 2 == 1
        h = anti_aliasing.activation(h, activation)
        h = lax.switch(jnp.where(second, 0, index // 2), convolutions, h, kernel) + bias
        return lax.cond(second, lambda: (total + h, total + h), lambda: (total, h)), None

    return lax.scan(pair, (x, x), (jnp.arange(len(kernels)), activations, kernels, biases))[0][0]


def _folded_block(x, activations, kernels, biases):
    """The six pairs as convolutions of about as many channels as a TPU has lanes, without a loop: it would copy the signal."""
    def pair(h, layer, dilation, steps):
        h = anti_aliasing.folded_activation(h, jax.tree.map(lambda leaf: leaf[layer], activations), steps)
        return folded.conv(h, kernels[layer], dilation, steps) + jnp.tile(biases[layer], steps)

    def pairs(x, steps):
        for block, dilation in enumerate(_DILATIONS):
            x += pair(pair(x, 2 * block, dilation, steps), 2 * block + 1, 1, steps)
        return x

    return folded.on_rows(x, pairs)
