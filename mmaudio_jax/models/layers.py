"""Layers of the flow network: convolution, gated MLP, normalisation, rotary positions, attention, time embedding.

Letters: B batch, N (M) tokens, D width, H heads, K channels of a head. Source: MMAudio (arXiv 2412.15322), section 3,
and the released checkpoints. Parameters are float32; norms, softmax, rotations and the time embedding compute in float32.
"""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)
ROPE_THETA = 10_000.0
MLP_MULTIPLE = 256  # hidden widths are multiples of it
TIME_INIT = nn.initializers.normal(0.02)  # the two matrices of the time embedding

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, each [N, K / 2], float32


def mlp_hidden(width: int) -> int:
    """Hidden width of the gated MLP: two thirds of 4 `width`, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // MLP_MULTIPLE) * MLP_MULTIPLE


def conv_init(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
    """U(±1 / sqrt(fan in)) for a kernel `[taps, I, O]`."""
    bound = 1.0 / np.sqrt(shape[0] * shape[1])
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def conv1d(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution along the tokens as one matrix product, zero padded to the same length.

    `inputs` `[B, N, I]`, `kernel` `[taps, I, …]` with an odd number of taps, result `[B, N, …]` in the dtype of `inputs`.
    The shifts are taken on the narrower side: of the inputs before the product, or of its results after it. Written so
    that the gradient is made of the same two forms (slices instead of the split would make it quadratic in the taps).
    """
    taps, width, *features = kernel.shape
    offsets = range(-(taps // 2), taps // 2 + 1)
    if width <= math.prod(features):  # dimensions are not merged here: each may be split over devices
        shifted = jnp.stack([_shift(inputs, offset) for offset in offsets], axis=2)
        return jnp.tensordot(shifted, kernel, 2)
    products = jnp.tensordot(inputs, kernel, ((2,), (1,)))
    first, *others = [_shift(products[:, :, tap], offset) for tap, offset in enumerate(offsets)]
    return sum(others, first)


def _shift(tokens: jax.Array, offset: int) -> jax.Array:
    """tokens[:, n + offset] at place n, zeros beyond the ends: `[B, N, D]`."""
    return jax.lax.pad(tokens, jnp.zeros((), tokens.dtype), ((0, 0, 0), (-offset, offset, 0), (0, 0, 0)))


class Conv(nn.Module):
    """Convolution along the tokens with bias: `[B, N, I]` to `[B, N, features]`, zero padded to the same length."""
    features: int
    taps: int
    dtype: Any
    zero_init: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        shape = (self.taps, inputs.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.zeros if self.zero_init else conv_init, shape)

        def bias_init(key, bias_shape):
            bound = 0.0 if self.zero_init else 1.0 / np.sqrt(shape[0] * shape[1])
            return jax.random.uniform(key, bias_shape, jnp.float32, -bound, bound)

        bias = self.param('bias', bias_init, (self.features,))
        return conv1d(inputs.astype(self.dtype), kernel.astype(self.dtype)) + bias.astype(self.dtype)


def linear(features: int | tuple[int, ...], dtype: Any, *, zero_init: bool = False, name: str | None = None) -> nn.DenseGeneral:
    """A matrix with bias, from the last axis to `features`: Xavier uniform (or zeros) and zeros."""
    kernel_init = nn.initializers.zeros if zero_init else nn.initializers.xavier_uniform()
    return nn.DenseGeneral(features, dtype=dtype, kernel_init=kernel_init, name=name)


class GatedMLP(nn.Module):
    """w2(silu(w1 x) · w3 x) without biases: `[B, N, D]` to `[B, N, D]`.

    The three maps are matrices (`taps` 1) or convolutions (`taps` 3 or 7). `w13` `[taps, D, 2, hidden]` holds w1 and w3.
    """
    taps: int
    dtype: Any

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        width = inputs.shape[-1]
        hidden = mlp_hidden(width)
        w13 = self.param('w13', self._w13_init, (self.taps, width, 2, hidden)).astype(self.dtype)
        w2 = self.param('w2', self._init, (self.taps, hidden, width)).astype(self.dtype)
        gate, value = jnp.moveaxis(conv1d(inputs.astype(self.dtype), w13), 2, 0)
        return conv1d(nn.silu(gate) * value, w2)

    def _init(self, key, shape):
        if self.taps > 1:
            return conv_init(key, shape)
        return nn.initializers.xavier_uniform()(key, shape[1:])[None]

    def _w13_init(self, key, shape):
        half = (*shape[:-2], shape[-1])
        return jnp.stack([self._init(part, half) for part in jax.random.split(key)], axis=-2)


def layer_norm(inputs: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without an affine part, eps 1e-5; float32."""
    inputs = inputs.astype(jnp.float32)
    centred = inputs - inputs.mean(-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + LAYER_NORM_EPS)


def rms_norm(inputs: jax.Array, scale: jax.Array) -> jax.Array:
    """RMSNorm over the last axis, eps 1.19e-7; float32."""
    inputs = inputs.astype(jnp.float32)
    return inputs * jax.lax.rsqrt(jnp.square(inputs).mean(-1, keepdims=True) + RMS_NORM_EPS) * scale


def modulate(inputs: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """adaLN: layer_norm(inputs) · (1 + scale) + shift in the dtype of `shift`; `[B, N, D]`, conditions `[B, N or 1, D]`."""
    normed = layer_norm(inputs)
    return (normed * (1 + scale.astype(jnp.float32)) + shift.astype(jnp.float32)).astype(shift.dtype)


def rotation(length: int, head_size: int, scale: float) -> Rotation:
    """Angles of rotary positions 0 … length − 1, frequencies times `scale`: cosines and sines `[N, K / 2]`, float32."""
    exponents = np.arange(0, head_size, 2, dtype=np.float32) / np.float32(head_size)
    frequencies = np.float32(scale) * (np.float32(1) / np.float32(ROPE_THETA)**exponents)
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None]
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def rotate(inputs: jax.Array, angles: Rotation) -> jax.Array:
    """Rotates channel i with channel i + K / 2 of each head: `[B, N, H, K]` float32.

    The official pairs are neighbours (2i, 2i + 1). Attention does not see a permutation that q and k share, and halves are
    faster to compute, so the importer permutes the channels of q, k and their norms instead.
    """
    cos, sin = (table[:, None] for table in angles)
    first, second = jnp.split(inputs, 2, axis=-1)
    return jnp.concatenate([cos * first - sin * second, sin * first + cos * second], axis=-1)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention `[B, N, H, K]`, `[B, M, H, K]`, `[B, M, H, K]` to `[B, N, H · K]`; logits and softmax float32."""
    q = q * np.asarray(q.shape[-1]**-0.5, q.dtype)
    logits = jnp.einsum('BNHK,BMHK->BHNM', q, k, preferred_element_type=jnp.float32)
    weights = nn.softmax(logits, axis=-1).astype(v.dtype)
    mixed = jnp.einsum('BHNM,BMHK->BNHK', weights, v)
    return mixed.reshape(*mixed.shape[:2], -1)


def time_frequencies(width: int, version: int) -> np.ndarray:
    """Frequencies of the time embedding `[width / 2]`, float32; version 2 counts time in ten-thousandths.

    Every operation is rounded to float32 in the order of the released weights: version 2 reaches angles of 10 000 rad, where
    another order of rounding changes the flow by a thousandth of its deviation.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1) / np.float32(10_000)**exponents
    return frequencies * np.float32(10_000) if version == 2 else frequencies


class TimeEmbedding(nn.Module):
    """Times `[B]` in [0, 1] (0 noise, 1 data) to `[B, D]`: cosines, sines, Linear, SiLU, Linear; float32 throughout."""
    width: int
    version: int

    @nn.compact
    def __call__(self, t: jax.Array) -> jax.Array:
        inputs = 256 if self.version == 1 else self.width
        angles = t.astype(jnp.float32)[:, None] * time_frequencies(inputs, self.version)[None]
        embedded = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
        hidden = nn.Dense(self.width, kernel_init=TIME_INIT, name='first')(embedded)
        return nn.Dense(self.width, kernel_init=TIME_INIT, name='second')(nn.silu(hidden))
