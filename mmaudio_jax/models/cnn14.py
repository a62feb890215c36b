"""PANNs' Cnn14 at 16 kHz: sound → 2 048 features and the logits of AudioSet's 527 classes.

Source: Kong et al. (arXiv 1912.10211) and the released weights (Cnn14_16k_mAP=0.438.pth; code MIT, weights CC BY 4.0). float32.
"""
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmaudio_jax.models import spectrograms

WIDTH = 2048
CLASSES = 527
SPECTRUM = 257  # values of a frame of the power spectrogram
MEL_BINS = 64
_CHANNELS = (64, 128, 256, 512, 1024, 2048)
_DB_FLOOR = 1e-10  # power
_SMALL = 256  # places of a picture


class Conv(nn.Module):
    """3 × 3, zero padded, without bias: `[B, T, F, I]` → `[B, T, F, O]`.

    Of a small picture as one product over nine shifted copies: there XLA's convolution takes up to three times as long on CPUs.
    """
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        _, frames, bins, width = x.shape
        kernel = self.param('kernel', nn.initializers.lecun_normal(), (3, 3, width, self.channels))
        if frames * bins > _SMALL:
            return jax.lax.conv_general_dilated(x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC'))
        padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        shifted = [padded[:, row:row + frames, column:column + bins] for row in range(3) for column in range(3)]
        return jnp.concatenate(shifted, axis=-1) @ kernel.reshape(-1, self.channels)


class Cnn14(nn.Module):
    """Power spectrogram `[B, T, 257]` (filterbanks.panns_power) → features `[B, 2048]` (after ReLU), logits `[B, 527]`.

    The mel filters are a parameter, because the checkpoint holds them. T is at least 32.
    """

    @nn.compact
    def __call__(self, power: jax.Array) -> tuple[jax.Array, jax.Array]:
        filters = self.param('mel_filters', nn.initializers.zeros, (SPECTRUM, MEL_BINS))
        x = 10 * jnp.log10(jnp.maximum(power @ filters, _DB_FLOOR))
        x = spectrograms.BatchNorm(name='bn0')(x)[..., None]
        for index, channels in enumerate(_CHANNELS, 1):
            for part in (1, 2):
                x = Conv(channels, name=f'block_{index}_conv{part}')(x)
                x = nn.relu(spectrograms.BatchNorm(name=f'block_{index}_bn{part}')(x))
            if index < len(_CHANNELS):
                x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.mean(axis=2)
        features = nn.relu(nn.Dense(WIDTH, name='fc1')(x.max(axis=1) + x.mean(axis=1)))
        return features, nn.Dense(CLASSES, name='fc_audioset')(features)


def embed(params: Any, power: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cnn14; on CPUs one clip after the other, which takes a quarter of the memory and no more time."""
    def whole(params, power):
        return Cnn14().apply({'params': params}, power)

    def one_by_one(params, power):
        features, logits = jax.lax.map(lambda clip: whole(params, clip[None]), power)
        return features[:, 0], logits[:, 0]
    return jax.lax.platform_dependent(params, power, cpu=one_by_one, default=whole)
