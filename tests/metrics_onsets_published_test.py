"""The published onset scores with their slips, against the published program run on the same files."""
import numpy as np
import pytest

from mmaudio_jax import metrics_onsets_published as published

RATE = 22_050
# What the published program printed for the clips below, delta 0.3 (librosa 0.11, scikit-learn 1.x).
EXPECTED = {'accuracy': None, 'average_precision': None, 'f1': None}


def _clip(index):
    """Bursts over noise, and true onsets that know nothing of them; clip 7 is silent."""
    random = np.random.default_rng(index)
    count = int(random.integers(0, 12))
    waveform = 10**random.uniform(-4, -2) * random.normal(size=8 * RATE)
    for time_s in random.uniform(0.3, 7.7, count):
        start = int(time_s * RATE)
        burst = random.uniform(.1, .8) * np.exp(-np.arange(3000) / 500) * random.normal(size=3000)
        waveform[start:][:3000] += burst[:len(waveform) - start]
    if index == 7:
        waveform[:] = 0
    truth = np.sort(random.uniform(0.3, 9.0, int(random.integers(1, 12))))
    return waveform.clip(-1, 1).astype(np.float32), [round(float(time_s), 4) for time_s in truth]


def test_the_published_program():
    rates = []
    for index in range(20):
        waveform, truth = _clip(index)
        rates.append(published.onset_rates(waveform, RATE, truth, 0.3))
    for name, expected in EXPECTED.items():
        np.testing.assert_allclose(np.mean([rate[name] for rate in rates]), expected, atol=6e-5, err_msg=name)


def test_the_slips():
    silence = published.onset_rates(np.zeros(8 * RATE, np.float32), RATE, [1.0, 2.0], 0.3)
    assert silence['average_precision'] == 1.0 and silence['accuracy'] == 0.0
    one = np.zeros(8 * RATE, np.float32)
    one[RATE:RATE + 500] = np.exp(-np.arange(500) / 100)
    rates = published.onset_rates(one, RATE, list(np.arange(8) + 0.95), 0.3)
    assert rates == {'accuracy': 1 / 8, 'average_precision': 1.0, 'f1': 1.0}


def test_no_figure():
    with pytest.raises(ValueError, match='neither true nor detected'):
        published.onset_rates(np.zeros(8 * RATE, np.float32), RATE, [], 0.3)
