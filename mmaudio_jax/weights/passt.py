"""PaSST's published tensors (passt-s-f128-p16-s10-ap.476-swa.pt, Apache-2.0) → our parameters, strict."""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import passt
from mmaudio_jax.weights import tables

_BLOCK = {'norm1': 'norm1', 'qkv': 'attn.qkv', 'proj': 'attn.proj', 'norm2': 'norm2', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
TABLE = tables.Table(
    modules={'patches/conv': 'patch_embed.proj', 'norm': 'norm', 'head_norm': 'head.0', 'head': 'head.1',
             **{f'blocks/{ours}': f'blocks.{{}}.{theirs}' for ours, theirs in _BLOCK.items()}},
    params={
        'cls_token': ('cls_token', lambda shape: (1, *shape)),
        'dist_token': ('dist_token', lambda shape: (1, *shape)),
        'token_positions': ('new_pos_embed', lambda shape: (1, *shape)),
        'freq_positions': ('freq_new_pos_embed', lambda shape: (1, *shape, 1)),
        'time_positions': ('time_new_pos_embed', lambda shape: (1, shape[0], 1, shape[1])),
    },
    unused=(r'head_dist\.(weight|bias)',),
    message='the weights do not fit PaSST; check that the file is passt-s-f128-p16-s10-ap.476-swa.pt')
INPUTS = (jax.ShapeDtypeStruct((1, 208, 128), jnp.float32),)


def to_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors by name → parameters of Passt. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(TABLE, passt.Passt(), INPUTS, tensors)
