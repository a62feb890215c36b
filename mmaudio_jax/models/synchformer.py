"""Synchformer's visual encoder: segments of 16 frames at 25 fps → 8 tokens each, which tell when things happen.

Source: Synchformer (arXiv 2401.16423), section 3; its backbone is Motionformer's variant with divided attention (TimeSformer,
arXiv 2102.05095). Letters: B segments, T time steps of two frames, P patches of a frame, D width, H heads, K head channels.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import transformer

VARIANTS: dict[str, dict[str, Any]] = {
    'visual': dict(image_size=224, patch_size=16, frames=16, frames_per_step=2, width=768, num_heads=12, depth=12),
}
LAYER_NORM_EPS = 1e-6
MLP_RATIO = 4


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
        positions = (temporal[:, None] + spatial[1:]).reshape(steps * places, self.width)
        first = jnp.broadcast_to((class_token + spatial[0]).astype(self.dtype), (len(x), 1, self.width))
        x = jnp.concatenate([first, x + positions.astype(self.dtype)], axis=1)
        blocks = transformer.repeat(DividedBlock, self.depth)(steps, self.num_heads, self.dtype, name='blocks')
        x, _ = blocks(x)
        x = transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name='norm')(x[:, 1:])
        return self._summarize(x.reshape(-1, places, self.width)).reshape(-1, steps, self.width)

    def _summarize(self, x: jax.Array) -> jax.Array:
        """The patches of one time step, `[B, P, D]`, in one token: float32 `[B, D]`."""
        token = self.param('summary_token', transformer.INIT, (self.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, self.width)), x], axis=1)
        block = transformer.Block(self.num_heads, MLP_RATIO * self.width, LAYER_NORM_EPS, transformer.gelu, self.dtype,
                                  first_only=True, name='summary')
        return block(x)[0][:, 0].astype(jnp.float32)


class DividedBlock(nn.Module):
    """Attention over time, attention over space, MLP, each on the LayerNorm of the sum so far: `[B, 1 + T · P, D]`."""
    steps: int
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, None]:
        width = x.shape[-1]

        def norm(name):
            return transformer.LayerNorm(LAYER_NORM_EPS, self.dtype, name=name)

        x = x + DividedAttention(self.steps, 'time', self.num_heads, self.dtype, name='time')(norm('norm_time')(x))
        x = x + DividedAttention(self.steps, 'space', self.num_heads, self.dtype, name='space')(norm('norm_space')(x))
        hidden = transformer.gelu(transformer.Linear(MLP_RATIO * width, self.dtype, name='fc1')(norm('norm_mlp')(x)))
        return x + transformer.Linear(width, self.dtype, name='fc2')(hidden), None


class DividedAttention(nn.Module):
    """The class token sees all tokens; a patch sees the class token and its own place over time, or its own time step.

    `[B, 1 + T · P, D]` → `[B, 1 + T · P, D]`; axis is 'time' or 'space'.
    """
    steps: int
    axis: str
    num_heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        q, k, v = transformer.split_heads(transformer.Linear(3 * width, self.dtype, name='qkv')(x), self.num_heads)
        whole = transformer.attention_of_one(q[:, :1], k, v)
        mixed = transformer.attention(self._groups(q), self._keys(k), self._keys(v))
        if self.axis == 'time':
            mixed = mixed.swapaxes(1, 2)
        mixed = jnp.concatenate([whole.reshape(batch, 1, width), mixed.reshape(batch, length - 1, width)], axis=1)
        return transformer.Linear(width, self.dtype, name='proj')(mixed)

    def _groups(self, part: jax.Array) -> jax.Array:
        """The patches of `[B, 1 + T · P, H, K]` by those that see each other: `[B, T, P, H, K]`, or `[B, P, T, H, K]`."""
        batch, length, heads, channels = part.shape
        grid = part[:, 1:].reshape(batch, self.steps, (length - 1) // self.steps, heads, channels)
        return grid.swapaxes(1, 2) if self.axis == 'time' else grid

    def _keys(self, part: jax.Array) -> jax.Array:
        """The groups with the class token before each."""
        groups = self._groups(part)
        first = jnp.broadcast_to(part[:, None, :1], (*groups.shape[:2], 1, *part.shape[2:]))
        return jnp.concatenate([first, groups], axis=2)
