"""The audio VAE: log-mel spectrograms ↔ latents at half their rate, magnitude preserving and one-dimensional.

Source: MMAudio (arXiv 2412.15322), section 3.1 and the released code; magnitude preservation from EDM2 (arXiv 2312.02696).
Parameters hold kernels that are already normalised: weights/vae.py does it once at import, so that decoding is only
convolutions. Sequences are `[B, T, D]`, channels last.
"""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import winograd

VARIANTS: dict[str, dict[str, Any]] = {
    '16k': dict(mel_bins=80, latent_channels=20, width=384),
    '44k': dict(mel_bins=128, latent_channels=40, width=512),
}
_MULTIPLIERS = (1, 2, 4)  # width of the levels, full rate first
_ENCODER_BLOCKS = 2  # residual blocks of a level
_DECODER_BLOCKS = 3
_CLIP = 256.0  # bound of activations
_SILU_GAIN = 0.596  # standard deviation of silu(x) for standard normal x
_BRANCH = 0.3  # weight of the new branch in a sum
_EPS = 1e-4
_LOG_VARIANCE_RANGE = (-30.0, 20.0)


def build(rate: str) -> 'VAE':
    """The VAE of an audio rate, '16k' or '44k'.

    Raises:
      ValueError: an unknown rate.
    """
    if rate not in VARIANTS:
        raise ValueError(f'rate {rate!r} has no VAE; choose one of {", ".join(VARIANTS)}')
    return VAE(**VARIANTS[rate])


class VAE(nn.Module):
    """Encoder and decoder, with the statistics of mel spectrograms as the parameters data_mean and data_std `[mel_bins]`.

    Use `vae.apply({'params': params}, mel, method='encode')` and `method='decode'`; either may be jitted, for any length.
    The decoder needs only the parameters data_mean, data_std and decoder.
    """
    mel_bins: int
    latent_channels: int
    width: int

    def setup(self):
        self.data_mean = self.param('data_mean', nn.initializers.zeros, (self.mel_bins,))
        self.data_std = self.param('data_std', nn.initializers.ones, (self.mel_bins,))
        self.encoder = Encoder(self.width, 2 * self.latent_channels)
        self.decoder = Decoder(self.width, self.mel_bins)

    def encode(self, mel):
        """Log-mel `[B, T, mel_bins]` → mean and standard deviation `[B, T // 2, C]` of the latents, float32."""
        mean, log_variance = jnp.split(self.encoder((mel - self.data_mean) / self.data_std), 2, axis=-1)
        return mean, jnp.exp(0.5 * jnp.clip(log_variance, *_LOG_VARIANCE_RANGE))

    def decode(self, latents):
        """Latents `[B, N, C]`, un-normalised → log-mel `[B, 2N, mel_bins]`, float32."""
        return self.decoder(latents) * self.data_std + self.data_mean

    def __call__(self, mel):
        """Log-mel `[B, T, mel_bins]` → the mel decoded from the mean of its latents; `init` goes through here."""
        return self.decode(self.encode(mel)[0])


class Encoder(nn.Module):
    """Normalised mel `[B, T, mel_bins]` → moments `[B, T // 2, out]`."""
    width: int
    out: int

    @nn.compact
    def __call__(self, x):
        h = Conv(self.width, 3, name='conv_in')(x)
        for level, multiplier in enumerate(_MULTIPLIERS):
            h = Level(multiplier * self.width, _ENCODER_BLOCKS, name=f'down_{level}')(h)
            if level == 0:
                h = Downsample(self.width, name='down_0_downsample')(h)
        h = _clip(Middle(_MULTIPLIERS[-1] * self.width, name='mid')(h))
        return FinalConv(self.out, name='final')(_nonlinearity(h))


class Decoder(nn.Module):
    """Latents `[B, N, C]` → normalised mel `[B, 2N, mel_bins]`."""
    width: int
    out: int

    @nn.compact
    def __call__(self, z):
        h = Conv(_MULTIPLIERS[-1] * self.width, 3, name='conv_in')(z)
        h = _clip(Middle(_MULTIPLIERS[-1] * self.width, name='mid')(h))
        for level, multiplier in reversed(tuple(enumerate(_MULTIPLIERS))):
            h = Level(multiplier * self.width, _DECODER_BLOCKS, name=f'up_{level}')(h)
            if level == 1:
                h = Conv(multiplier * self.width, 3, name='up_1_upsample')(jnp.repeat(h, 2, axis=1))
        return FinalConv(self.out, name='final')(_nonlinearity(h))


class Level(nn.Module):
    """Residual blocks of one rate: `[B, T, any]` → `[B, T, width]`."""
    width: int
    blocks: int

    @nn.compact
    def __call__(self, h):
        for block in range(self.blocks):
            h = _clip(ResidualBlock(self.width, name=f'block_{block}')(h))
        return h


class Middle(nn.Module):
    """Block, attention, block: `[B, T, width]` → `[B, T, width]`."""
    width: int

    @nn.compact
    def __call__(self, h):
        h = ResidualBlock(self.width, name='block_1')(h)
        h = Attention(self.width, name='attn_1')(h)
        return ResidualBlock(self.width, name='block_2')(h)


class ResidualBlock(nn.Module):
    """x ← normalised x; sum of x and conv(act(conv(act(x)))), `[B, T, any]` → `[B, T, width]`."""
    width: int

    @nn.compact
    def __call__(self, x):
        x = _normalize(x)
        h = Conv(self.width, 3, name='conv1')(_nonlinearity(x))
        h = Conv(self.width, 3, name='conv2')(_nonlinearity(h))
        if x.shape[-1] != self.width:
            x = Conv(self.width, 1, name='nin_shortcut')(x)
        return _sum(x, h)


class Attention(nn.Module):
    """One head over the whole sequence, `[B, T, width]` → `[B, T, width]`; q, k, v of unit magnitude."""
    width: int

    @nn.compact
    def __call__(self, x):
        q, k, v = (_normalize(part) for part in jnp.split(Conv(3 * self.width, 1, name='qkv')(x), 3, axis=-1))
        weights = jax.nn.softmax(jnp.einsum('BTD,BSD->BTS', q, k) / math.sqrt(self.width), axis=-1)
        return _sum(x, Conv(self.width, 1, name='proj_out')(jnp.einsum('BTS,BSD->BTD', weights, v)))


class Downsample(nn.Module):
    """1×1 convolution, mean of neighbours, 1×1 convolution: `[B, T, width]` → `[B, T // 2, width]`."""
    width: int

    @nn.compact
    def __call__(self, h):
        h = Conv(self.width, 1, name='conv1')(h)
        length = h.shape[1] // 2
        h = h[:, :2 * length].reshape(h.shape[0], length, 2, self.width).mean(axis=2)
        return Conv(self.width, 1, name='conv2')(h)


class FinalConv(nn.Module):
    """The last convolution and its learned gain: `[B, T, D]` → `[B, T, out]`."""
    out: int

    @nn.compact
    def __call__(self, h):
        gain = self.param('learnable_gain', nn.initializers.zeros, ())
        return Conv(self.out, 3, name='conv_out')(h) * (1 + gain)


class Conv(nn.Module):
    """Zero-padded convolution without bias, `[B, T, D]` → `[B, T, out]`, kernel `[taps, D, out]`, already normalised."""
    out: int
    taps: int

    @nn.compact
    def __call__(self, x):
        fan_in = self.taps * x.shape[-1]
        kernel = self.param('kernel', nn.initializers.normal(1 / math.sqrt(fan_in)), (self.taps, x.shape[-1], self.out))
        if winograd.pays(kernel):
            return jax.lax.platform_dependent(x, kernel, cpu=winograd.conv, default=_convolve)
        return _convolve(x, kernel)


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The shifted inputs stand side by side in one matrix product: on CPU this is a quarter faster than XLA's convolution."""
    batch, length, _ = x.shape
    taps, channels, out = kernel.shape
    padded = jnp.pad(x, ((0, 0), (taps // 2, taps // 2), (0, 0)))
    shifts = jnp.concatenate([padded[:, tap:tap + length] for tap in range(taps)], axis=-1)
    return (shifts.reshape(batch * length, taps * channels) @ kernel.reshape(-1, out)).reshape(batch, length, out)


def _nonlinearity(x):
    """silu scaled so that a standard normal input has a second moment of one."""
    return x * jax.nn.sigmoid(x) / _SILU_GAIN


def _normalize(x):
    """x `[..., D]` over the root mean square of its channels."""
    return x / (_EPS + jnp.sqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True)))


def _sum(x, branch):
    """Weighted sum that keeps the magnitude of two independent inputs (EDM2, equation 88)."""
    return ((1 - _BRANCH) * x + _BRANCH * branch) / math.hypot(1 - _BRANCH, _BRANCH)


def _clip(x):
    return jnp.clip(x, -_CLIP, _CLIP)
