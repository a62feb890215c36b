"""Pieces that the evaluation networks share: fixed batch normalisation, overlapping patches, learned tokens in front.

Letters: B batch, N tokens, D width. float32: these networks are measuring instruments and are never trained here.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import transformer

BATCH_NORM_EPS = 1e-5
MLP_RATIO = 4
PATCH, STRIDE = 16, 10  # bins and frames


class BatchNorm(nn.Module):
    """(x − mean) / √(var + 1e-5) · scale + bias over the last axis, all four parameters: `[..., D]` → `[..., D]`."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1],)
        scale, var = (self.param(name, nn.initializers.ones, shape) for name in ('scale', 'var'))
        bias, mean = (self.param(name, nn.initializers.zeros, shape) for name in ('bias', 'mean'))
        gain = scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)
        return x * gain + (bias - mean * gain)


class Patches(nn.Module):
    """Patches of 16 bins × 16 frames, 10 apart, through a matrix: log-mel `[B, T, M]` → `[B, places in M, places in T, D]`."""
    width: int
    use_bias: bool

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        picture = mel.swapaxes(1, 2)[..., None]
        return nn.Conv(self.width, (PATCH, PATCH), (STRIDE, STRIDE), 'VALID', use_bias=self.use_bias, name='conv')(picture)


def prepend(x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Tokens `[M, D]` in front of every row of `[B, N, D]`."""
    return jnp.concatenate([jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape)), x], axis=1)


def norm(eps: float, name: str) -> nn.Module:
    """LayerNorm over the last axis, a submodule of the module that is being called."""
    return transformer.LayerNorm(eps, jnp.float32, name=name)


def blocks(x: jax.Array, depth: int, heads: int, eps: float, extra_key: bool = False) -> jax.Array:
    """Pre-norm blocks with exact GELU, the submodule 'blocks' of the module that is being called: `[B, N, D]` → the same."""
    stack = transformer.repeat(transformer.Block, depth)
    return stack(heads, MLP_RATIO * x.shape[-1], eps, transformer.gelu, jnp.float32, extra_key=extra_key, name='blocks')(x)[0]
