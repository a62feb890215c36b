"""Synchformer's sound branch and offset head (and its picture branch once more) against the public modules."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import synchformer
from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.weights import synchformer as picture_weights
from mmaudio_jax.weights import synchformer_offset as weights
from mmaudio_jax.weights import tables
from tests.golden import evaluation_goldens as goldens
from tests.golden import synthetic_weights

SHAPES = (tables.shapes(weights.SOUND, synchformer_offset.SoundBranch(), weights.SOUND_INPUTS)
          | tables.shapes(weights.HEAD, synchformer_offset.OffsetHead(), weights.HEAD_INPUTS))


def test_goldens():
    tensors = goldens.fill(SHAPES)
    mel = np.random.RandomState(1).normal(size=(2, 128, 66)).astype(np.float32).swapaxes(1, 2)
    sound = jax.jit(synchformer_offset.SoundBranch().apply)({'params': weights.sound_params(tensors)}, mel)
    assert goldens.error(goldens.entry('sync', 'sync afeats'), sound[None]) < 2e-5  # measured 2.2e-6
    random = np.random.RandomState(3)
    features = [random.normal(size=(2, 14, tokens, 768)).astype(np.float32) for tokens in (8, 6)]
    logits = jax.jit(synchformer_offset.OffsetHead().apply)({'params': weights.head_params(tensors)}, *features)
    golden = goldens.entry('sync', 'sync compare')
    assert goldens.error(golden, logits) < 2e-5  # measured 2.8e-6
    assert np.argmax(logits, axis=1).tolist() == golden['argmax']


@pytest.mark.slow
def test_golden_of_the_picture_branch():
    model = synchformer.build('visual', jnp.float32)
    params = picture_weights.to_params(goldens.fill(synthetic_weights.load_manifest('synchformer_visual')), model)
    frames = 0.5 * np.random.RandomState(2).normal(size=(1, 16, 3, 224, 224)).astype(np.float32)
    features = jax.jit(model.apply)({'params': params}, frames.transpose(0, 1, 3, 4, 2))
    assert goldens.error(goldens.entry('sync', 'sync vfeats'), features[None]) < 2e-5  # measured 1.3e-6


def test_classes_are_offsets_in_steps_of_a_fifth_of_a_second():
    np.testing.assert_allclose(synchformer_offset.OFFSETS_S, np.arange(-10, 11) / 5, atol=1e-12)


def test_names_of_the_published_file():
    # 513 tensors in all, 237 460 245 numbers; the picture branch has 122 440 704.
    assert sum(np.prod(shape, dtype=int) for shape in SHAPES.values()) == 237_460_245 - 122_440_704
    assert SHAPES['afeat_extractor.ast.encoder.layer.11.attention.attention.value.weight'] == (768, 768)
    tensors = goldens.fill(SHAPES)
    del tensors['transformer.blocks.1.attn.key.bias']
    tensors['vfeat_extractor.cls_token'] = np.zeros((1, 1, 768))  # another importer's
    with pytest.raises(ValueError, match='missing: transformer.blocks.1.attn'):
        weights.head_params(tensors)
