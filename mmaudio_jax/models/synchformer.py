"""Synchformer's visual encoder: segments of 16 frames at 25 fps → 8 tokens each, which tell when things happen.

Source: Synchformer (arXiv 2401.16423), section 3; its backbone is Motionformer's variant with divided attention (TimeSformer,
arXiv 2102.05095). Letters: B segments, T time steps of two frames, P patches of a frame, D width, H heads, K head channels.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import transformer

VARIANTS: dict[str, dict[str, Any]] = {
    'visual': dict(image_size=224, patch_size=16, frames=16, frames_per_step=2, width=768, num_heads=12, depth=12),
}
LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4
_PLACES_TOGETHER = 14  # at most so many are one product of attention over time
Tokens = tuple[jax.Array, ...]  # patches [B, T, P, D] and class token [B, D], apart: one token more would be uneven


def build(variant: str, dtype: Any) -> 'VisualEncoder':
    """The encoder of that name; `dtype` is the compute dtype.

    Raises:
      ValueError: an unknown variant.
    """
    if variant not in VARIANTS:
        raise ValueError(f'Synchformer variant {variant!r} is not one of {", ".join(VARIANTS)}')
    return VisualEncoder(**VARIANTS[variant], dtype=dtype)


def normalize(frames: jax.Array) -> jax.Array:
    """uint8 `[..., h, w, 3]` → float32 in [-1, 1], as the encoder takes them."""
    return (frames.astype(jnp.float32) / 255 - 0.5) / 0.5


class VisualEncoder(nn.Module):
    """Normalised segments `[B, frames, image_size, image_size, 3]` → float32 `[B, T, D]`.

    Attributes:
      image_size, patch_size: pixels a side. frames: of a segment. frames_per_step: frames / T.
      width: D. num_heads: H. depth: number of divided blocks.
      dtype: compute dtype; LayerNorm, softmax and the result are float32.
    """
    image_size: int
    patch_size: int
    frames: int
    frames_per_step: int
    width: int
    num_heads: int
    depth: int
    dtype: Any

    @nn.compact
    def __call__(self, segments: jax.Array) -> jax.Array:
        steps, places = self.frames // self.frames_per_step, (self.image_size // self.patch_size)**2
        pixels = transformer.patches(segments, self.frames_per_step, self.patch_size).astype(self.dtype)
        x = transformer.Linear(self.width, self.dtype, name='patches')(pixels)
        class_token = self.param('class_token', transformer.INIT, (self.width,))
        spatial = self.param('spatial_positions', transformer.INIT, (1 + places, self.width))
        temporal = self.param('temporal_positions', transformer.INIT, (steps, self.width))
        positions = (temporal[:, None] + spatial[1:]).astype(self.dtype)
        x = x.reshape(len(x), steps, places, self.width) + positions
        first = jnp.broadcast_to((class_token + spatial[0]).astype(self.dtype), (len(x), self.width))
        blocks = transformer.repeat(DividedBlock, self.depth)(self.num_heads, self.dtype, name='blocks')
        (x, _), _ = blocks((x, first))
        x = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm')(x)
        return self._summarize(x.reshape(-1, places, self.width)).reshape(-1, steps, self.width)

    def _summarize(self, x: jax.Array) -> jax.Array:
        """The patches of one time step, `[B, P, D]`, in one token: float32 `[B, D]`."""
        token = self.param('summary_token', transformer.INIT, (self.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        block = transformer.Block(self.num_heads, MLP_RATIO * self.width, LAYER_NORM_EPS, transformer.gelu, self.dtype,
                                  first_only=True, name='summary')
        return block(x)[0][:, 0].astype(jnp.float32)


class DividedBlock(nn.Module):
    """Attention over time, attention over space, MLP, each on the LayerNorm of the sum so far: of patches and class token."""
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens) -> tuple[Tokens, None]:
        for axis in ('time', 'space'):
            norm = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name=f'norm_{axis}')
            mixed = DividedAttention(axis, self.num_heads, self.dtype, name=axis)(tuple(norm(x) for x in tokens))
            tokens = tuple(x + more for x, more in zip(tokens, mixed))
        width = tokens[0].shape[-1]
        norm = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm_mlp')
        fc1 = transformer.Linear(MLP_RATIO * width, self.dtype, name='fc1')
        fc2 = transformer.Linear(width, self.dtype, name='fc2')
        return tuple(x + fc2(transformer.gelu(fc1(norm(x)))) for x in tokens), None


class DividedAttention(nn.Module):
    """The class token sees all tokens; a patch sees the class token and its own place over time, or its own time step.

    Patches `[B, T, P, D]` and class token `[B, D]` → the same; axis is 'time' or 'space'. Over time, several places are one
    product of which a mask leaves each place its own: eight tokens alone would be small for a matrix unit.
    """
    axis: str
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, tokens: Tokens) -> Tokens:
        x, first = tokens
        batch, steps, places, width = x.shape
        kernel, bias = transformer.Linear(3 * width, self.dtype, name='qkv').weights(width)
        proj = transformer.Linear(width, self.dtype, name='proj')
        if self.axis == 'time':
            together = max(size for size in range(1, _PLACES_TOGETHER + 1) if places % size == 0)
            groups = x.swapaxes(1, 2).reshape(-1, together * steps, width)
            mask = np.kron(np.eye(together), np.ones((steps, steps))) > 0
        else:
            groups, mask = x.reshape(-1, places, width), None
        q, k, v = transformer.heads(groups, kernel, bias, self.num_heads)
        _, *first_kv = transformer.split_heads((first @ kernel + bias)[:, None], self.num_heads)
        extra = [part[:, 0].repeat(len(groups) // batch, axis=0) for part in first_kv]
        mixed = proj(transformer.attention(q, k, v, mask, extra).reshape(groups.shape))
        if self.axis == 'time':
            mixed = mixed.reshape(batch, places, steps, width).swapaxes(1, 2)
        whole = transformer.read(first, x.reshape(batch, -1, width), kernel, bias, self.num_heads)
        return mixed.reshape(x.shape), proj(whole)
