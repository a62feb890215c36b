"""VGGish's published tensors (vggish-10086976.pth of torchvggish, Apache-2.0) → our parameters, strict."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import vggish
from mmaudio_jax.weights import tables

_CONVOLUTIONS = (0, 3, 6, 8, 11, 13)  # their places among activations and poolings
_MODULES = {f'conv_{i}': f'features.{place}' for i, place in enumerate(_CONVOLUTIONS)}
_MODULES |= {f'dense_{i}': f'embeddings.{2 * i}' for i in range(3)}
TABLE = tables.Table(
    modules=_MODULES,
    unused=(r'pproc\..*',),  # principal components
    message='the weights do not fit VGGish; check that the file is vggish-10086976.pth')
INPUTS = (jax.ShapeDtypeStruct((1, 96, 64), jnp.float32),)


def to_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors by name → parameters of VGGish. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(TABLE, vggish.VGGish(), INPUTS, tensors)
