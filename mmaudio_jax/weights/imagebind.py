"""ImageBind's published tensors (imagebind_huge.pth, **CC BY-NC-SA 4.0**) → picture and sound networks, strict.

The file holds networks of six kinds of input; the other four are not used.
"""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import imagebind
from mmaudio_jax.weights import tables

_BLOCK = {'norm1': 'norm_1', 'proj': 'attn.out_proj', 'norm2': 'norm_2', 'fc1': 'mlp.fc1', 'fc2': 'mlp.fc2'}
_OTHERS = r'modality_(preprocessors|trunks|heads|postprocessors)\.(text|depth|thermal|imu|{})\..*'
_SCALE = r'modality_postprocessors\.audio\.1\.log_logit_scale'  # cosines do not see it


def _table(kind: str, other: str, modules: dict[str, str], boxes: dict[str, tuple[int, int]]) -> tables.Table:
    stem, trunk, head = (f'modality_{part}.{kind}.' for part in ('preprocessors', 'trunks', 'heads'))
    block = trunk + 'blocks.{}.'
    params = {
        'cls_token': (stem + 'cls_token', lambda shape: (1, *shape)),
        'positions': (stem + 'pos_embedding_helper.pos_embed', lambda shape: (1, *shape)),
        'blocks/qkv/bias': (block + 'attn.in_proj_bias', lambda shape: shape),
    }
    if kind == 'audio':
        params |= {f'blocks/{name}': (f'{block}attn.{name}', lambda shape: (1, 1, shape[-2] * shape[-1]))
                   for name in ('bias_k', 'bias_v')}
    return tables.Table(
        modules={'head_norm': head + '0', 'head': head + '2', **modules,
                 **{f'blocks/{ours}': block + theirs for ours, theirs in _BLOCK.items()}},
        params=params, matrices={'blocks/qkv/kernel': block + 'attn.in_proj_weight'}, boxes=boxes,
        unused=(_OTHERS.format(other), _SCALE),
        message='the weights do not fit ImageBind; check that the file is imagebind_huge.pth')


VISION = _table('vision', 'audio', {'patches': 'modality_preprocessors.vision.rgbt_stem.proj.1',
                                    'pre_norm': 'modality_trunks.vision.pre_transformer_layer.0'},
                {'patches/kernel': (imagebind.FRAMES, imagebind.PATCH)})
AUDIO = _table('audio', 'vision', {'patches/conv': 'modality_preprocessors.audio.rgbt_stem.proj',
                                   'patch_norm': 'modality_preprocessors.audio.rgbt_stem.norm_layer'}, {})
VISION_INPUTS = (jax.ShapeDtypeStruct((1, imagebind.FRAMES, imagebind.SIZE, imagebind.SIZE, 3), jnp.float32),)
AUDIO_INPUTS = (jax.ShapeDtypeStruct((1, 204, 128), jnp.float32),)


def vision_params(tensors: Mapping[str, np.ndarray], model: imagebind.Vision) -> dict[str, Any]:
    """Published tensors → parameters of Vision. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(VISION, model, VISION_INPUTS, tensors)


def audio_params(tensors: Mapping[str, np.ndarray], model: imagebind.Audio) -> dict[str, Any]:
    """Published tensors → parameters of Audio. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(AUDIO, model, AUDIO_INPUTS, tensors)
