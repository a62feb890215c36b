"""Layers of the flow network: convolution, gated MLP, normalisation, rotary positions, attention, time embedding.

Letters: B batch, N (M) tokens, D width, H heads, K channels of a head. Source: MMAudio (arXiv 2412.15322), section 3,
and the released checkpoints. Parameters are float32; norms, softmax, rotations and the time embedding compute in float32.
"""
import functools
import math
from typing import Any

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import folded
from mmaudio_jax.models import winograd

LAYER_NORM_EPS = 1e-5
RMS_NORM_EPS = float(np.finfo(np.float32).eps)
ROPE_THETA = 10_000.0
MLP_MULTIPLE = 256  # hidden widths are multiples of it
PRODUCT = 'product'  # the name of matrix products' results, for remat policies
TIME_INIT = nn.initializers.normal(0.02)  # the two matrices of the time embedding

Rotation = tuple[jax.Array, jax.Array]  # cosines and sines, each [N, K / 2], float32


def mlp_hidden(width: int) -> int:
    """Hidden width of the gated MLP: two thirds of 4 `width`, rounded up to a multiple of 256."""
    return -(-int(2 * 4 * width / 3) // MLP_MULTIPLE) * MLP_MULTIPLE


def conv_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """U(±1 / sqrt(fan in)) for a kernel `[taps, I, O]`."""
    bound = 1.0 / np.sqrt(shape[0] * shape[1])
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def conv1d(inputs: jax.Array, kernel: jax.Array, convolution: str) -> jax.Array:
    """Convolution along the tokens, zero padded to the same length.

    `inputs` `[B, N, I]`, `kernel` `[taps, I, O]` with an odd number of taps, result `[B, N, O]` in the dtype of `inputs`.
    `convolution` 'xla' is one operation, which TPUs run without moving anything: 5 % above the time of the bare products on
    v5e, where 'matmul' costs half as much again. 'xla_taps' is the same with a product for each tap in the kernel's gradient:
    with few clips a device the compiler then scatters its sum over fsdp, which it otherwise makes whole. 'matmul' is one
    matrix product, on CPUs the faster: the shifts are taken on the narrower side, of the inputs before the product or of its
    results after it. It is written so that the gradient is made of the same two forms (slices instead of the split would make
    it quadratic in the taps). 'winograd' is 'matmul' but for three or seven taps and channels enough for it to pay, and takes
    about half the multiplications there: for CPUs in float32.
    """
    taps, width, features = kernel.shape
    if taps == 1:
        return inputs @ kernel[0]
    if convolution == 'xla':
        return folded.conv(inputs, kernel)
    if convolution == 'xla_taps':
        return _convolve_by_taps(inputs, kernel)
    if convolution == 'winograd' and inputs.dtype == jnp.float32 and winograd.pays(kernel):
        return winograd.conv(inputs, kernel)
    if width <= features:  # dimensions are not merged here: each may be split over devices
        shifted = jnp.stack([_shift(inputs, offset) for offset in _offsets(taps)], axis=2)
        return jnp.tensordot(shifted, kernel, 2)
    products = jnp.tensordot(inputs, kernel, ((2,), (1,)))
    first, *others = [_shift(products[:, :, tap], offset) for tap, offset in enumerate(_offsets(taps))]
    return sum(others, first)


@jax.custom_vjp
def _convolve_by_taps(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """`folded.conv`, with a product for each tap in the kernel's gradient."""
    return folded.conv(inputs, kernel)


def _by_taps_forward(inputs, kernel):
    return folded.conv(inputs, kernel), (inputs, kernel)


def _by_taps_backward(residuals, cotangent):
    inputs, kernel = residuals
    _, pull = jax.vjp(lambda inputs: folded.conv(inputs, kernel), inputs)
    shifted = [_shift(inputs, offset) for offset in _offsets(len(kernel))]
    return *pull(cotangent), jnp.stack([jnp.einsum('BNI,BNO->IO', tokens, cotangent) for tokens in shifted])


_convolve_by_taps.defvjp(_by_taps_forward, _by_taps_backward)


def _offsets(taps: int) -> range:
    """Where each tap of an odd number of them reads, from the token of the result."""
    return range(-(taps // 2), taps // 2 + 1)


def _shift(tokens: jax.Array, offset: int) -> jax.Array:
    """tokens[:, n + offset] at place n, zeros beyond the ends: `[B, N, D]`."""
    return winograd.pad(tokens, -offset, tokens.shape[1])


class Conv(nn.Module):
    """Convolution along the tokens with bias: `[B, N, I]` to `[B, N, features]`, zero padded to the same length."""
    features: int
    taps: int
    dtype: Any
    convolution: str
    zero_init: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        shape = (self.taps, inputs.shape[-1], self.features)
        kernel = self.param('kernel', nn.initializers.zeros if self.zero_init else conv_init, shape)

        def bias_init(key, bias_shape):
            bound = 0.0 if self.zero_init else 1.0 / np.sqrt(shape[0] * shape[1])
            return jax.random.uniform(key, bias_shape, jnp.float32, -bound, bound)

        bias = self.param('bias', bias_init, (self.features,))
        result = conv1d(inputs.astype(self.dtype), kernel.astype(self.dtype), self.convolution) + bias.astype(self.dtype)
        return product(result)


def linear(features: int, dtype: Any, *, name: str | None = None) -> nn.Dense:
    """A matrix with bias: Xavier uniform and zeros."""
    return nn.Dense(features, dtype=dtype, kernel_init=nn.initializers.xavier_uniform(), name=name)


class Linears(nn.Module):
    """Several matrices with bias on the same inputs: `[B, N, D]` to `parts` arrays `[B, N, *features]`.

    `kernel` is `[parts, D, E]`, E the product of `features`, and `bias` `[parts, *features]`: TPUs hold the last two
    dimensions of an array in tiles of 8 × 128, which a part as a dimension next to E would leave mostly empty. Each part is a
    product of its own, so that what follows it can be fused to it. The results are cheaper to compute again than to keep.
    """
    parts: int
    features: tuple[int, ...]
    dtype: Any
    zero_init: bool = False

    @nn.compact
    def __call__(self, inputs: jax.Array) -> list[jax.Array]:
        shape = (self.parts, inputs.shape[-1], math.prod(self.features))
        kernel = self.param('kernel', nn.initializers.zeros if self.zero_init else _joint_xavier, shape).astype(self.dtype)
        bias = self.param('bias', nn.initializers.zeros, (self.parts, *self.features)).astype(self.dtype)
        inputs = inputs.astype(self.dtype)
        # split, not indices: its gradient is one concatenation
        results = [inputs @ matrix[0] for matrix in jnp.split(kernel, self.parts)]
        return [result.reshape(*result.shape[:2], *self.features) + part[0]
                for result, part in zip(results, jnp.split(bias, self.parts))]


def _joint_xavier(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Xavier uniform for `[parts, D, E]` as if the parts were one matrix of parts · E columns."""
    bound = np.sqrt(6 / (shape[1] + shape[0] * shape[2]))
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def product(array: jax.Array) -> jax.Array:
    """Marks the result of a matrix product for the remat policy 'dots'."""
    return checkpoint_name(array, PRODUCT)


class GatedMLP(nn.Module):
    """w2(silu(w1 x) · w3 x) without biases: `[B, N, D]` to `[B, N, D]`.

    The three maps are matrices (`taps` 1) or convolutions (`taps` 3 or 7): w1, w3 `[taps, D, hidden]`, w2 `[taps, hidden, D]`.
    """
    taps: int
    dtype: Any
    convolution: str

    @nn.compact
    def __call__(self, inputs: jax.Array) -> jax.Array:
        width = inputs.shape[-1]
        hidden = mlp_hidden(width)

        def convolve(name, values, features):
            kernel = self.param(name, self._init, (self.taps, values.shape[-1], features)).astype(self.dtype)
            return product(conv1d(values, kernel, self.convolution))

        inputs = inputs.astype(self.dtype)
        return convolve('w2', nn.silu(convolve('w1', inputs, hidden)) * convolve('w3', inputs, hidden), width)

    def _init(self, key, shape):
        if self.taps > 1:
            return conv_init(key, shape)
        return nn.initializers.xavier_uniform()(key, shape[1:])[None]


def layer_norm(inputs: jax.Array) -> jax.Array:
    """LayerNorm over the last axis without an affine part, eps 1e-5; float32.

    For bfloat16 inputs the variance is E[x²] − E[x]², which needs one pass over x instead of two: float32 loses by it only
    where the mean is so many deviations wide that the inputs themselves are rounded to less than one.
    """
    wide = inputs.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    if inputs.dtype == jnp.bfloat16:
        variance = jnp.maximum(jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean), 0)
    else:
        variance = jnp.square(wide - mean).mean(-1, keepdims=True)
    return (wide - mean) * jax.lax.rsqrt(variance + LAYER_NORM_EPS)


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
    frequencies = np.float32(scale) * (np.float32(1) / _power(ROPE_THETA, exponents))
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies[None]
    return jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))


def norm_and_rotate(inputs: jax.Array, scale: jax.Array, angles: Rotation) -> jax.Array:
    """`rms_norm`, then channel i turned with channel i + K / 2 of each head: `[B, N, H, K]` to the same, float32.

    The official pairs are neighbours (2i, 2i + 1). Attention does not see a permutation that q and k share, and halves are
    faster to compute, so the importer permutes the channels of q, k and their norms instead.
    """
    turned = jax.lax.platform_dependent(inputs, tpu=_turned_by_product, default=_turned)
    wide, turned = inputs.astype(jnp.float32), turned.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + RMS_NORM_EPS)
    cos, sin = (jnp.tile(table, 2)[:, None] for table in angles)
    return cos * (wide * inverse * scale) + sin * (turned * inverse * jnp.roll(scale, scale.size // 2))


def _turned(inputs: jax.Array) -> jax.Array:
    """Every pair (i, i + K / 2) by a right angle: `[B, N, H, K]`."""
    first, second = jnp.split(inputs, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _turned_by_product(inputs: jax.Array) -> jax.Array:
    """The same, exactly, by a matrix: TPUs move halves of a head more slowly than they multiply (4 % of a fused block)."""
    half = np.eye(inputs.shape[-1] // 2)
    matrix = np.block([[0 * half, half], [-half, 0 * half]])
    return jnp.dot(inputs, matrix.astype(inputs.dtype), precision=jax.lax.Precision.HIGHEST)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Softmax attention `[B, N, H, K]`, `[B, M, H, K]`, `[B, M, H, K]` to `[B, N, H · K]`; logits and softmax float32."""
    mixed = _attend(q * np.asarray(q.shape[-1]**-0.5, q.dtype), k, v)
    return mixed.reshape(*mixed.shape[:2], -1)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k) v `[B, N, H, K]` in the dtype of `v`: Σ_m exp(l_nm − max_m l_nm) v_m over the sum of the exponentials.

    What the backward pass needs of `[B, H, N, M]` are the exponentials, kept in the dtype of `v`: a block's largest array.
    The gradient takes Σ_m w_nm ∂w_nm as the product of the result and its gradient, over K instead of over M, so that that of
    the logits is made where ∂w is. It multiplies in the dtype of `q`: float32 by bfloat16 is as slow as float32.
    """
    return _attend_forward(q, k, v)[0]


def _attend_forward(q, k, v):
    logits = jnp.einsum('BNHK,BMHK->BHNM', q, k, preferred_element_type=jnp.float32)
    raised = jnp.exp(logits - logits.max(-1, keepdims=True))
    inverse = 1 / raised.sum(-1)  # [B, H, N]
    raised = raised.astype(v.dtype)
    mixed = jnp.einsum('BHNM,BMHK->BNHK', raised, v, preferred_element_type=jnp.float32)
    mixed = (mixed * _by_token(inverse)).astype(v.dtype)
    return mixed, (q, k, v, raised, inverse, mixed)


def _attend_backward(residual, gradient):
    q, k, v, raised, inverse, mixed = residual
    shared = jnp.einsum('BNHK,BNHK->BHN', gradient, mixed, preferred_element_type=jnp.float32)[..., None]
    weights = raised.astype(jnp.float32) * inverse[..., None]
    logits = jnp.einsum('BNHK,BMHK->BHNM', gradient, v, preferred_element_type=jnp.float32) - shared
    logits = (weights * logits).astype(q.dtype)
    scaled = (gradient * _by_token(inverse)).astype(v.dtype)
    return (jnp.einsum('BHNM,BMHK->BNHK', logits, k), jnp.einsum('BHNM,BNHK->BMHK', logits, q),
            jnp.einsum('BHNM,BNHK->BMHK', raised, scaled))


def _by_token(numbers: jax.Array) -> jax.Array:
    """`[B, H, N]` to `[B, N, H, 1]`."""
    return numbers.swapaxes(1, 2)[..., None]


_attend.defvjp(_attend_forward, _attend_backward)


def _power(base: float, exponents: np.ndarray) -> np.ndarray:
    """base ** exponents, float32, rounded once: NumPy's own float32 power is another last digit on another processor."""
    return np.power(np.float64(base), exponents.astype(np.float64)).astype(np.float32)


def time_frequencies(width: int, version: int) -> np.ndarray:
    """Frequencies of the time embedding `[width / 2]`, float32; version 2 counts time in ten-thousandths.

    Every operation is rounded to float32 in the order of the released weights: version 2 reaches angles of 10 000 rad, where
    another order of rounding changes the flow by a thousandth of its deviation.
    """
    exponents = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    frequencies = np.float32(1) / _power(10_000, exponents)
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
        linear_map = functools.partial(nn.Dense, self.width, kernel_init=TIME_INIT, precision=jax.lax.Precision.HIGHEST)
        return linear_map(name='second')(nn.silu(linear_map(name='first')(embedded)))
