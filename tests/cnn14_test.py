"""PANNs' Cnn14 at 16 kHz against the public module, and its importer."""
import jax
import numpy as np
import pytest

from mmaudio_jax import filterbanks
from mmaudio_jax.models import cnn14
from mmaudio_jax.weights import cnn14 as weights
from mmaudio_jax.weights import tables
from tests.golden import evaluation_goldens as goldens

SHAPES = tables.shapes(weights.TABLE, cnn14.Cnn14(), weights.INPUTS)


def test_golden():
    tensors = goldens.fill(SHAPES)
    tensors['logmel_extractor.melW'] = goldens.panns_filters()
    params = weights.to_params(tensors)
    power = filterbanks.panns_power(goldens.signal(16_000)[None])
    features, logits = jax.jit(cnn14.embed)(params, np.concatenate([power[:, ::-1], power]))  # one by one
    assert goldens.error(goldens.entry('small', 'cnn14_16k 8 s'), features[1:]) < 2e-5  # measured 2.4e-6
    assert goldens.error(goldens.entry('small', 'cnn14_16k logits'), logits[1:]) < 2e-5  # measured 2.6e-6
    together = jax.jit(cnn14.Cnn14().apply)({'params': params}, np.concatenate([power[:, ::-1], power]))
    np.testing.assert_allclose(features, together[0], atol=2e-5)  # measured 2.4e-6
    np.testing.assert_allclose(logits, together[1], atol=2e-5)  # measured 1.3e-6


def test_the_file_for_32_khz_is_refused():
    tensors = goldens.fill(SHAPES)
    tensors['logmel_extractor.melW'] = np.zeros((513, 64), np.float32)
    tensors['spectrogram_extractor.stft.conv_real.weight'] = np.zeros((257, 1, 512))  # known, and not used
    tensors['bn0.num_batches_tracked'] = np.zeros(())
    with pytest.raises(ValueError) as error:
        weights.to_params(tensors)
    for text in ('not the one for 32 kHz (1 tensors)', 'logmel_extractor.melW is (513, 64), must be (257, 64)'):
        assert text in str(error.value)
