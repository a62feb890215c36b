import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import anti_aliasing
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import folded
from mmaudio_jax.weights import bigvgan as bigvgan_weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.conftest import take_form_of_tpus
from tests.golden import synthetic_weights

TINY = bigvgan.BigVGAN(mel_bins=6, width=16, rates=(4, 2), tanh=True)
vocode = jax.jit(lambda params, mel: TINY.apply({'params': params}, mel))


@pytest.fixture(scope='module')
def params():
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 4, 6)))['params']
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: 0.1 * rng.standard_normal(leaf.shape, np.float32), shapes)


def activation_by_definition(x, up, down, frequency, amplitude):
    """x `[T]`: zeros between the samples, both filters in full, snake between them."""
    length = len(x)
    padded = np.pad(x, 5, mode='edge')
    doubled = np.zeros(2 * len(padded) + 11)
    for i, value in enumerate(padded):
        doubled[2 * i:2 * i + 12] += 2 * value * up
    doubled = doubled[15:15 + 2 * length]
    doubled = doubled + amplitude * np.sin(frequency * doubled)**2
    padded = np.concatenate([np.repeat(doubled[0], 5), doubled, np.repeat(doubled[-1], 6)])
    return np.array([padded[2 * t:2 * t + 12] @ down for t in range(length)])


@pytest.mark.parametrize('length', [1, 5, 11, 12, 13, 40])
def test_activation_against_its_definition(length):
    rng = np.random.default_rng(length)
    x = 3 * rng.standard_normal((2, length, 3))
    up, down = rng.standard_normal((2, 12))
    frequency, amplitude = 1 + rng.random((2, 3))
    parameters = anti_aliasing.Parameters(*(jnp.float32(p) for p in (up, down, frequency, amplitude)))
    ours = jax.jit(anti_aliasing.activation)(jnp.float32(x), parameters)
    for b in range(2):
        for c in range(3):
            expected = activation_by_definition(x[b, :, c], up, down, frequency[c], amplitude[c])
            np.testing.assert_allclose(ours[b, :, c], expected, atol=1e-4)


def test_squared_sine():
    x = np.linspace(-1e4, 1e4, 100_001).astype(np.float32)
    assert np.abs(anti_aliasing._sin_squared(jnp.asarray(x)) - np.sin(x.astype(np.float64))**2).max() < 1e-6


@pytest.mark.parametrize('rate', [2, 4, 8])
def test_upsampling_against_its_definition(rate):
    rng = np.random.default_rng(rate)
    x, taps = rng.standard_normal((5, 3)), rng.standard_normal((2 * rate, 3, 7))
    expected = np.zeros((5 * rate, 7))
    for n in range(5 * rate):
        for i in range(5):
            if 0 <= n + rate // 2 - rate * i < 2 * rate:
                expected[n] += x[i] @ taps[n + rate // 2 - rate * i]
    kernel = taps.reshape(2, rate, 3, 7).swapaxes(1, 2).reshape(2, 3, rate * 7)
    variables = {'params': {'kernel': jnp.float32(kernel), 'bias': jnp.zeros(7)}}
    np.testing.assert_allclose(bigvgan.Upsample(7, rate).apply(variables, jnp.float32(x)[None])[0], expected, atol=1e-4)


@pytest.mark.parametrize('dilation', [1, 3])
def test_convolution_against_its_definition(dilation):
    rng = np.random.default_rng(dilation)
    x, kernel = rng.standard_normal((6, 3)), rng.standard_normal((5, 3, 4))
    expected = np.zeros((6, 4))
    for t in range(6):
        for tap in range(5):
            if 0 <= t + dilation * (tap - 2) < 6:
                expected[t] += x[t + dilation * (tap - 2)] @ kernel[tap]
    np.testing.assert_allclose(folded.conv(jnp.float32(x)[None], jnp.float32(kernel), dilation)[0], expected, atol=1e-5)


@pytest.mark.parametrize('taps, dilation', [(7, 3), (11, 5)])
def test_convolution_in_tiles_is_the_convolution(taps, dilation):
    rng = np.random.default_rng(taps)
    x = jnp.asarray(rng.standard_normal((1, 200, 96), np.float32))
    kernel = jnp.asarray(rng.standard_normal((taps, 96, 96), np.float32))
    tiled = jax.jit(bigvgan._block_conv, static_argnums=2)
    assert 'convolution' not in tiled.lower(x, kernel, dilation).as_text('hlo')
    expected = folded.conv(x, kernel, dilation)
    assert jnp.abs(tiled(x, kernel, dilation) - expected).max() / expected.std() < 1e-5  # measured: 2.2e-6


@pytest.mark.parametrize('length', [1, 9])
def test_a_mel_frame_is_a_hop_of_samples(params, length):
    mel = jax.random.normal(jax.random.key(1), (2, length, 6))
    audio = vocode(params, mel)
    assert audio.shape == (2, 8 * length) and audio.dtype == jnp.float32 and (jnp.abs(audio) <= 1).all()
    np.testing.assert_allclose(audio[1:], vocode(params, mel[1:]), atol=1e-6)


def test_unknown_rate_names_the_known_ones():
    with pytest.raises(ValueError, match="rate '48k' has no vocoder; choose one of 16k, 44k"):
        bigvgan.build('48k')


@pytest.mark.parametrize('length', [1, 9])
def test_network_as_on_tpus(params, monkeypatch, length):
    mel = jax.random.normal(jax.random.key(2), (2, length, 6))
    plain, expected = vocode.lower(params, mel).as_text(), vocode(params, mel)
    take_form_of_tpus(monkeypatch)
    other = jax.jit(lambda params, mel: TINY.apply({'params': params}, mel)).lower(params, mel)
    assert other.as_text().count('stablehlo.convolution') > plain.count('stablehlo.convolution')
    np.testing.assert_allclose(other.compile()(params, mel), expected, atol=1e-5)


@pytest.mark.parametrize('steps, width', [(1, 3), (2, 3), (4, 3), (1, 256)])
def test_folded_forms_are_the_plain_ones(steps, width):
    rng = np.random.default_rng(steps)
    x = jnp.asarray(3 * rng.standard_normal((2, 40, width), np.float32))
    parameters = anti_aliasing.Parameters(*(jnp.float32(rng.random(size)) for size in (12, 12, width, width)))
    kernel = jnp.asarray(rng.standard_normal((5, width, 4), np.float32))
    rows = folded.fold(x, steps)
    activated = folded.unfold(jax.jit(anti_aliasing.folded_activation, static_argnums=2)(rows, parameters, steps), steps)
    np.testing.assert_allclose(activated, anti_aliasing.activation(x, parameters), atol=1e-4, rtol=1e-5)
    for dilation in (1, 3):
        convolved = folded.unfold(folded.conv(rows, kernel, dilation, steps), steps)
        np.testing.assert_allclose(convolved, folded.conv(x, kernel, dilation), atol=1e-4, rtol=1e-5)
    taps = jnp.asarray(rng.standard_normal((2, width, 4 * 5), np.float32))
    np.testing.assert_allclose(bigvgan._folded_upsample(x, taps, 4), bigvgan._upsample(x, taps, 4), atol=1e-4, rtol=1e-5)


def error_against_golden(rate, checkpoint):
    model = bigvgan.build(rate)
    params = official_tensors.params_of(bigvgan_weights, synthetic_weights.state_dict(checkpoint), model)
    mel = synthetic_weights.example_input('vocoder_mel', (1, model.mel_bins, 24), scale=0.5).swapaxes(1, 2)
    audio = jax.jit(lambda p, x: model.apply({'params': p}, x))(params, mel)
    expected = np.load(GOLDEN / f'vocoder_{rate}.npz')['audio'][:, 0]
    return np.abs(audio - expected).max() / expected.std()


@pytest.mark.slow
@pytest.mark.parametrize('rate, checkpoint', [('16k', 'bigvgan_16k'), ('44k', 'bigvgan_v2_44k')])
def test_golden(rate, checkpoint):
    assert error_against_golden(rate, checkpoint) < 1e-4  # measured: 16k 8.4e-6, 44k 7.3e-6


@pytest.mark.slow
def test_golden_in_the_form_of_tpus(monkeypatch):
    take_form_of_tpus(monkeypatch)
    assert error_against_golden('44k', 'bigvgan_v2_44k') < 1e-4  # measured: 6.7e-6
