"""PaSST against the public module, and its importer."""
import jax
import numpy as np
import pytest

from mmaudio_jax.models import passt
from mmaudio_jax.weights import passt as weights
from mmaudio_jax.weights import tables
from tests.golden import evaluation_goldens as goldens

SHAPES = tables.shapes(weights.TABLE, passt.Passt(), weights.INPUTS)


@pytest.mark.slow
def test_golden():
    params = weights.to_params(goldens.fill(SHAPES))
    mel = np.random.RandomState(0).normal(size=(1, 128, 1000)).astype(np.float32).swapaxes(1, 2)
    apply = jax.jit(passt.Passt().apply)
    features, logits = apply({'params': params}, mel)
    assert goldens.error(goldens.entry('small', 'passt features'), features) < 2e-5  # measured 1.0e-6
    assert goldens.error(goldens.entry('small', 'passt net, input Ra'), logits) < 2e-5  # measured 1.9e-6
    features, _ = apply({'params': params}, mel[:, :208])
    assert goldens.error(goldens.entry('small', 'passt net, same'), features) < 2e-5  # measured 1.3e-6


def test_every_wrong_tensor_is_named():
    tensors = goldens.fill(SHAPES)
    del tensors['blocks.7.mlp.fc1.weight']
    tensors['head_dist.weight'] = np.zeros((527, 768))  # known, and not used
    with pytest.raises(ValueError, match=r'ap.476-swa.pt \(1 tensors\):\n  missing: blocks.7.mlp.fc1.weight \(3072, 768\)$'):
        weights.to_params(tensors)
