"""CLIP's official tensors ↔ ours: layouts, and that every wrong tensor is named."""
import numpy as np
import pytest

from mmaudio_jax.weights import clip as clip_weights
from tests import official_tensors
from tests.clip_test import DEPTHS
from tests.clip_test import SIZES
from tests.clip_test import TINY


@pytest.fixture
def tensors():
    return official_tensors.tiny('clip_vit_h_14_378', SIZES, DEPTHS)


def test_layouts(tensors):
    params = official_tensors.params_of(clip_weights, tensors, TINY)
    image, text = params['image'], params['text']
    patch = tensors['visual.conv1.weight']
    assert image['patches']['kernel'][(4 * 6 + 5) * 3 + 1, 7] == patch[7, 1, 4, 5]
    block = image['blocks']
    for layer in range(2):
        name = f'visual.transformer.resblocks.{layer}'
        np.testing.assert_array_equal(block['qkv']['kernel'][layer], tensors[f'{name}.attn.in_proj_weight'].T)
        np.testing.assert_array_equal(block['fc2']['bias'][layer], tensors[f'{name}.mlp.c_proj.bias'])
    np.testing.assert_array_equal(image['last_block']['norm2']['scale'], tensors['visual.transformer.resblocks.2.ln_2.weight'])
    np.testing.assert_array_equal(image['projection'], tensors['visual.proj'])
    np.testing.assert_array_equal(text['tokens'], tensors['token_embedding.weight'])
    official = tensors['transformer.resblocks.1.attn.out_proj.weight']
    np.testing.assert_array_equal(text['blocks']['proj']['kernel'][1], official.T)


def test_parameters_are_new_contiguous_float32(tensors):
    half = {name: tensor.astype(np.float16) for name, tensor in tensors.items()}
    params = official_tensors.params_of(clip_weights, half, TINY)
    for leaf in (params['image']['patches']['kernel'], params['text']['tokens'], params['image']['blocks']['qkv']['kernel']):
        assert leaf.dtype == np.float32 and leaf.flags.c_contiguous
    tokens = official_tensors.params_of(clip_weights, tensors, TINY)['text']['tokens']
    assert not np.shares_memory(tokens, tensors['token_embedding.weight'])


def test_every_tensor_is_used_once_or_ignored_by_name(tensors):
    for name in clip_weights.UNUSED:
        del tensors[name]
    params = official_tensors.params_of(clip_weights, tensors, TINY)
    count = sum(leaf.size for leaf in _leaves(params))
    assert count == sum(tensor.size for tensor in tensors.values())


def _leaves(tree):
    for value in tree.values():
        yield from _leaves(value) if isinstance(value, dict) else [value]


def test_every_wrong_tensor_is_named(tensors):
    del tensors['visual.transformer.resblocks.1.attn.in_proj_bias']
    tensors['visual.transformer.resblocks.3.ln_1.bias'] = np.zeros(8)
    tensors['text_projection.weight'] = np.zeros(3)
    tensors['ln_final.weight'] = np.zeros(7)
    with pytest.raises(ValueError) as error:
        official_tensors.params_of(clip_weights, tensors, TINY)
    for text in ('do not fit this CLIP', '4 tensors', 'missing: visual.transformer.resblocks.1.attn.in_proj_bias (24,)',
                 'unexpected: visual.transformer.resblocks.3.ln_1.bias (8,)', 'unexpected: text_projection.weight (3,)',
                 'wrong shape: ln_final.weight is (7,), must be (6,)'):
        assert text in str(error.value)
