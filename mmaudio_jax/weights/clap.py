"""LAION-CLAP's published tensors (music_speech_audioset_epoch_15_esc_89.98.pt, below 'state_dict'; CC0) → parameters, strict.

Names in the file begin with 'module.'; they are taken with and without it.
"""
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax.models import clap
from mmaudio_jax.models import htsat
from mmaudio_jax.weights import tables

_MESSAGE = 'the weights do not fit LAION-CLAP; check that the file is music_speech_audioset_epoch_15_esc_89.98.pt'
_PREFIX = 'module.'
_SWIN = {
    'norm1': 'norm1',
    'attn/qkv': 'attn.qkv',
    'attn/proj': 'attn.proj',
    'norm2': 'norm2',
    'fc1': 'mlp.fc1',
    'fc2': 'mlp.fc2',
}
_UNUSED_SOUND = (
    r'.*\.num_batches_tracked', r'.*\.relative_position_index', r'.*\.attn_mask',
    r'spectrogram_extractor\.stft\.conv_(real|imag)\.weight', r'(head|tscam_conv)\.(weight|bias)')
_UNUSED = (r'logit_scale_[at]', r'(audio|text)_transform\..*')
_LAYER = {
    'qkv': 'attention.self.(query|key|value)',
    'proj': 'attention.output.dense',
    'norm1': 'attention.output.LayerNorm',
    'fc1': 'intermediate.dense',
    'fc2': 'output.dense',
    'norm2': 'output.LayerNorm',
}


def _same(shape):
    return shape


def _htsat(ours: str, theirs: str) -> tuple[dict[str, str], dict[str, tuple]]:
    """Modules and parameters of HTSAT, ours below `ours`, theirs below `theirs`."""
    modules = {'bn0': 'bn0', 'patches': 'patch_embed.proj', 'patch_norm': 'patch_embed.norm', 'norm': 'norm'}
    params = {'mel_filters': 'logmel_extractor.melW'}
    for stage, depth in enumerate(htsat.HTSAT.depths):
        for block in range(depth):
            own, official = f'stage_{stage}_block_{block}/', f'layers.{stage}.blocks.{block}.'
            modules |= {own + name: official + other for name, other in _SWIN.items()}
            params[own + 'attn/positions'] = official + 'attn.relative_position_bias_table'
        modules |= {f'stage_{stage}_merge/{part}': f'layers.{stage}.downsample.{part}' for part in ('norm', 'reduction')}
    return ({ours + name: theirs + other for name, other in modules.items()},
            {ours + name: (theirs + other, _same) for name, other in params.items()})


_MODULES, _PARAMS = _htsat('', '')
HTSAT = tables.Table(modules=_MODULES, params=_PARAMS, unused=_UNUSED_SOUND, message=_MESSAGE)
_MODULES, _PARAMS = _htsat('htsat/', 'audio_branch.')
AUDIO = tables.Table(
    modules={**_MODULES, 'projection_0': 'audio_projection.0', 'projection_1': 'audio_projection.2'}, params=_PARAMS,
    unused=(*(r'audio_branch\.' + name for name in _UNUSED_SOUND), *_UNUSED, r'text_(branch|projection)\..*'),
    message=_MESSAGE)
_TEXT = 'text_branch.embeddings.'
TEXT = tables.Table(
    modules={'norm': _TEXT + 'LayerNorm', 'pooler': 'text_branch.pooler.dense',
             'projection_0': 'text_projection.0', 'projection_1': 'text_projection.2',
             **{f'layers/{ours}': f'text_branch.encoder.layer.{{}}.{theirs}' for ours, theirs in _LAYER.items()}},
    params={'words': (_TEXT + 'word_embeddings.weight', _same), 'positions': (_TEXT + 'position_embeddings.weight', _same),
            'segment': (_TEXT + 'token_type_embeddings.weight', _same)},
    unused=(*_UNUSED, r'audio_(branch|projection)\..*', r'text_branch\.embeddings\.(position|token_type)_ids'),
    message=_MESSAGE)
POWER_INPUTS = (jax.ShapeDtypeStruct((1, htsat.FRAMES, htsat.SPECTRUM), jnp.float32),)
TEXT_INPUTS = (jax.ShapeDtypeStruct((1, clap.TEXT_LENGTH), jnp.int32),)


def _plain(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}


def audio_params(tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Published tensors → parameters of ClapAudio. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(AUDIO, clap.ClapAudio(), POWER_INPUTS, _plain(tensors))


def text_params(tensors: Mapping[str, np.ndarray], model: clap.ClapText) -> dict[str, Any]:
    """Published tensors → parameters of ClapText. ValueError names every missing, unexpected and misshapen tensor."""
    return tables.to_params(TEXT, model, TEXT_INPUTS, _plain(tensors))
