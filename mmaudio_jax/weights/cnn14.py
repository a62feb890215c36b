"""PANNs' published tensors (Cnn14_16k_mAP=0.438.pth, the dictionary under 'model'; CC BY 4.0) → our parameters, strict.

The file also holds the windowed Fourier matrices of its spectrogram; ours is an FFT with the same window.
"""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import cnn14
from mmaudio_jax.weights import tables

_MODULES = {name: name for name in ('bn0', 'fc1', 'fc_audioset')}
_MODULES |= {f'block_{i}_{part}': f'conv_block{i}.{part}' for i in range(1, 7) for part in ('conv1', 'conv2', 'bn1', 'bn2')}
TABLE = tables.Table(
    modules=_MODULES,
    params={'mel_filters': ('logmel_extractor.melW', lambda shape: shape)},
    unused=(r'.*\.num_batches_tracked', r'spectrogram_extractor\.stft\.conv_(real|imag)\.weight'),
    message='the weights do not fit Cnn14 at 16 kHz; check that the file is Cnn14_16k_mAP=0.438.pth, not the one for 32 kHz')
INPUTS = (jax.ShapeDtypeStruct((1, 64, cnn14.SPECTRUM), jnp.float32),)


def to_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors by name → parameters of Cnn14. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(TABLE, cnn14.Cnn14(), INPUTS, tensors)
