"""ImageBind (huge), its picture and sound networks: both → vectors of 1 024 in one space, for the IB-score.

Source: Girdhar et al. (arXiv 2305.05665) and the released weights (imagebind_huge.pth). **The weights and the original code are
CC BY-NC-SA 4.0: not for commercial use.** This code is written from the paper and the description of the layers. float32.
"""
import flax.linen as nn
import jax

from mmaudio_jax.models import spectrograms
from mmaudio_jax.models import transformer

WIDTH = 1024
SIZE = 224  # pixels of a view, square
FRAMES, PATCH = 2, 14  # that a patch of a view covers
_EPS = 1e-6
_STEM_EPS = 1e-5


class Vision(nn.Module):
    """Views of two frames, as `clip.normalize` gives them, `[B, 2, 224, 224, 3]` → `[B, 1024]` of unit length. ViT-H."""
    width: int = 1280
    depth: int = 32
    heads: int = 16

    @nn.compact
    def __call__(self, views: jax.Array) -> jax.Array:
        x = nn.Dense(self.width, use_bias=False, name='patches')(transformer.patches(views, FRAMES, PATCH))
        x = spectrograms.prepend(x, self.param('cls_token', transformer.INIT, (1, self.width)))
        x = x + self.param('positions', transformer.INIT, (x.shape[1], self.width))
        x = spectrograms.norm(_EPS, 'pre_norm')(x)
        return _head(spectrograms.blocks(x, self.depth, self.heads, _EPS))


class Audio(nn.Module):
    """`filterbanks.imagebind_mel` `[B, 204, 128]` → `[B, 1024]` of unit length. ViT-B with an extra learned key."""
    width: int = 768
    depth: int = 12
    heads: int = 12

    @nn.compact
    def __call__(self, mel: jax.Array) -> jax.Array:
        x = spectrograms.Patches(self.width, False, name='patches')(mel)
        x = spectrograms.norm(_STEM_EPS, 'patch_norm')(x.reshape(x.shape[0], -1, self.width))
        x = spectrograms.prepend(x, self.param('cls_token', transformer.INIT, (1, self.width)))
        x = x + self.param('positions', transformer.INIT, (x.shape[1], self.width))
        return _head(spectrograms.blocks(x, self.depth, self.heads, _EPS, extra_key=True))


def _head(x: jax.Array) -> jax.Array:
    """Called within a module: LayerNorm of the class token, a matrix, unit length."""
    x = spectrograms.norm(_EPS, 'head_norm')(x[:, 0])
    return transformer.of_length_one(nn.Dense(WIDTH, use_bias=False, name='head')(x))
