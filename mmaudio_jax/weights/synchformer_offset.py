"""Synchformer's published tensors (synchformer_state_dict.pth, MIT) → sound branch and offset head, strict.

The file's picture branch `vfeat_extractor.*` is weights/synchformer.py's.
"""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.weights import tables

_MESSAGE = 'the weights do not fit Synchformer; check that the file is synchformer_state_dict.pth'
_AST = 'afeat_extractor.ast.'
_LAYER = {
    'norm1': 'layernorm_before',
    'qkv': 'attention.attention.(query|key|value)',
    'proj': 'attention.output.dense',
    'norm2': 'layernorm_after',
    'fc1': 'intermediate.dense',
    'fc2': 'output.dense',
}
_SUMMARY = {'norm1': 'norm1', 'proj': 'self_attn.out_proj', 'norm2': 'norm2', 'fc1': 'linear1', 'fc2': 'linear2'}
_AGGREGATE = 'afeat_extractor.freq_attn_agg.'
SOUND = tables.Table(
    modules={'patches/conv': _AST + 'embeddings.patch_embeddings.projection', 'norm': _AST + 'layernorm',
             **{f'blocks/{ours}': f'{_AST}encoder.layer.{{}}.{theirs}' for ours, theirs in _LAYER.items()},
             **{f'summary/{ours}': _AGGREGATE + theirs for ours, theirs in _SUMMARY.items()}},
    params={
        'cls_token': (_AST + 'embeddings.cls_token', lambda shape: (1, *shape)),
        'distillation_token': (_AST + 'embeddings.distillation_token', lambda shape: (1, *shape)),
        'positions': (_AST + 'embeddings.position_embeddings', lambda shape: (1, *shape)),
        'summary_token': (_AGGREGATE + 'cls_token', lambda shape: (1, *shape)),
        'summary/qkv/bias': (_AGGREGATE + 'self_attn.in_proj_bias', lambda shape: shape),
    },
    matrices={'summary/qkv/kernel': _AGGREGATE + 'self_attn.in_proj_weight'},
    unused=(r'vfeat_extractor\..*', r'vproj\..*', r'aproj\..*', r'transformer\..*'),
    message=_MESSAGE)
_BLOCK = {
    'norm1': 'ln1',
    'qkv': 'attn.(query|key|value)',
    'proj': 'attn.proj',
    'norm2': 'ln2',
    'fc1': 'mlp.0',
    'fc2': 'mlp.2',
}
HEAD = tables.Table(
    modules={'picture_proj': 'vproj', 'sound_proj': 'aproj', 'picture_norm': 'transformer.vis_in_lnorm',
             'sound_norm': 'transformer.aud_in_lnorm', 'norm': 'transformer.ln_f', 'offset_head': 'transformer.off_head',
             **{f'blocks/{ours}': f'transformer.blocks.{{}}.{theirs}' for ours, theirs in _BLOCK.items()}},
    params={
        'offset_token': ('transformer.OFF_tok', lambda shape: (1, *shape)),
        'sound_token': ('transformer.MOD_tok', lambda shape: (1, *shape)),
        'positions': ('transformer.pos_emb_cfg.pos_emb', lambda shape: (1, *shape)),
    },
    unused=(r'vfeat_extractor\..*', r'afeat_extractor\..*'),
    message=_MESSAGE)
SOUND_INPUTS = (jax.ShapeDtypeStruct((1, 66, 128), jnp.float32),)
HEAD_INPUTS = tuple(jax.ShapeDtypeStruct((1, synchformer_offset.SEGMENTS, tokens, synchformer_offset.WIDTH), jnp.float32)
                    for tokens in (synchformer_offset.PICTURE_TOKENS, synchformer_offset.SOUND_TOKENS))


def sound_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors → parameters of SoundBranch. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(SOUND, synchformer_offset.SoundBranch(), SOUND_INPUTS, tensors)


def head_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors → parameters of OffsetHead. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(HEAD, synchformer_offset.OffsetHead(), HEAD_INPUTS, tensors)
