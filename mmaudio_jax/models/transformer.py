"""Pieces that the condition encoders share: patches, LayerNorm, attention, activations and the pre-norm block.

Letters: B batch, N (M) tokens, D width, H heads, K channels of a head. Parameters keep the dtype they are given; LayerNorm,
logits and softmax compute in float32, matrices in the field `dtype`. Source: Vision Transformer (arXiv 2010.11929).
"""
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

INIT = nn.initializers.normal(0.02)  # of what is not a matrix: tokens and positions


def patches(video: jax.Array, frames: int, size: int) -> jax.Array:
    """Cuts `[B, F, h, w, 3]` into boxes of `frames` · `size` · `size` pixels without overlap.

    Time, then rows, then columns, and the same order within a box: `[B, F/frames · h/size · w/size, frames · size · size · 3]`.
    """
    batch, length, height, width, channels = video.shape
    grid = (length // frames, height // size, width // size)
    boxes = video.reshape(batch, grid[0], frames, grid[1], size, grid[2], size, channels)
    return boxes.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(batch, math.prod(grid), -1)


class LayerNorm(nn.Module):
    """LayerNorm over the last axis with scale and bias, computed in float32: result of the dtype `dtype`."""
    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:]).astype(jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:]).astype(jnp.float32)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (normed * scale + bias).astype(self.dtype)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), Φ the normal distribution function, by erf (quicker on CPU than erfc, and exact enough)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | np.ndarray | None = None) -> jax.Array:
    """Softmax attention `[..., N, H, K]`, `[..., M, H, K]`, `[..., M, H, K]` → `[..., N, H, K]`.

    `mask` `[N, M]` is True where a query may look; None: everywhere.
    """
    q = q * np.asarray(q.shape[-1]**-0.5, q.dtype)
    logits = jnp.einsum('...NHK,...MHK->...HNM', q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, -jnp.inf)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum('...HNM,...MHK->...NHK', weights, v)


class Block(nn.Module):
    """x += proj(attention(norm1 x)); x += fc2(activation(fc1(norm2 x))): `[B, N, D]` → `[B, N, D]`, as nn.scan wants it.

    Attributes:
      num_heads: H. hidden: width of the MLP. eps: of both LayerNorms. activation: of the MLP.
      causal: a token sees itself and those before it.
      first_only: only the first token's result is computed, `[B, 1, D]`; it still sees all tokens.
      extra_key: one learned key and value more, which every token sees.
    """
    num_heads: int
    hidden: int
    eps: float
    activation: Any
    dtype: Any
    causal: bool = False
    first_only: bool = False
    extra_key: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, dtype=self.dtype, name='qkv')(LayerNorm(self.eps, self.dtype, name='norm1')(x))
        q, k, v = (part[:, :, 0] for part in jnp.split(qkv.reshape(batch, length, 3, self.num_heads, -1), 3, axis=2))
        if self.extra_key:
            shape = (1, 1, self.num_heads, width // self.num_heads)
            k, v = (jnp.concatenate([part, jnp.broadcast_to(self.param(name, INIT, shape).astype(part.dtype),
                                                            (batch, *shape[1:]))], axis=1)
                    for name, part in (('bias_k', k), ('bias_v', v)))
        if self.first_only:
            q, x = q[:, :1], x[:, :1]
        mixed = attention(q, k, v, np.tri(length, dtype=bool) if self.causal else None)
        x = x + nn.Dense(width, dtype=self.dtype, name='proj')(mixed.reshape(x.shape))
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name='fc1')(LayerNorm(self.eps, self.dtype, name='norm2')(x))
        return x + nn.Dense(width, dtype=self.dtype, name='fc2')(self.activation(hidden)), None


def repeat(block: type[nn.Module], depth: int) -> type[nn.Module]:
    """`block` scanned over `depth` sets of weights, which stand along the first axis of every parameter."""
    return nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True}, length=depth)
