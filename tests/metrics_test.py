"""Onset scores against cases worked out by hand, brute force and synthetic strikes."""
import itertools

import numpy as np
import pytest

from mmaudio_jax import metrics

RATE = metrics.SAMPLE_RATE_HZ
LAG_S = metrics.HOP_LENGTH / RATE


def _strikes(times_s, rng, rate=RATE, seconds=4.0, noise=1e-3):
    waveform = noise * rng.normal(size=int(seconds * rate))
    for time in times_s:
        start = round(time * rate)
        k = np.arange(min(waveform.size - start, int(0.6 * rate))) / rate
        partials = np.exp(-k / 0.15)[:, None] * np.sin(2 * np.pi * rng.uniform(300, 3000, 5) * k[:, None])
        waveform[start:start + k.size] += rng.uniform(0.4, 1.0) * partials.mean(1)
    return waveform.astype(np.float32)


def _times(rng):
    times = np.cumsum(np.r_[rng.uniform(0.15, 0.8), rng.uniform(0.35, 0.9, 4)])
    return times[times < 3.8]


def _onsets(times, confidences=None):
    times = np.asarray(times, float)
    return metrics.Onsets(times, np.ones(len(times)) if confidences is None else np.asarray(confidences, float))


@pytest.mark.parametrize('rate', [RATE, 16_000])
def test_detector_finds_strikes_without_bias(rate):
    rng = np.random.default_rng(0)
    clips = [(times, metrics.detect_onsets(_strikes(times, rng, rate), rate, 0.3, LAG_S)) for times in map(_times, [rng] * 20)]
    result = metrics.aggregate([metrics.score_onsets(found, times, 0.1) for times, found in clips])
    signed = np.concatenate([[found.times_s[i] - times[j] for i, j in metrics.match(found.times_s, times, 0.1)]
                             for times, found in clips])
    assert result['micro']['f1'] > 0.99  # measured 1.0 at both rates
    assert abs(signed.mean()) < 0.005  # measured −3.1 ms and −3.8 ms; with a lag of 0 +20 ms
    assert result['median_error_ms'] < 8  # measured 6.7 and 6.5; with a lag of 0 19


def test_matching_is_maximal_with_the_smallest_error():
    rng = np.random.default_rng(1)
    for _ in range(200):
        predicted, truth = np.sort(rng.uniform(0, 1, rng.integers(0, 5))), np.sort(rng.uniform(0, 1, rng.integers(0, 5)))
        pairs = metrics.match(predicted, truth, 0.2)
        assert all(abs(predicted[i] - truth[j]) <= 0.2 for i, j in pairs)
        assert len({i for i, _ in pairs}) == len({j for _, j in pairs}) == len(pairs)
        count, error = _brute(predicted, truth)
        assert len(pairs) == count
        np.testing.assert_allclose(sum(abs(predicted[i] - truth[j]) for i, j in pairs), error, atol=1e-9)


def _brute(predicted, truth):
    """(largest number of pairs, smallest summed distance with that number), by trying every assignment."""
    best = (0, 0.0)
    small, large = sorted((predicted, truth), key=len)
    for size in range(1, len(small) + 1):
        for some in itertools.combinations(small, size):
            for others in itertools.permutations(large, size):
                gaps = np.abs(np.subtract(some, others))
                if (gaps <= 0.2).all() and (size > best[0] or gaps.sum() < best[1]):
                    best = (size, gaps.sum())
    return best


def test_one_of_eight_is_not_perfect():
    score = metrics.score_onsets(_onsets([0.5]), np.arange(8) + 0.5, 0.1)
    assert score.rates() == {'accuracy': 1 / 8, 'precision': 1.0, 'f1': 2 / 9, 'average_precision': 1 / 8}


def test_average_precision_by_hand():
    # By falling confidence: hit, miss, hit, and the fourth finds its truth used up; three truths.
    score = metrics.score_onsets(_onsets([1.0, 1.05, 2.0, 3.5], [0.9, 0.2, 0.6, 0.8]), [1.0, 2.05, 5.0], 0.1)
    assert score.hits == 2 and list(score.confident_hits) == [True, False, True, False]
    np.testing.assert_allclose(score.rates()['average_precision'], (1 / 1 + 2 / 3) / 3)
    np.testing.assert_allclose(np.sort(score.errors_s), [0.0, 0.05], atol=1e-12)


def test_nothing_detected_or_nothing_true():
    silent = metrics.detect_onsets(np.zeros(RATE, np.float32), RATE, 0.3, LAG_S)
    missed = metrics.score_onsets(silent, [0.5], 0.1)
    untrue = metrics.score_onsets(_onsets([0.5]), [], 0.1)
    assert set(missed.rates().values()) == set(untrue.rates().values()) == {0.0}
    result = metrics.aggregate([missed, untrue])
    assert (result['clips'], result['clips_without_truth'], result['median_error_ms']) == (1, 1, None)
    assert result['micro']['f1'] == result['macro']['f1'] == 0.0  # the clip without truth would have halved precision
    assert metrics.aggregate([])['macro']['f1'] == 0.0


def test_macro_is_over_clips_and_micro_over_onsets():
    good = metrics.score_onsets(_onsets([1.0]), [1.0], 0.1)
    poor = metrics.score_onsets(_onsets([0.2, 0.6, 2.0, 3.0], [.5] * 4), [2.0, 4.0, 5.0], 0.1)
    result = metrics.aggregate([good, poor])
    np.testing.assert_allclose(result['macro']['f1'], (1 + 2 / 7) / 2)
    np.testing.assert_allclose(result['micro']['f1'], 4 / 9)
    np.testing.assert_allclose(result['micro']['average_precision'], (1 + 2 / 4) / 4)


def test_micro_precision_goes_by_the_confidence_over_all_clips_and_the_median_over_all_pairs():
    unsure = metrics.score_onsets(_onsets([1.01, 2.0, 4.09], [0.5, 0.4, 0.3]), [1.0, 2.0, 4.0], 0.1)
    wrong = metrics.score_onsets(_onsets([1.0], [0.9]), [2.0], 0.1)
    for scores in ([unsure, wrong], [wrong, unsure]):
        result = metrics.aggregate(scores)
        np.testing.assert_allclose(result['micro']['average_precision'], (1 / 2 + 2 / 3 + 3 / 4) / 4)  # the miss comes first
        np.testing.assert_allclose(result['median_error_ms'], 10.0)


def test_a_sound_that_is_not_finite_is_refused():
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match='the sound is not finite'):
            metrics.detect_onsets(np.full(RATE, value, np.float32), RATE, 0.3, LAG_S)


def test_confident_neighbour_survives(monkeypatch):
    rng = np.random.default_rng(3)
    clicks = np.zeros(2 * RATE, np.float32)
    starts = 8 * metrics.HOP_LENGTH + 2 * metrics.HOP_LENGTH * np.arange(30)  # every 46 ms
    clicks[starts] = rng.uniform(0.3, 1.0, starts.size)
    found = metrics.detect_onsets(clicks, RATE, 0.0, LAG_S)
    assert found.times_s.size > 5 and (np.diff(found.times_s) >= metrics.NMS_WINDOW_S).all()
    pair = np.zeros(2 * RATE, np.float32)
    pair[[round(0.98 * RATE), round(1.08 * RATE)]] = 0.5, 1.0
    monkeypatch.setattr('librosa.onset.onset_detect', lambda **_: np.array([1.00, 1.04]))
    found = metrics.detect_onsets(pair, RATE, 0.3, 0.0)
    assert found.times_s.tolist() == [1.04] and found.confidences.tolist() == [1.0]


def test_confidence_sees_negative_peaks():
    clicks = np.zeros(2 * RATE, np.float32)
    clicks[RATE // 2], clicks[3 * RATE // 2] = 0.4, -0.8
    np.testing.assert_allclose(metrics.detect_onsets(clicks, RATE, 0.3, LAG_S).confidences, [0.5, 1.0], rtol=1e-6)
