"""Pieces that the condition encoders share: patches, LayerNorm, attention, activations and the pre-norm block.

Letters: B batch, N (M) tokens, D width, H heads, K channels of a head. Parameters keep the dtype they are given; LayerNorm,
logits and softmax compute in float32, matrices in the field `dtype`. Source: Vision Transformer (arXiv 2010.11929).
"""
from collections.abc import Iterable
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

_CACHED_LOGITS = 2**21  # float32 numbers that stay in a CPU's last cache
_NORM_FLOOR = 1e-12  # of the length that features are divided by
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


class Linear(nn.Module):
    """x `[..., D]` · kernel `[D, features]` + bias, in the dtype `dtype`."""
    features: int
    dtype: Any

    @nn.compact
    def weights(self, width: int) -> tuple[jax.Array, jax.Array]:
        """Kernel and bias for inputs of that width."""
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (width, self.features))
        bias = self.param('bias', nn.initializers.zeros, (self.features,))
        return kernel.astype(self.dtype), bias.astype(self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights(x.shape[-1])
        return x @ kernel + bias


def split_heads(qkv: jax.Array, num_heads: int) -> list[jax.Array]:
    """q, k, v `[B, N, H, K]` of `[B, N, 3 · D]`."""
    return jnp.split(qkv.reshape(*qkv.shape[:2], 3 * num_heads, -1), 3, axis=2)


def heads(x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int) -> list[jax.Array]:
    """q, k, v `[B, N, H, K]` of x `[B, N, D]` by kernel `[D, 3 · D]` and bias; on TPUs head by head, not copied into place."""
    def at_once(x, kernel, bias):
        return split_heads(x @ kernel + bias, num_heads)

    def by_head(x, kernel, bias):
        kernels, biases = kernel.reshape(len(kernel), 3, num_heads, -1), bias.reshape(3, num_heads, 1, -1)
        return [(jnp.einsum('BND,DHK->BHNK', x, kernels[:, part]) + biases[part]).swapaxes(1, 2) for part in range(3)]

    return jax.lax.platform_dependent(x, kernel, bias, tpu=by_head, default=at_once)


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x)."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: jax.Array) -> jax.Array:
    """x · Φ(x), Φ the normal distribution function, by erf (quicker on CPU than erfc, and exact enough)."""
    return x * (0.5 + 0.5 * jax.lax.erf(x * math.sqrt(0.5)))


def of_length_one(x: jax.Array) -> jax.Array:
    """x `[..., D]` over its Euclidean length, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), _NORM_FLOOR)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: np.ndarray | jax.Array | None = None,
              extra: Iterable[jax.Array] | None = None) -> jax.Array:
    """Softmax attention `[..., N, H, K]`, `[..., M, H, K]`, `[..., M, H, K]` → `[..., N, H, K]`.

    `mask`, which broadcasts to `[..., H, N, M]`, is True where a query may look; None: everywhere. `extra`: key and value
    `[..., H, K]` of one token more, which every query sees; apart from the others, because one more would make them uneven.
    """
    q = (q * np.asarray(q.shape[-1]**-0.5, q.dtype)).swapaxes(-2, -3)
    arrays = {'q': q, 'k': k.swapaxes(-2, -3), 'v': v.swapaxes(-2, -3)}
    if mask is not None:
        arrays['mask'] = jnp.broadcast_to(mask, (*q.shape[:-1], k.shape[-3]))
    if extra is not None:
        arrays |= zip(('extra_k', 'extra_v'), (part[..., None, :] for part in extra))
    flat = {name: array.reshape(-1, *array.shape[-3:]) for name, array in arrays.items()}
    return jax.lax.platform_dependent(flat, cpu=_in_parts, default=_mix).reshape(q.shape).swapaxes(-2, -3)


def _mix(arrays: dict[str, jax.Array]) -> jax.Array:
    """Attention of scaled queries `[..., N, K]` over `[..., M, K]`; the sum of the weights is divided out at the end."""
    q, v = arrays['q'], arrays['v']
    logits = jnp.einsum('...NK,...MK->...NM', q, arrays['k'], preferred_element_type=jnp.float32)
    if 'mask' in arrays:
        logits = jnp.where(arrays['mask'], logits, -jnp.inf)
    highest = logits.max(-1, keepdims=True)
    weights = jnp.exp(logits - highest).astype(v.dtype)
    mixed = jnp.einsum('...NM,...MK->...NK', weights, v, preferred_element_type=jnp.float32)
    total = weights.sum(-1, keepdims=True, dtype=jnp.float32)
    if 'extra_k' in arrays:
        logit = jnp.einsum('...NK,...MK->...NM', q, arrays['extra_k'], preferred_element_type=jnp.float32)
        top = jnp.maximum(highest, logit)
        share, weight = jnp.exp(highest - top), jnp.exp(logit - top)
        mixed, total = mixed * share + weight * arrays['extra_v'].astype(jnp.float32), total * share + weight
    return (mixed / total).astype(v.dtype)


def _in_parts(arrays: dict[str, jax.Array]) -> jax.Array:
    """_mix part after part, so that the logits of a part stay in the cache: on CPU a tenth of CLIP's time.

    One flat axis of products: with several, XLA on CPU takes up to four times as long.
    """
    shape, keys = arrays['q'].shape, arrays['k'].shape[-2]
    flat = {name: array.reshape(-1, *array.shape[-2:]) for name, array in arrays.items()}
    number = len(flat['q'])
    most = max(1, _CACHED_LOGITS // (shape[-2] * keys))
    part = max(size for size in range(1, min(most, number) + 1) if number % size == 0)
    if part == number:
        return _mix(flat).reshape(shape)
    parts = {name: array.reshape(-1, part, *array.shape[1:]) for name, array in flat.items()}
    return jax.lax.map(_mix, parts).reshape(shape)


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
        _, length, width = x.shape
        qkv, normed = Linear(3 * width, self.dtype, name='qkv'), LayerNorm(self.eps, self.dtype, name='norm1')(x)
        if self.first_only:
            if self.extra_key:
                raise ValueError('a block with an extra key computes all tokens: first_only must be False')
            mixed = read(normed[:, 0], normed[:, 1:], *qkv.weights(width), self.num_heads)[:, None]
            x = x[:, :1]
        else:
            q, k, v = heads(normed, *qkv.weights(width), self.num_heads)
            extra = [self._extra(q, name) for name in ('bias_k', 'bias_v')] if self.extra_key else None
            mixed = attention(q, k, v, np.tri(length, dtype=bool) if self.causal else None, extra).reshape(x.shape)
        x = x + Linear(width, self.dtype, name='proj')(mixed)
        hidden = Linear(self.hidden, self.dtype, name='fc1')(LayerNorm(self.eps, self.dtype, name='norm2')(x))
        return x + Linear(width, self.dtype, name='fc2')(self.activation(hidden)), None

    def _extra(self, q: jax.Array, name: str) -> jax.Array:
        """The learned key or value for queries `[B, N, H, K]`: `[B, H, K]`."""
        extra = self.param(name, INIT, (1, 1, *q.shape[2:])).astype(q.dtype)
        return jnp.broadcast_to(extra[0], (len(q), *q.shape[2:]))


def read(token: jax.Array, x: jax.Array, kernel: jax.Array, bias: jax.Array, num_heads: int) -> jax.Array:
    """What a token `[B, D]` reads from itself and from others `[B, M, D]` by attention: `[B, D]`, without their k and v.

    q · (x Wk + bk) = (Wk q) · x + q · bk, of which the last term is the same for all and softmax does not see it; and the
    weights add up to one, so that the mean of x Wv + bv is (mean of x) Wv + bv.
    """
    wq, wk, wv = jnp.split(kernel.reshape(len(kernel), 3 * num_heads, -1), 3, axis=1)
    bq, _, bv = jnp.split(bias.reshape(3 * num_heads, -1), 3)
    q = (jnp.einsum('BD,DHK->BHK', token, wq) + bq) * np.asarray(bq.shape[-1]**-0.5, x.dtype)
    q = jnp.einsum('BHK,DHK->BHD', q, wk)
    own = jnp.einsum('BHD,BD->BH', q, token, preferred_element_type=jnp.float32)[..., None]
    logits = jnp.einsum('BHD,BMD->BHM', q, x, preferred_element_type=jnp.float32)
    top = jnp.maximum(logits.max(-1, keepdims=True), own)
    weights, own = jnp.exp(logits - top).astype(x.dtype), jnp.exp(own - top).astype(x.dtype)
    mixed = jnp.einsum('BHM,BMD->BHD', weights, x, preferred_element_type=jnp.float32) + own * token[:, None]
    means = (mixed / (weights.sum(-1, keepdims=True, dtype=jnp.float32) + own)).astype(x.dtype)
    return (jnp.einsum('BHD,DHK->BHK', means, wv) + bv).reshape(token.shape)


def repeat(block: type[nn.Module], depth: int) -> type[nn.Module]:
    """`block` scanned over `depth` sets of weights, which stand along the first axis of every parameter."""
    return nn.scan(block, variable_axes={'params': 0}, split_rngs={'params': True}, length=depth)
