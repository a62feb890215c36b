"""The resampler against tones, whose resampled form is known."""
import numpy as np

from mmaudio_jax import resampling


def tone(samples, rate):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate).astype(np.float32)


def test_resampling_keeps_a_tone_and_its_place():
    ours = resampling.resample(tone(44_100, 44_100), 44_100, 16_000)
    assert ours.shape == (16_000,)
    assert np.abs(ours - tone(16_000, 16_000))[500:-500].max() < 1e-6  # measured 9e-8
    above = np.sin(2 * np.pi * 9_000 * np.arange(44_100) / 44_100)  # above the new Nyquist frequency
    assert np.abs(resampling.resample(above, 44_100, 16_000))[500:-500].max() < 1e-5  # measured 1.5e-8
