"""LAION-CLAP: sound and text → vectors of 512 in one space. HTSAT (models/htsat.py) and RoBERTa with a projection each.

Sources: Wu et al. (arXiv 2211.06687), RoBERTa (arXiv 1907.11692), and the released weights
(music_speech_audioset_epoch_15_esc_89.98.pt, CC0). float32. Letters: B batch, T tokens, D width, H heads.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import htsat
from mmaudio_jax.models import spectrograms
from mmaudio_jax.models import transformer

WIDTH = 512
TEXT_LENGTH = 77  # tokens
PADDING = 1  # id of the token that fills up
_EPS = 1e-5


class ClapAudio(nn.Module):
    """`filterbanks.clap_power` of 10 s `[B, 1001, 513]` → `[B, 512]` of unit length."""

    @nn.compact
    def __call__(self, power: jax.Array) -> jax.Array:
        return _project(htsat.HTSAT(name='htsat')(power))


class ClapText(nn.Module):
    """Tokens of tokenizer_roberta, int `[B, T]`, filled up with PADDING → `[B, 512]` of unit length."""
    vocabulary: int = 50_265
    positions: int = 514
    width: int = 768
    depth: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        real = tokens != PADDING
        place = jnp.cumsum(real, axis=1) * real + PADDING
        words = self.param('words', transformer.INIT, (self.vocabulary, self.width))
        positions = self.param('positions', transformer.INIT, (self.positions, self.width))
        segment = self.param('segment', transformer.INIT, (1, self.width))
        x = spectrograms.norm(_EPS, 'norm')(words[tokens] + positions[place] + segment)
        stack = nn.scan(PostNormBlock, variable_axes={'params': 0}, split_rngs={'params': True}, in_axes=nn.broadcast,
                        length=self.depth)
        x, _ = stack(self.heads, name='layers')(x, real)
        return _project(jnp.tanh(nn.Dense(self.width, name='pooler')(x[:, 0])))


class PostNormBlock(nn.Module):
    """x = norm(x + attention x); x = norm(x + mlp x): `[B, T, D]`; `real` bool `[B, T]` says which tokens are seen."""
    heads: int

    @nn.compact
    def __call__(self, x: jax.Array, real: jax.Array) -> tuple[jax.Array, None]:
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, name='qkv')(x).reshape(batch, length, 3, self.heads, -1)
        mixed = transformer.attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], real[:, None, None])
        x = x + nn.Dense(width, name='proj')(mixed.reshape(x.shape))
        x = spectrograms.norm(_EPS, 'norm1')(x)
        h = transformer.gelu(nn.Dense(spectrograms.MLP_RATIO * width, name='fc1')(x))
        return spectrograms.norm(_EPS, 'norm2')(x + nn.Dense(width, name='fc2')(h)), None


def _project(x: jax.Array) -> jax.Array:
    """Called within a module: matrix, ReLU, matrix, unit length."""
    x = nn.relu(nn.Dense(WIDTH, name='projection_0')(x))
    return transformer.of_length_one(nn.Dense(WIDTH, name='projection_1')(x))
