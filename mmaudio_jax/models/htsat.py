"""HTSAT (base): 10 s of log-mel as a square picture through a Swin transformer → 1 024 values. LAION-CLAP's sound network.

Sources: HTS-AT (arXiv 2202.00874), Swin (arXiv 2103.14030), LAION-CLAP (arXiv 2211.06687). float32.
Letters: B batch, N tokens of a window, D width, H heads.
"""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import spectrograms
from mmaudio_jax.models import transformer

SPECTRUM, MEL_BINS = 513, 64
FRAMES = 1001  # of 10 s
SIDE = 256  # of the picture
WINDOW = 8
_FOLD = SIDE // MEL_BINS  # stretches of time, one above the other
_CUBIC = -0.75  # a of the bicubic kernel
_EPS = 1e-5
_MASKED = -100.0  # added to the logits of pairs that are no neighbours
_DB_FLOOR = 1e-10


class HTSAT(nn.Module):
    """Power spectrogram of 10 s `[B, 1001, 513]` (filterbanks.clap_power) → `[B, 8 width]`. Mel filters are a parameter."""
    width: int = 128
    depths: tuple[int, ...] = (2, 2, 12, 2)
    heads: tuple[int, ...] = (4, 8, 16, 32)

    @nn.compact
    def __call__(self, power: jax.Array) -> jax.Array:
        filters = self.param('mel_filters', nn.initializers.zeros, (SPECTRUM, MEL_BINS))
        mel = 10 * jnp.log10(jnp.maximum(power @ filters, _DB_FLOOR))
        x = picture(spectrograms.BatchNorm(name='bn0')(mel))[..., None]
        x = nn.Conv(self.width, (4, 4), (4, 4), 'VALID', name='patches')(x)
        x = spectrograms.norm(_EPS, 'patch_norm')(x)
        for stage, (depth, heads) in enumerate(zip(self.depths, self.heads)):
            for block in range(depth):
                shift = WINDOW // 2 if block % 2 and x.shape[1] > WINDOW else 0
                x = SwinBlock(heads, shift, name=f'stage_{stage}_block_{block}')(x)
            if stage < len(self.depths) - 1:
                x = Merge(name=f'stage_{stage}_merge')(x)
        x = spectrograms.norm(_EPS, 'norm')(x)
        return x.mean(axis=(1, 2))


class SwinBlock(nn.Module):
    """x += window attention(norm1 x); x += mlp(norm2 x): `[B, h, w, D]` → `[B, h, w, D]`, h and w multiples of 8."""
    heads: int
    shift: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        h = spectrograms.norm(_EPS, 'norm1')(x)
        h = jnp.roll(h, (-self.shift, -self.shift), axis=(1, 2))
        h = WindowAttention(self.heads, self.shift, name='attn')(h)
        x = x + jnp.roll(h, (self.shift, self.shift), axis=(1, 2))
        h = nn.Dense(spectrograms.MLP_RATIO * width, name='fc1')(spectrograms.norm(_EPS, 'norm2')(x))
        return x + nn.Dense(width, name='fc2')(transformer.gelu(h))


class WindowAttention(nn.Module):
    """Attention within windows of 8 × 8, with a learned bias for every difference of places: `[B, h, w, D]` → the same."""
    heads: int
    shift: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, height, width, channels = x.shape
        rows, columns, tokens = height // WINDOW, width // WINDOW, WINDOW * WINDOW
        x = x.reshape(batch, rows, WINDOW, columns, WINDOW, channels).swapaxes(2, 3).reshape(-1, tokens, channels)
        qkv = nn.Dense(3 * channels, name='qkv')(x).reshape(-1, tokens, 3, self.heads, channels // self.heads)
        q, k, v = qkv[:, :, 0] * (channels // self.heads)**-0.5, qkv[:, :, 1], qkv[:, :, 2]
        table = self.param('positions', transformer.INIT, ((2 * WINDOW - 1)**2, self.heads))
        logits = jnp.einsum('BNHK,BMHK->BHNM', q, k) + table[_differences()].transpose(2, 0, 1)
        if self.shift:
            logits = logits.reshape(batch, rows * columns, self.heads, tokens, tokens)
            logits = (logits + _mask(height, width, self.shift)[:, None]).reshape(-1, self.heads, tokens, tokens)
        x = jnp.einsum('BHNM,BMHK->BNHK', nn.softmax(logits, axis=-1), v).reshape(-1, tokens, channels)
        x = nn.Dense(channels, name='proj')(x)
        x = x.reshape(batch, rows, columns, WINDOW, WINDOW, channels).swapaxes(2, 3)
        return x.reshape(batch, height, width, channels)


class Merge(nn.Module):
    """2 × 2 neighbours → one token of twice the width: `[B, h, w, D]` → `[B, h/2, w/2, 2D]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        corners = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        x = spectrograms.norm(_EPS, 'norm')(jnp.concatenate(corners, axis=-1))
        return nn.Dense(x.shape[-1] // 2, use_bias=False, name='reduction')(x)


def picture(mel: jax.Array) -> jax.Array:
    """Log-mel `[B, 1001, 64]` → `[B, 256, 256]`: time stretched to 1024, its four quarters stacked along frequency."""
    places, weights = _stretch(mel.shape[1], _FOLD * SIDE)
    stretched = jnp.einsum('BTKM,TK->BTM', mel[:, places], weights)
    return stretched.reshape(-1, _FOLD, SIDE, MEL_BINS).swapaxes(2, 3).reshape(-1, SIDE, SIDE)


@functools.cache
def _stretch(length: int, target: int) -> tuple[np.ndarray, np.ndarray]:
    """Cubic interpolation with the first and last samples in place, edges repeated: indices and weights, each [target, 4]."""
    at = np.arange(target) * (length - 1) / (target - 1)
    first = np.floor(at).astype(int)
    distance = np.abs((at - first)[:, None] - np.arange(-1, 3))
    near = ((_CUBIC + 2) * distance - (_CUBIC + 3)) * distance**2 + 1
    far = _CUBIC * (((distance - 5) * distance + 8) * distance - 4)
    places = np.clip(first[:, None] + np.arange(-1, 3), 0, length - 1)
    return places, np.where(distance <= 1, near, far).astype(np.float32)


@functools.cache
def _differences() -> np.ndarray:
    """Row of the bias table for each pair of places in a window, [N, N]."""
    row, column = np.divmod(np.arange(WINDOW * WINDOW), WINDOW)
    down, across = np.subtract.outer(row, row) + WINDOW - 1, np.subtract.outer(column, column) + WINDOW - 1
    return down * (2 * WINDOW - 1) + across


@functools.cache
def _mask(height: int, width: int, shift: int) -> np.ndarray:
    """What is added to the logits: after the roll, windows at the far edges hold what was not together. [windows, N, N]."""
    regions = [np.digitize(np.arange(size), [size - WINDOW, size - shift]) for size in (height, width)]
    region = regions[0][:, None] * 3 + regions[1]
    region = region.reshape(height // WINDOW, WINDOW, width // WINDOW, WINDOW).swapaxes(1, 2).reshape(-1, WINDOW * WINDOW)
    return np.where(region[:, :, None] == region[:, None], 0, _MASKED).astype(np.float32)
