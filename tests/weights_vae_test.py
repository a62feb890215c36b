import numpy as np
import pytest

from mmaudio_jax.models import vae
from mmaudio_jax.weights import vae as vae_weights
from tests import official_tensors
from tests.golden import synthetic_weights

TINY = vae.VAE(mel_bins=6, latent_channels=3, width=8)
# The official sizes and ours; numbers of taps are in neither column.
_SIZES = {80: 6, 20: 3, 40: 6, 384: 8, 768: 16, 1536: 32, 4608: 96}


@pytest.fixture
def tensors():
    manifest = synthetic_weights.load_manifest('vae_16k')
    return {name: synthetic_weights.fill(name, tuple(_SIZES.get(n, n) for n in shape)) for name, shape in manifest.items()}


def test_kernels_are_normalised_per_output_channel(tensors):
    kernel = official_tensors.params_of(vae_weights, tensors, TINY)['decoder']['up_0']['block_1']['conv2']['kernel']
    official = tensors['decoder.up.0.block.1.conv2.weight'].astype(np.float64)
    rms = np.sqrt((official**2).mean((1, 2), keepdims=True))
    np.testing.assert_allclose(kernel, (official / (1e-4 + rms) / np.sqrt(8 * 3)).transpose(2, 1, 0), atol=1e-6)


def test_attention_channels_are_de_interleaved(tensors):
    kernel = official_tensors.params_of(vae_weights, tensors, TINY)['encoder']['mid']['attn_1']['qkv']['kernel']
    official = tensors['encoder.mid.attn_1.qkv.weight']
    # Official channel c · 3 + j is ours j · 32 + c; normalised channels point the same way.
    for j, c in ((0, 0), (1, 5), (2, 31)):
        ours, theirs = kernel[0, :, j * 32 + c], official[c * 3 + j, :, 0]
        assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99999


def test_export_and_import_are_inverse(tensors):
    tensors['decoder.conv_in.weight'] = 1e-3 * tensors['decoder.conv_in.weight']  # small enough for the 1e-4 to act
    params = official_tensors.params_of(vae_weights, tensors, TINY)
    exported = vae_weights.from_params(params, TINY)
    assert exported.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_allclose(exported[name], tensor, rtol=5e-3, err_msg=name)  # float32 keeps the magnitude to 1e-3
    again = official_tensors.params_of(vae_weights, exported, TINY)
    for path in (('decoder', 'conv_in', 'kernel'), ('encoder', 'mid', 'attn_1', 'qkv', 'kernel')):
        first, second = params, again
        for key in path:
            first, second = first[key], second[key]
        np.testing.assert_allclose(second, first, atol=1e-6)


def test_kernels_that_no_file_gives_are_not_exported(tensors):
    params = official_tensors.params_of(vae_weights, tensors, TINY)
    params['decoder']['conv_in']['kernel'] = 2 * params['decoder']['conv_in']['kernel']
    with pytest.raises(ValueError, match='decoder/conv_in/kernel.*only imported VAEs'):
        vae_weights.from_params(params, TINY)


def test_every_wrong_tensor_is_named(tensors):
    del tensors['encoder.conv_in.weight']
    tensors['encoder.stray'] = np.zeros(3)
    tensors['data_mean'] = np.zeros((1, 5, 1))
    with pytest.raises(ValueError) as error:
        official_tensors.params_of(vae_weights, tensors, TINY)
    for text in ('3 tensors', 'missing: encoder.conv_in.weight (8, 6, 3)', 'unexpected: encoder.stray (3,)',
                 'wrong shape: data_mean is (1, 5, 1), must be (1, 6, 1)'):
        assert text in str(error.value)
