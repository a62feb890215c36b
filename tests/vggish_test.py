"""VGGish against the public module, and its importer."""
import jax
import numpy as np
import pytest

from mmaudio_jax import filterbanks
from mmaudio_jax.models import vggish
from mmaudio_jax.weights import tables
from mmaudio_jax.weights import vggish as weights
from tests.golden import evaluation_goldens as goldens

SHAPES = tables.shapes(weights.TABLE, vggish.VGGish(), weights.INPUTS)


def test_golden():
    params = weights.to_params(goldens.fill(SHAPES))
    patches = filterbanks.vggish_patches(goldens.signal(16_000)[None])[0]
    result = jax.jit(vggish.VGGish().apply)({'params': params}, patches)
    assert goldens.error(goldens.entry('small', 'vggish'), result[None]) < 2e-5  # measured 3.5e-6


def test_every_wrong_tensor_is_named():
    tensors = goldens.fill(SHAPES)
    assert len(tensors) == 18
    del tensors['features.6.bias']
    tensors['embeddings.6.weight'] = np.zeros(2)
    tensors['pproc.pca_means'] = np.zeros(128)  # known, and not used
    with pytest.raises(ValueError) as error:
        weights.to_params(tensors)
    for text in ('vggish-10086976.pth (2 tensors)', 'missing: features.6.bias (256,)', 'unexpected: embeddings.6.weight (2,)'):
        assert text in str(error.value)
