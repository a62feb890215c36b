"""ImageBind's picture and sound networks against the public modules, and their importers."""
import jax
import numpy as np
import pytest

from mmaudio_jax.models import imagebind
from mmaudio_jax.weights import imagebind as weights
from mmaudio_jax.weights import tables
from tests.golden import evaluation_goldens as goldens

TINY_VISION, TINY_AUDIO = imagebind.Vision(width=32, depth=2, heads=4), imagebind.Audio(width=32, depth=2, heads=4)


def _audio(model):
    return tables.shapes(weights.AUDIO, model, weights.AUDIO_INPUTS)


def _vision(model):
    return tables.shapes(weights.VISION, model, weights.VISION_INPUTS)


def test_golden_of_sound():
    model = imagebind.Audio()
    params = weights.audio_params(goldens.fill(_audio(model)), model)
    mel = np.random.RandomState(4).normal(size=(3, 128, 204)).astype(np.float32).swapaxes(1, 2)
    result = jax.jit(model.apply)({'params': params}, mel)
    # The public module multiplies by 20 what no cosine sees.
    assert goldens.error(goldens.entry('ib', 'imagebind audio'), 20 * result.mean(axis=0)[None]) < 2e-5  # measured 1.2e-6


@pytest.mark.slow
def test_golden_of_pictures():
    model = imagebind.Vision()
    params = weights.vision_params(goldens.fill(_vision(model)), model)
    views = np.random.RandomState(5).normal(size=(2, 3, 2, 224, 224)).astype(np.float32).transpose(0, 2, 3, 4, 1)
    result = jax.jit(model.apply)({'params': params}, views)
    assert goldens.error(goldens.entry('ib', 'imagebind vision'), result.mean(axis=0)[None]) < 2e-5  # measured 5.1e-7


def test_one_file_holds_both_and_more():
    tensors = goldens.fill(_vision(TINY_VISION) | _audio(TINY_AUDIO))
    tensors['modality_trunks.thermal.blocks.0.attn.bias_k'] = np.zeros((1, 1, 32))  # known, and not used
    tensors['modality_postprocessors.audio.1.log_logit_scale'] = np.zeros(())
    params = weights.audio_params(tensors, TINY_AUDIO)
    kernel = np.asarray(tensors['modality_trunks.audio.blocks.1.attn.in_proj_weight'])
    np.testing.assert_array_equal(params['blocks']['qkv']['kernel'][1], kernel.T)
    weights.vision_params(tensors, TINY_VISION)
    tensors['modality_trunks.vision.blocks.2.norm_1.bias'] = np.zeros(32)
    with pytest.raises(ValueError, match='unexpected: modality_trunks.vision.blocks.2.norm_1.bias'):
        weights.vision_params(tensors, TINY_VISION)


def test_a_patch_covers_both_frames():
    """The kernel's axes: the same picture in the other frame gives another vector, and colours are not mixed up."""
    tensors = goldens.fill(_vision(TINY_VISION))
    kernel = np.asarray(tensors['modality_preprocessors.vision.rgbt_stem.proj.1.weight'])
    params = weights.vision_params(tensors, TINY_VISION)
    ours = params['patches']['kernel'].reshape(2, 14, 14, 3, 32)
    assert ours[1, 3, 5, 2, 7] == kernel[7, 2, 1, 3, 5]
