"""CLIP's official tensors (open_clip_pytorch_model.bin, the layout of open_clip) → our parameter tree, strict both ways.

`text_projection` and `logit_scale`, which no feature of ours needs, are ignored when they are there.
"""
from collections.abc import Iterator
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import clip
from mmaudio_jax.weights import names
from mmaudio_jax.weights import sources

UNUSED = ('text_projection', 'logit_scale')
_MODULES = {
    'norm1': 'ln_1.',
    'qkv': 'attn.in_proj_',
    'proj': 'attn.out_proj.',
    'norm2': 'ln_2.',
    'fc1': 'mlp.c_fc.',
    'fc2': 'mlp.c_proj.',
    'patches': 'conv1.',
    'norm_before': 'ln_pre.',
    'norm_after': 'ln_post.',
    'norm': 'ln_final.',
}
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'bias': 'bias',
    'class_token': 'class_embedding',
    'positions': 'positional_embedding',
    'projection': 'proj',
    'tokens': 'token_embedding.weight',
}


def leaves(tensors: Mapping[str, np.ndarray], model: clip.CLIP) -> Iterator[tuple[sources.KeyPath, np.ndarray]]:
    """Official tensors by name → parameters of `model` one by one with their paths, float32 NumPy arrays.

    Raises:
      ValueError: before the first: names every missing, unexpected and misshapen tensor.
    """
    inputs = (jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32),
              jax.ShapeDtypeStruct((1, model.text_length), jnp.int32))
    origins = {path: _source(path, shape, model) for path, shape in names.parameter_shapes(model, *inputs).items()}
    return sources.leaves(tensors, origins, UNUSED,
                          'the weights do not fit this CLIP; check that the file is DFN5B ViT-H/14 at 384 pixels')


def _source(path: sources.KeyPath, shape: names.Shape, model: clip.CLIP) -> sources.Source:
    tower, *modules, leaf = path
    name = ('visual.' if tower == 'image' else '') + '{block}' + ''.join(_MODULES.get(module, '') for module in modules)
    name += _LEAVES[leaf]
    stacked = 'blocks' in modules
    if stacked:
        layers, shape = range(shape[0]), shape[1:]
    else:
        layers = range(model.image_depth - 1, model.image_depth)  # of the last block
    in_block = stacked or 'last_block' in modules
    found = tuple(name.format(block=f'transformer.resblocks.{layer}.' if in_block else '') for layer in layers)
    if modules and modules[-1] == 'patches':
        size = model.patch_size
        return sources.Source(found, (shape[1], 3, size, size), _patch_kernel, stacked)
    if leaf == 'kernel':
        return sources.Source(found, shape[::-1], sources.transposed, stacked)
    return sources.Source(found, shape, sources.as_it_is, stacked)


def _patch_kernel(tensor: np.ndarray) -> np.ndarray:
    """(out, colour, row, column) → (row, column, colour; out), the order of transformer.patches."""
    return tensor.transpose(2, 3, 1, 0).reshape(-1, len(tensor))
