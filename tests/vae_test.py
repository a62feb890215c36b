import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import vae
from mmaudio_jax.weights import vae as vae_weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.conftest import QUICK
from tests.golden import synthetic_weights

TINY = vae.VAE(mel_bins=6, latent_channels=3, width=8)
encode, decode, reconstruct = (
    jax.jit(lambda params, x, method=method: TINY.apply({'params': params}, x, method=method), compiler_options=QUICK)
    for method in ('encode', 'decode', '__call__'))


@pytest.fixture(scope='module')
def params():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 4, 6)))['params']
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return params | {'data_mean': np.zeros(6, np.float32), 'data_std': np.ones(6, np.float32)}


@pytest.mark.parametrize('length', [2, 7])
def test_two_mel_frames_are_one_latent(params, length):
    mel = jax.random.normal(jax.random.key(1), (2, length, 6))
    mean, std = encode(params, mel)
    assert mean.shape == std.shape == (2, length // 2, 3) and (std > 0).all()
    assert decode(params, mean).shape == (2, length // 2 * 2, 6)


def test_a_result_does_not_depend_on_its_batch(params):
    mel = jax.random.normal(jax.random.key(1), (3, 10, 6))
    np.testing.assert_allclose(reconstruct(params, mel)[1:2], reconstruct(params, mel[1:2]), atol=1e-5)


def test_decoding_needs_no_encoder(params):
    latents = jax.random.normal(jax.random.key(1), (1, 5, 3))
    part = {name: params[name] for name in ('data_mean', 'data_std', 'decoder')}
    np.testing.assert_array_equal(decode(part, latents), decode(params, latents))


def test_statistics_are_those_of_the_mel(params):
    shifted = params | {'data_mean': jnp.full(6, 3.0), 'data_std': jnp.full(6, 2.0)}
    mel = jnp.round(1024 * jax.random.normal(jax.random.key(1), (1, 10, 6))) / 1024  # 2 mel + 3 is exact
    ours, expected = reconstruct(shifted, 2 * mel + 3), 2 * reconstruct(params, mel) + 3
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_convolution_against_its_definition():
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 5, 4), np.float32), rng.standard_normal((3, 4, 7), np.float32)
    expected = np.zeros((2, 5, 7))
    for t in range(5):
        for tap in range(3):
            if 0 <= t + tap - 1 < 5:
                expected[:, t] += x[:, t + tap - 1] @ kernel[tap]
    np.testing.assert_allclose(vae.Conv(7, 3).apply({'params': {'kernel': kernel}}, x), expected, atol=1e-5)


def test_wide_convolutions_are_those_of_other_devices():
    """Winograd's, which CPUs compute, against the product, which the other devices do."""
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, 9, 256), np.float32), rng.standard_normal((3, 256, 300), np.float32)
    apply = jax.jit(lambda x: vae.Conv(300, 3).apply({'params': {'kernel': kernel}}, x))
    expected = vae._convolve(x, kernel)
    assert np.abs(apply(x) - expected).max() < 3e-5 * expected.std()  # measured 4e-6
    exported = lambda platform: str(jax.export.export(apply, platforms=[platform])(x).mlir_module())
    assert exported('cpu').count('stablehlo.dot_general') == 6 and exported('tpu').count('stablehlo.dot_general') == 1


def test_unknown_rate_names_the_known_ones():
    with pytest.raises(ValueError, match="rate '48k' has no VAE; choose one of 16k, 44k"):
        vae.build('48k')


@pytest.mark.slow
@pytest.mark.parametrize('rate', ['16k', '44k'])
def test_golden(rate):
    model, golden = vae.build(rate), np.load(GOLDEN / f'vae_{rate}.npz')
    params = official_tensors.params_of(vae_weights, synthetic_weights.state_dict(f'vae_{rate}'), model)
    mel = synthetic_weights.example_input('mel', (2, model.mel_bins, 64)).swapaxes(1, 2)
    latents = synthetic_weights.example_input('z', (2, model.latent_channels, 32)).swapaxes(1, 2)
    mean, std = jax.jit(lambda p, x: model.apply({'params': p}, x, method='encode'))(params, mel)
    decoded = jax.jit(lambda p, x: model.apply({'params': p}, x, method='decode'))(params, latents)
    # Measured, mean, std, mel_out: 16k 1.4e-5, 2.1e-5, 1.5e-5; 44k 1.4e-5, 3.7e-5, 1.6e-5.
    for name, ours in (('mean', mean), ('std', std), ('mel_out', decoded)):
        expected = golden[name].swapaxes(1, 2)
        assert np.abs(ours - expected).max() / expected.std() < 1e-4, name
