"""Synchformer's official tensors ↔ ours: layouts, what is ignored, and that every wrong tensor is named."""
import jax
import numpy as np
import pytest

from mmaudio_jax.weights import synchformer as synchformer_weights
from tests import official_tensors
from tests.synchformer_test import DEPTHS
from tests.synchformer_test import SIZES
from tests.synchformer_test import TINY


@pytest.fixture
def tensors():
    return official_tensors.tiny('synchformer_visual', SIZES, DEPTHS)


def test_layouts(tensors):
    params = synchformer_weights.to_params(tensors, TINY)
    official = {name.removeprefix('vfeat_extractor.'): tensor for name, tensor in tensors.items()}
    patch = official['patch_embed_3d.proj.weight']
    assert params['patches']['kernel'][((1 * 4 + 2) * 4 + 3) * 3 + 1, 7] == patch[7, 1, 1, 2, 3]
    np.testing.assert_array_equal(params['spatial_positions'], official['pos_embed'][0])
    blocks = params['blocks']
    np.testing.assert_array_equal(blocks['time']['qkv']['kernel'][1], official['blocks.1.timeattn.qkv.weight'].T)
    np.testing.assert_array_equal(blocks['norm_time']['scale'][0], official['blocks.0.norm3.weight'])
    np.testing.assert_array_equal(blocks['norm_mlp']['bias'][1], official['blocks.1.norm2.bias'])
    np.testing.assert_array_equal(params['summary']['qkv']['bias'], official['spatial_attn_agg.self_attn.in_proj_bias'])
    np.testing.assert_array_equal(params['summary_token'], official['spatial_attn_agg.cls_token'][0, 0])


def test_the_whole_file_and_the_visual_part_alone_are_read(tensors):
    alone = synchformer_weights.to_params({n: t for n, t in tensors.items() if n not in synchformer_weights.UNUSED}, TINY)
    rest = ('afeat_extractor.ast.layernorm.bias', 'vproj.weight', 'aproj.bias', 'transformer.OFF_tok')
    whole = synchformer_weights.to_params(tensors | {name: np.zeros(5) for name in rest}, TINY)
    jax.tree.map(np.testing.assert_array_equal, alone, whole)
    used = sum(tensor.size for name, tensor in tensors.items() if name not in synchformer_weights.UNUSED)
    assert sum(leaf.size for leaf in jax.tree.leaves(alone)) == used


def test_every_wrong_tensor_is_named(tensors):
    del tensors['vfeat_extractor.temp_embed']
    tensors['vfeat_extractor.blocks.2.norm1.bias'] = np.zeros(8)
    tensors['vprojection.weight'] = np.zeros(3)
    tensors['vfeat_extractor.cls_token'] = np.zeros((1, 8))
    with pytest.raises(ValueError) as error:
        synchformer_weights.to_params(tensors, TINY)
    for text in ('do not fit Synchformer', '4 tensors', 'missing: vfeat_extractor.temp_embed (1, 3, 8)',
                 'unexpected: vfeat_extractor.blocks.2.norm1.bias (8,)', 'unexpected: vprojection.weight (3,)',
                 'wrong shape: vfeat_extractor.cls_token is (1, 8), must be (1, 1, 8)'):
        assert text in str(error.value)
