"""Synchformer's official tensors (synchformer_state_dict.pth) → parameters of our visual encoder, strict both ways.

The visual encoder is `vfeat_extractor.*`; of it the two-dimensional patch embedding is not used. The rest of the file, the
audio encoder, the projections and the transformer that compares both, is ignored by its known prefixes.
"""
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import synchformer
from mmaudio_jax.weights import names
from mmaudio_jax.weights import sources

PREFIX = 'vfeat_extractor.'
OTHER_PARTS = ('afeat_extractor.', 'vproj.', 'aproj.', 'transformer.')
UNUSED = (PREFIX + 'patch_embed.proj.weight', PREFIX + 'patch_embed.proj.bias')
_BLOCK: dict[sources.KeyPath, str] = {
    ('norm_time',): 'norm3.',
    ('time', 'qkv'): 'timeattn.qkv.',
    ('time', 'proj'): 'timeattn.proj.',
    ('norm_space',): 'norm1.',
    ('space', 'qkv'): 'attn.qkv.',
    ('space', 'proj'): 'attn.proj.',
    ('norm_mlp',): 'norm2.',
    ('fc1',): 'mlp.fc1.',
    ('fc2',): 'mlp.fc2.',
}
_SUMMARY: dict[sources.KeyPath, str] = {
    ('norm1',): 'norm1.',
    ('qkv',): 'self_attn.in_proj_',
    ('proj',): 'self_attn.out_proj.',
    ('norm2',): 'norm2.',
    ('fc1',): 'linear1.',
    ('fc2',): 'linear2.',
}
_SINGLE: dict[sources.KeyPath, str] = {
    ('class_token',): 'cls_token',
    ('spatial_positions',): 'pos_embed',
    ('temporal_positions',): 'temp_embed',
    ('summary_token',): 'spatial_attn_agg.cls_token',
}
_OUTER: dict[sources.KeyPath, str] = {('patches',): 'patch_embed_3d.proj.', ('norm',): 'norm.'}
_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias'}


def to_params(tensors: Mapping[str, np.ndarray], model: synchformer.VisualEncoder) -> dict[str, Any]:
    """Official tensors by name, the visual part or the whole file → parameters of `model`, float32 NumPy arrays.

    Raises:
      ValueError: names every missing, unexpected and misshapen tensor.
    """
    return traverse_util.unflatten_dict(dict(leaves(tensors, model)))


def leaves(tensors: Mapping[str, np.ndarray], model: synchformer.VisualEncoder) -> Iterator[tuple[sources.KeyPath, np.ndarray]]:
    """The parameters of `to_params` one by one, with their paths; raises before the first."""
    return sources.leaves(tensors, _origins(model), (*OTHER_PARTS, *UNUSED),
                          'the weights do not fit Synchformer; check that the file is synchformer_state_dict.pth')


def _origins(model: synchformer.VisualEncoder) -> dict[sources.KeyPath, sources.Source]:
    segment = jax.ShapeDtypeStruct((1, model.frames, model.image_size, model.image_size, 3), jnp.float32)
    return {path: _source(path, shape, model) for path, shape in names.parameter_shapes(model, segment).items()}


def _source(path: sources.KeyPath, shape: names.Shape, model: synchformer.VisualEncoder) -> sources.Source:
    if path in _SINGLE:
        official = (1,) * (3 - len(shape)) + shape
        return sources.Source((PREFIX + _SINGLE[path],), official, lambda tensor: tensor.reshape(shape), False)
    first, *modules, leaf = path
    if first == 'blocks':
        found = tuple(f'{PREFIX}blocks.{layer}.{_BLOCK[tuple(modules)]}{_LEAVES[leaf]}' for layer in range(shape[0]))
        shape = shape[1:]
    elif first == 'summary':
        found = (f'{PREFIX}spatial_attn_agg.{_SUMMARY[tuple(modules)]}{_LEAVES[leaf]}',)
    else:
        found = (PREFIX + _OUTER[(first,)] + _LEAVES[leaf],)
    stacked = first == 'blocks'
    if first == 'patches' and leaf == 'kernel':
        box = (model.frames_per_step, model.patch_size, model.patch_size)
        return sources.Source(found, (shape[1], 3, *box), _patch_kernel, stacked)
    if leaf == 'kernel':
        return sources.Source(found, shape[::-1], sources.transposed, stacked)
    return sources.Source(found, shape, sources.as_it_is, stacked)


def _patch_kernel(tensor: np.ndarray) -> np.ndarray:
    """(out, colour, frame, row, column) → (frame, row, column, colour; out), the order of transformer.patches."""
    return tensor.transpose(2, 3, 4, 1, 0).reshape(-1, len(tensor))
