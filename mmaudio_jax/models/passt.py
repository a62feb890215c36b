"""PaSST: 10 s of log-mel → 768 features and the logits of AudioSet's 527 classes.

Source: Koutini et al. (arXiv 2110.05069) and the released weights (passt-s-f128-p16-s10-ap.476-swa.pt, Apache-2.0). float32.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import spectrograms
from mmaudio_jax.models import transformer

WIDTH = 768
CLASSES = 527
_GRID = (12, 99)  # patches along frequency and time of 10 s
_EPS = 1e-6
_HEAD_EPS = 1e-5


class Passt(nn.Module):
    """`filterbanks.passt_mel` `[B, T, 128]` → features `[B, 768]`, logits `[B, 527]`; T is 16 to 1000 frames."""

    @nn.compact
    def __call__(self, mel: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = spectrograms.Patches(WIDTH, True, name='patches')(mel)
        # As stored: channels first.
        x = x + self.param('freq_positions', transformer.INIT, (WIDTH, _GRID[0])).T[:, None]
        x = x + self.param('time_positions', transformer.INIT, (WIDTH, _GRID[1])).T[:x.shape[2]]
        positions = self.param('token_positions', transformer.INIT, (2, WIDTH))
        cls_token, dist_token = (self.param(name, transformer.INIT, (1, WIDTH)) for name in ('cls_token', 'dist_token'))
        x = x.reshape(x.shape[0], -1, WIDTH)
        x = spectrograms.prepend(x, jnp.concatenate([cls_token, dist_token]) + positions)
        x = spectrograms.blocks(x, 12, 12, _EPS)
        features = spectrograms.norm(_EPS, 'norm')(x[:, :2]).mean(axis=1)
        normed = spectrograms.norm(_HEAD_EPS, 'head_norm')(features)
        return features, nn.Dense(CLASSES, name='head')(normed)
