"""LAION-CLAP: HTSAT against the public module, the cosine of both networks' outputs, and the importers."""
import jax
import numpy as np
import pytest

from mmaudio_jax import filterbanks
from mmaudio_jax.models import clap
from mmaudio_jax.models import htsat
from mmaudio_jax.weights import clap as weights
from mmaudio_jax.weights import tables
from tests.golden import evaluation_goldens as goldens

TINY = clap.ClapText(vocabulary=50, positions=20, width=24, depth=2, heads=3)
TINY_SHAPES = tables.shapes(weights.TEXT, TINY, weights.TEXT_INPUTS)


@pytest.mark.slow
def test_golden_of_htsat():
    tensors = goldens.fill(tables.shapes(weights.HTSAT, htsat.HTSAT(), weights.POWER_INPUTS))
    tensors['logmel_extractor.melW'] = goldens.clap_filters()
    params = tables.to_params(weights.HTSAT, htsat.HTSAT(), weights.POWER_INPUTS, tensors)
    power = filterbanks.clap_power(np.pad(goldens.signal(48_000), (0, 96_000))[None])
    result = jax.jit(htsat.HTSAT().apply)({'params': params}, power)
    assert goldens.error(goldens.entry('clap', 'HTSAT'), result) < 2e-5  # measured 2.9e-6


def test_time_is_stretched_with_its_ends_in_place():
    mel = np.arange(1001, dtype=np.float32)[None, :, None] * np.ones((1, 1, 64), np.float32)
    picture = np.asarray(htsat.picture(mel))[0]
    quarters = picture.reshape(4, 64, 256)
    np.testing.assert_array_equal(quarters[:, 0], quarters[:, 63])
    line = quarters[:, 0].reshape(-1)
    assert line[0] == 0 and line[-1] == 1000
    # This cubic (a = −0.75) does not keep a line straight: measured 0.011.
    np.testing.assert_allclose(np.diff(line[2:-2]), 1000 / 1023, atol=0.015)


def test_padding_and_the_company_of_other_texts_change_nothing():
    params = weights.text_params(goldens.fill(TINY_SHAPES), TINY)
    apply = jax.jit(TINY.apply)
    short = np.array([[0, 7, 9, 2]])
    alone = apply({'params': params}, short)
    batch = np.full((2, 10), clap.PADDING)
    batch[0, :4], batch[1] = short, np.arange(2, 12)
    together = apply({'params': params}, batch)
    np.testing.assert_allclose(together[0], alone[0], atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    assert abs(float(together[0] @ together[1])) < 0.999


def test_text_against_the_public_module():
    """Recorded from RobertaModel of transformers 5.24 with torch 2.13 on the same stand-in weights, and the projection."""
    tokens = np.full((2, 10), clap.PADDING)
    tokens[0, :4], tokens[1] = [0, 7, 9, 2], [0, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    expected = [[0.1352304, 0.0402161, 0.0885013, 0.0600674, 0.0127846, 0.0316249],
                [0.1287171, 0.0130577, 0.0753732, 0.0444334, 0.0076145, 0.0378918]]
    params = weights.text_params(goldens.fill(TINY_SHAPES), TINY)
    result = jax.jit(TINY.apply)({'params': params}, tokens)
    np.testing.assert_allclose(result[:, :6], expected, atol=1e-5)  # measured 6e-8


def test_names_of_the_published_file():
    audio = tables.shapes(weights.AUDIO, clap.ClapAudio(), weights.POWER_INPUTS)
    assert audio['audio_branch.logmel_extractor.melW'] == (513, 64) and audio['audio_projection.2.bias'] == (512,)
    text = tables.shapes(weights.TEXT, clap.ClapText(), weights.TEXT_INPUTS)
    count = sum(np.prod(shape, dtype=int) for shape in text.values())
    assert count == 124_645_632 + 2 * 512 + 768 * 512 + 512 * 512  # roberta-base and the projection
    tensors = {f'module.{name}': tensor for name, tensor in goldens.fill(TINY_SHAPES).items()}
    tensors['module.logit_scale_a'] = np.zeros(())  # known, and not used
    tensors['module.audio_branch.bn0.weight'] = np.zeros(64)
    weights.text_params(tensors, TINY)
    tensors['module.text_branch.encoder.layer.2.output.dense.bias'] = np.zeros(24)
    with pytest.raises(ValueError, match='unexpected: text_branch.encoder.layer.2.output.dense.bias'):
        weights.text_params(tensors, TINY)
