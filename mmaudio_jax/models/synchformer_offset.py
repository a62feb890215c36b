"""Synchformer beside its picture branch (models/synchformer.py): sound → features, and both → the offset between them.

Source: Iashin et al. (arXiv 2401.16423) and the released weights (24-01-04T16-39-21, synchformer_state_dict.pth; MIT). float32.
A segment is 0.64 s; it has 8 picture features (one for two frames) and 6 sound features of width 768.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import spectrograms
from mmaudio_jax.models import transformer

WIDTH = 768
SEGMENTS = 14  # that the offset is found from
PICTURE_TOKENS, SOUND_TOKENS = 8, 6  # of a segment
_GRID = (12, 6)  # patches along frequency and time
_AST_EPS = 1e-12
_SUMMARY_EPS = 1e-6
_FUSION_EPS = 1e-5
OFFSETS_S = np.linspace(-2.0, 2.0, 21)  # of the classes; picture and sound are together at class 10


class SoundBranch(nn.Module):
    """`filterbanks.synchformer_mel` of segments `[B, 66, 128]` → `[B, 6, 768]`."""

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        x = spectrograms.Patches(WIDTH, True, name='patches')(mel)
        x = x.reshape(x.shape[0], -1, WIDTH)
        tokens = [self.param(name, transformer.INIT, (1, WIDTH)) for name in ('cls_token', 'distillation_token')]
        x = spectrograms.prepend(x, jnp.concatenate(tokens))
        x = x + self.param('positions', transformer.INIT, (2 + _GRID[0] * _GRID[1], WIDTH))
        x = spectrograms.norm(_AST_EPS, 'norm')(spectrograms.blocks(x, 12, 12, _AST_EPS))
        x = x[:, 2:].reshape(-1, *_GRID, WIDTH).swapaxes(1, 2).reshape(-1, _GRID[0], WIDTH)
        x = spectrograms.prepend(x, self.param('summary_token', transformer.INIT, (1, WIDTH)))
        summary = transformer.Block(12, spectrograms.MLP_RATIO * WIDTH, _SUMMARY_EPS, transformer.gelu, jnp.float32,
                                    first_only=True, name='summary')
        return summary(x)[0].reshape(-1, SOUND_TOKENS, WIDTH)


class OffsetHead(nn.Module):
    """Features of 14 segments, picture `[B, 14, 8, 768]` and sound `[B, 14, 6, 768]` → logits of OFFSETS_S `[B, 21]`."""

    @nn.compact
    def __call__(self, picture: jax.Array, sound: jax.Array) -> jax.Array:
        batch = picture.shape[0]
        picture = nn.Dense(WIDTH, name='picture_proj')(picture).reshape(batch, -1, WIDTH)
        sound = nn.Dense(WIDTH, name='sound_proj')(sound).reshape(batch, -1, WIDTH)
        picture = spectrograms.norm(_FUSION_EPS, 'picture_norm')(picture)
        sound = spectrograms.norm(_FUSION_EPS, 'sound_norm')(sound)
        offset_token, sound_token = (self.param(name, transformer.INIT, (1, WIDTH)) for name in ('offset_token', 'sound_token'))
        x = jnp.concatenate([spectrograms.prepend(picture, offset_token), spectrograms.prepend(sound, sound_token)], axis=1)
        x = x + self.param('positions', transformer.INIT, (2 + SEGMENTS * (PICTURE_TOKENS + SOUND_TOKENS), WIDTH))
        x = spectrograms.blocks(x, 3, 8, _FUSION_EPS)[:, 0]
        return nn.Dense(len(OFFSETS_S), name='offset_head')(spectrograms.norm(_FUSION_EPS, 'norm')(x))
