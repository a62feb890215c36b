"""VGGish: patches of 0.96 s of log-mel → 128 values each, for the Fréchet audio distance.

Source: Hershey et al. (arXiv 1609.09430) and the released weights (vggish-10086976.pth, Apache-2.0). As the published scores
use it: no activation after the last layer, no principal components, no quantisation. float32.
"""
import flax.linen as nn
import jax
import jax.numpy as jnp

WIDTH = 128
_STAGES = ((64,), (128,), (256, 256), (512, 512))  # channels of the convolutions before each pooling


class VGGish(nn.Module):
    """`filterbanks.vggish_patches` `[B, 96, 64]` → `[B, 128]`."""

    @nn.compact
    def __call__(self, patches: jax.Array) -> jax.Array:
        x, index = patches[..., None], 0
        for stage in _STAGES:
            for channels in stage:
                x = nn.relu(nn.Conv(channels, (3, 3), name=f'conv_{index}')(x))
                index += 1
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = x.reshape(x.shape[0], -1)  # (time, frequency, channel)
        for layer, width in enumerate((4096, 4096)):
            x = nn.relu(nn.Dense(width, name=f'dense_{layer}')(x))
        return nn.Dense(WIDTH, name='dense_2')(x).astype(jnp.float32)
