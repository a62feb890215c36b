import numpy as np
import pytest

from mmaudio_jax.models import bigvgan
from mmaudio_jax.weights import bigvgan as bigvgan_weights
from tests import official_tensors
from tests.golden import synthetic_weights

TINY = bigvgan.BigVGAN(mel_bins=6, width=64, rates=(4, 4, 2, 2, 2, 2), tanh=True)
# The official sizes and ours; numbers of taps are in neither column.
_SIZES = {80: 6, 1536: 64, 768: 32, 384: 16, 192: 8, 96: 4, 48: 2, 24: 1}


@pytest.fixture
def tensors():
    manifest = synthetic_weights.load_manifest('bigvgan_16k')
    return {name: synthetic_weights.fill(name, tuple(_SIZES.get(n, n) for n in shape)) for name, shape in manifest.items()}


def weight(tensors, module):
    g, v = (tensors[f'{module}.weight_{part}'].astype(np.float64) for part in 'gv')
    return g * v / np.sqrt((v**2).sum((1, 2), keepdims=True))


def test_weight_norm_is_multiplied_out(tensors):
    params = official_tensors.params_of(bigvgan_weights, tensors, TINY)
    np.testing.assert_allclose(params['conv_pre']['kernel'], weight(tensors, 'conv_pre').transpose(2, 1, 0), atol=1e-6)
    taps = weight(tensors, 'ups.1.0')  # (D, out, 8 taps), rate 4
    kernel = params['ups_1']['kernel'].reshape(2, 32, 4, 16)
    for tap in range(8):
        np.testing.assert_allclose(kernel[tap // 4, :, tap % 4], taps[:, :, tap], atol=1e-6)


def test_layers_of_a_block_are_in_order(tensors):
    block = official_tensors.params_of(bigvgan_weights, tensors, TINY)['resblocks_4']
    for layer, conv in enumerate(('convs1.0', 'convs2.0', 'convs1.1', 'convs2.1', 'convs1.2', 'convs2.2')):
        np.testing.assert_allclose(block['kernel'][layer], weight(tensors, f'resblocks.4.{conv}').transpose(2, 1, 0), atol=1e-6)
        activation = f'resblocks.4.activations.{layer}'
        np.testing.assert_array_equal(block['bias'][layer], tensors[f'resblocks.4.{conv}.bias'])
        np.testing.assert_array_equal(block['up'][layer], tensors[f'{activation}.upsample.filter'][0, 0])
        np.testing.assert_array_equal(block['down'][layer], tensors[f'{activation}.downsample.lowpass.filter'][0, 0])
        np.testing.assert_allclose(block['frequency'][layer], np.exp(tensors[f'{activation}.act.alpha']), rtol=1e-6)
        np.testing.assert_allclose(block['amplitude'][layer], np.exp(-tensors[f'{activation}.act.beta']), rtol=1e-6)


def test_newer_names_of_weight_norm(tensors):
    newer = {}
    for name, tensor in tensors.items():
        for old, new in (('weight_g', 'original0'), ('weight_v', 'original1')):
            name = name.replace(old, f'parametrizations.weight.{new}')
        newer[name] = tensor
    assert newer.keys() != tensors.keys()
    ours, expected = (official_tensors.params_of(bigvgan_weights, t, TINY) for t in (newer, tensors))
    np.testing.assert_array_equal(ours['resblocks_0']['kernel'], expected['resblocks_0']['kernel'])


def test_every_wrong_tensor_is_named(tensors):
    del tensors['conv_post.bias']
    tensors['stray'] = np.zeros(3)
    tensors['ups.0.0.weight_v'] = np.zeros((64, 32, 7))
    with pytest.raises(ValueError) as error:
        official_tensors.params_of(bigvgan_weights, tensors, TINY)
    for text in ('3 tensors', 'missing: conv_post.bias (1,)', 'unexpected: stray (3,)',
                 'wrong shape: ups.0.0.weight_v is (64, 32, 7), must be (64, 32, 8)'):
        assert text in str(error.value)
