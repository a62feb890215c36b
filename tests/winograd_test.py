"""Winograd's convolution against the sum it stands for."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import winograd
from tests.conftest import QUICK


def test_matrices_filter_exactly():
    """A [(G g) ⊙ (B d)] is the correlation of six inputs with three taps, for every input and tap."""
    for place in range(6):
        for tap in range(3):
            result = winograd.OUTPUTS @ (winograd.KERNELS[:, tap] * winograd.INPUTS[:, place])
            np.testing.assert_allclose(result, [float(place == output + tap) for output in range(4)], atol=1e-15)


@pytest.mark.parametrize('taps', [3, 7])
@pytest.mark.parametrize('length', [1, 4, 5, 64, 250])
def test_conv_and_its_gradients_are_those_of_the_plain_sum(length, taps):
    key = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(key[0], (2, length, 96))
    kernel = jax.random.normal(key[1], (taps, 96, 160)) / np.sqrt(taps * 96)
    weights = jax.random.normal(key[2], (2, length, 160))

    def plain(inputs, kernel):
        padded = jnp.pad(inputs, ((0, 0), (taps // 2, taps // 2), (0, 0)))
        return sum(padded[:, tap:tap + length] @ kernel[tap] for tap in range(taps))

    results = []
    for function in (plain, winograd.conv):
        def with_gradients(inputs, kernel):
            result, gradient = jax.vjp(function, inputs, kernel)
            return result, *gradient(weights)
        results.append(jax.jit(with_gradients, compiler_options=QUICK)(inputs, kernel))
    for expected, result in zip(*results):
        error = np.abs(result - expected).max() / expected.std()
        assert error < 3e-5, error
