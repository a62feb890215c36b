import numpy as np
import pytest

from mmaudio_jax.models import tiled_conv


@pytest.mark.parametrize('taps, size', [(7, 16), (11, 24), (3, 4)])
@pytest.mark.parametrize('dilation, length', [(1, 50), (3, 50), (5, 4)])
def test_convolution_against_its_definition(taps, size, dilation, length):
    rng = np.random.default_rng(taps)
    x, kernel = rng.standard_normal((2, length, 3)), rng.standard_normal((taps, 3, 4))
    expected = np.zeros((2, length, 4))
    for t in range(length):
        for tap in range(taps):
            source = t + dilation * (tap - taps // 2)
            if 0 <= source < length:
                expected[:, t] += x[:, source] @ kernel[tap]
    ours = tiled_conv.conv(x.astype(np.float32), kernel.astype(np.float32), dilation, size)
    # Measured: 6.2e-7 of the results' deviation.
    assert np.abs(ours - expected).max() / expected.std() < 3e-6


@pytest.mark.parametrize('size, products', [(4, 5), (16, 23), (24, 35)])
def test_products_of_a_tile(size, products):
    from_steps, from_taps, to_steps = tiled_conv.transforms(3, size)
    assert from_steps.shape == (products, size) and from_taps.shape == (products, 3) and to_steps.shape == (size - 2, products)
