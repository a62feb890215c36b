"""The mapping of the flow network's tensors: complete, exact both ways, strict."""
import jax
import numpy as np
import pytest

from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import mmaudio as weights
from tests import official_tensors
from tests.golden import synthetic_weights

FIELDS = {'sync_fusion': 'modulate', 'rope': 'aligned', 'mlp': 'conv', 'dtype': 'float32', 'convolution': 'matmul',
          'remat': 'none'}


def build(variant, **fields):
    return mmaudio.build({'variant': variant, **FIELDS, **fields}, Sequence(variant.split('_')[1], 8.0))


@pytest.fixture(name='tiny', scope='module')
def fixture_tiny():
    """A small network and official tensors for it, each value different."""
    model = build('small_16k', hidden_size=64, num_heads=1, joint_blocks=2, fused_blocks=2)
    names = weights.shapes(model)
    return model, {name: np.random.RandomState(i).standard_normal(shape).astype(np.float32)
                   for i, (name, shape) in enumerate(names.items())}


@pytest.mark.parametrize('variant', mmaudio.VARIANTS)
def test_names_and_shapes_are_the_manifests(variant):
    assert weights.shapes(build(variant)) == synthetic_weights.load_manifest(f'mmaudio_{variant}')


def test_there_and_back_is_exact(tiny):
    model, tensors = tiny
    back = weights.from_params(official_tensors.params_of(weights, tensors, model), model)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(back[name], tensor, err_msg=name)


def test_constants_of_the_files_are_ignored(tiny):
    model, tensors = tiny
    constants = {'latent_rot': np.zeros(3), 'clip_rot': np.zeros(3), 't_embed.freqs': np.zeros(3)}
    with_them, without = (official_tensors.params_of(weights, found, model) for found in ({**tensors, **constants}, tensors))
    jax.tree.map(np.testing.assert_array_equal, with_them, without)


def test_every_problem_is_listed(tiny):
    model, tensors = tiny
    broken = {**tensors, 'stray': np.zeros(2), 'latent_mean': np.zeros((1, 1, 3), np.float32)}
    del broken['t_embed.mlp.0.bias']
    with pytest.raises(ValueError) as caught:
        official_tensors.params_of(weights, broken, model)
    message = str(caught.value)
    assert 'missing: t_embed.mlp.0.bias' in message
    assert 'unexpected: stray' in message
    assert 'wrong shape: latent_mean is (1, 1, 3), must be (1, 1, 20)' in message


def test_parameters_of_another_network_are_refused(tiny):
    model, tensors = tiny
    params = official_tensors.params_of(weights, tensors, model)
    params['more'] = np.zeros(1)
    with pytest.raises(ValueError, match='unexpected: more'):
        weights.from_params(params, model)
