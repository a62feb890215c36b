"""The layers against their definitions, written out plainly in NumPy."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import layers


def normal(*shape, seed=0):
    return np.random.RandomState(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize('convolution', ['matmul', 'xla', 'xla_taps'])
@pytest.mark.parametrize('taps, width, features', [(1, 3, 5), (3, 4, 6), (7, 6, 4)])
def test_conv1d_is_the_zero_padded_sum_and_so_are_its_gradients(taps, width, features, convolution):
    inputs, kernel = normal(2, 9, width), normal(taps, width, features, seed=1)
    padded = np.pad(inputs, ((0, 0), (taps // 2, taps // 2), (0, 0))).astype(np.float64)
    expected = sum(padded[:, tap:tap + 9] @ kernel[tap] for tap in range(taps))
    np.testing.assert_allclose(layers.conv1d(inputs, kernel, convolution), expected, atol=1e-5)  # measured 1.1e-6
    weights = normal(2, 9, features, seed=2)
    loss = lambda inputs, kernel: jnp.sum(layers.conv1d(inputs, kernel, convolution) * weights)
    of_inputs, of_kernel = jax.grad(loss, (0, 1))(inputs, kernel)
    by_tap = np.stack([np.einsum('BNI,BNO->IO', padded[:, tap:tap + 9], weights) for tap in range(taps)])
    np.testing.assert_allclose(of_kernel, by_tap, atol=2e-5)  # measured 1.3e-6
    padded = np.pad(weights, ((0, 0), (taps // 2, taps // 2), (0, 0))).astype(np.float64)
    expected = sum(padded[:, tap:tap + 9] @ kernel[taps - 1 - tap].T for tap in range(taps))
    np.testing.assert_allclose(of_inputs, expected, atol=1e-5)  # measured 9.5e-7


@pytest.mark.parametrize('width, hidden', [(448, 1280), (896, 2560), (128, 512), (64, 256), (96, 256), (97, 512)])
def test_mlp_hidden(width, hidden):
    assert layers.mlp_hidden(width) == hidden


def test_norms():
    inputs = 3 + 1e-3 * normal(4, 64)  # so small a deviation shows the eps
    wide = inputs.astype(np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layers.layer_norm(inputs), expected, atol=5e-4)  # measured 5.3e-5
    rounded = jnp.asarray(3 + normal(4, 64), jnp.bfloat16)
    wide = np.asarray(rounded, np.float64)
    expected = (wide - wide.mean(-1, keepdims=True)) / np.sqrt(wide.var(-1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(layers.layer_norm(rounded), expected, atol=1e-5)  # measured 5.4e-7
    tiny = 1e-4 * normal(4, 64)
    scale = normal(64, seed=1)
    expected = tiny / np.sqrt(np.square(tiny, dtype=np.float64).mean(-1, keepdims=True) + 2.0**-23) * scale
    np.testing.assert_allclose(layers.rms_norm(tiny, scale), expected, atol=1e-6)  # measured 6.4e-8


def test_modulate_scales_then_shifts():
    inputs, shift, scale = normal(2, 5, 8), normal(2, 1, 8, seed=1), normal(2, 5, 8, seed=2)
    expected = np.asarray(layers.layer_norm(inputs)) * (1 + scale) + shift
    np.testing.assert_allclose(layers.modulate(inputs, shift, scale), expected, atol=1e-6)  # measured 0


def test_rotation_turns_normed_pairs_and_keeps_only_the_distance():
    q, k, scale = normal(1, 1, 1, 64), normal(1, 1, 1, 64, seed=1), normal(64, seed=2)
    angles = layers.rotation(40, 64, 1.5)
    at = [np.asarray(layers.norm_and_rotate(np.repeat(x, 40, 1), scale, angles))[0, :, 0] for x in (q, k)]
    np.testing.assert_allclose(at[0][10] @ at[1][3], at[0][37] @ at[1][30], atol=1e-4)  # measured 4.8e-6
    assert abs(at[0][10] @ at[1][3] - at[0][10] @ at[1][4]) > 0.01
    q = np.asarray(layers.rms_norm(q, scale))
    as_complex = (q[0, 0, 0, :32] + 1j * q[0, 0, 0, 32:]) * np.exp(7j * 1.5 * 10_000.0**(-np.arange(0, 64, 2) / 64))
    expected = np.concatenate([as_complex.real, as_complex.imag])
    np.testing.assert_allclose(at[0][7], expected, atol=1e-5)  # measured 8.2e-7


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_heads_are_turned_the_same_on_tpus(dtype):
    inputs = jnp.asarray(normal(2, 5, 3, 16), dtype)
    np.testing.assert_array_equal(layers._turned_by_product(inputs), layers._turned(inputs))


def test_attention_is_the_softmax_average():
    q, k, v = (normal(2, length, 3, 8, seed=seed) for seed, length in enumerate((5, 7, 7)))
    logits = np.einsum('bnhk,bmhk->bhnm', q, k).astype(np.float64) / np.sqrt(8)
    weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = np.einsum('bhnm,bmhk->bnhk', weights, v).reshape(2, 5, 24)
    np.testing.assert_allclose(layers.attention(q, k, v), expected, atol=1e-5)  # measured 2.7e-7


@pytest.mark.parametrize('dtype, bound', [('float32', 1e-5), ('bfloat16', 2e-2)])  # measured 2.4e-7, 4.5e-3
def test_gradient_of_attention(dtype, bound):
    """The gradient by hand is that of the formula."""
    q, k, v, weight = (jnp.asarray(normal(2, length, 3, 8, seed=seed), dtype) for seed, length in enumerate((5, 7, 7, 5)))

    def formula(q, k, v):
        weights = jax.nn.softmax(jnp.einsum('BNHK,BMHK->BHNM', q, k) / np.sqrt(8), axis=-1)
        return jnp.sum(jnp.einsum('BHNM,BMHK->BNHK', weights, v) * weight.astype(jnp.float32))

    def ours(q, k, v):
        return jnp.sum((layers.attention(q, k, v) * weight.reshape(2, 5, 24)).astype(jnp.float32))

    expected = jax.grad(formula, argnums=(0, 1, 2))(*(array.astype(jnp.float32) for array in (q, k, v)))
    for gradient, wanted in zip(jax.grad(ours, argnums=(0, 1, 2))(q, k, v), expected):
        assert gradient.dtype == dtype
        np.testing.assert_allclose(gradient.astype(jnp.float32), wanted, atol=bound * np.abs(wanted).max())


def test_attention_logits_are_float32_under_bfloat16():
    """Logits 100 and 100.25 are one number in bfloat16: the weights would be equal."""
    q = jnp.asarray([16, 2, 0, 0], jnp.bfloat16).reshape(1, 1, 1, 4)
    k = jnp.asarray([[12.5, 0, 0, 0], [12.5, 0.25, 0, 0]], jnp.bfloat16).reshape(1, 2, 1, 4)
    v = jnp.asarray([[0] * 4, [1] * 4], jnp.bfloat16).reshape(1, 2, 1, 4)
    mixed = layers.attention(q, k, v)
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(mixed.astype(np.float32), 1 / (1 + np.exp(-0.25)), atol=2e-3)  # measured 3.2e-4


def test_time_frequencies():
    np.testing.assert_allclose(layers.time_frequencies(256, 1)[[0, 64, 127]], [1, 0.01, 10_000**(-254 / 256)], rtol=1e-6)
    np.testing.assert_allclose(layers.time_frequencies(896, 2)[[0, 224]], [10_000, 100], rtol=1e-6)
    assert layers.time_frequencies(896, 2).dtype == np.float32


def test_initialisation():
    """U(±1/sqrt(fan in)) for convolutions, Xavier for matrices, the parts of Linears as one matrix."""
    inputs = jnp.zeros((1, 4, 64))
    conv = layers.Conv(128, 3, jnp.float32, 'xla').init(jax.random.key(0), inputs)['params']
    bound = 1 / np.sqrt(3 * 64)
    assert 0.99 * bound < np.abs(conv['kernel']).max() <= bound and 0.9 * bound < np.abs(conv['bias']).max() <= bound
    matrices = layers.GatedMLP(1, jnp.float32, 'xla').init(jax.random.key(0), inputs)['params']
    xavier = np.sqrt(6 / (64 + 256))
    for kernel in matrices.values():
        assert 0.99 * xavier < np.abs(kernel).max() <= xavier
    assert np.abs(matrices['w1'] - matrices['w3']).max() > xavier
    parts = layers.Linears(3, (2, 16), jnp.float32).init(jax.random.key(0), inputs)['params']
    xavier = np.sqrt(6 / (64 + 3 * 32))
    assert 0.99 * xavier < np.abs(parts['kernel']).max() <= xavier and not np.any(parts['bias'])
    zero = layers.Conv(128, 3, jnp.float32, 'xla', zero_init=True).init(jax.random.key(0), inputs)['params']
    assert not np.any(zero['kernel']) and not np.any(zero['bias'])


def test_the_time_embedding_is_float32_on_tpus_too():
    embedding = layers.TimeEmbedding(8, 1)
    with jax.default_matmul_precision('default'):
        params = jax.eval_shape(embedding.init, jax.random.key(0), jnp.zeros(2))
        text = jax.jit(embedding.apply).lower(params, jnp.zeros(2)).as_text()
    assert text.count('dot_general') == text.count('precision = [HIGHEST, HIGHEST]') == 2


def test_time_frequencies_do_not_depend_on_the_processor():
    """NumPy's float32 power differed in 86 of 448 last digits on one: a thousandth of the flow in version 2."""
    powers = [np.float32(math.pow(10_000.0, float(np.float32(i) / np.float32(896)))) for i in range(0, 896, 2)]
    expected = [np.float32(1) / power * np.float32(10_000) for power in powers]
    np.testing.assert_array_equal(layers.time_frequencies(896, 2), expected)
