"""The resampler against tones, whose resampled form is known."""
import numpy as np
import pytest

from mmaudio_jax import resampling


def tone(samples, rate):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate).astype(np.float32)


def test_resampling_keeps_a_tone_and_its_place():
    ours = resampling.resample(tone(44_100, 44_100), 44_100, 16_000)
    assert ours.shape == (16_000,)
    assert np.abs(ours - tone(16_000, 16_000))[500:-500].max() < 1e-6  # measured 9e-8
    above = np.sin(2 * np.pi * 9_000 * np.arange(44_100) / 44_100)  # above the new Nyquist frequency
    assert np.abs(resampling.resample(above, 44_100, 16_000))[500:-500].max() < 1e-5  # measured 1.5e-8


@pytest.mark.parametrize('rates', [(44_100, 16_000), (48_000, 16_000), (16_000, 44_100), (8_000, 44_100),
                                   (22_050, 44_100), (96_000, 16_000)])
@pytest.mark.parametrize('samples', [1, 700, 50_001])
def test_the_matrix_product_is_the_filter(rates, samples, monkeypatch):
    noise = np.random.default_rng(0).standard_normal(samples).astype(np.float32)
    monkeypatch.setattr(resampling, 'ROWS', 7)
    ours = resampling.resample(noise, *rates)
    monkeypatch.setattr(resampling, 'MOST_PHASES', 0)
    # Measured: 3e-6 where the peak is 4.4; the product is in float32.
    np.testing.assert_allclose(ours, resampling.resample(noise, *rates), atol=5e-6)


def test_rates_without_a_common_divisor():
    assert np.abs(resampling.resample(tone(22_051, 22_051), 22_051, 16_000) - tone(16_000, 16_000))[500:-500].max() < 1e-6
