"""Onset scores: does the sound start when the picture says so?

The Greatest Hits protocol (Owens et al., arXiv 1512.08512, as CondFoleyGen, arXiv 2304.10521, and MMAudio measure it) without
its slips: the detector's threshold `delta` and the match window are two numbers, confidence is the |x| envelope's peak,
a clip in which nothing is detected scores 0, and truth past the last detection still counts as missed.

The detector works at 22 050 Hz with a hop of 512 samples (23 ms), and reports the frame in which the spectral flux peaks:
late by 18 to 26 ms on synthetic strikes (noise floor −100 to −40 dB; deviation 7 ms: the hop's rounding). Callers pass
`lag_s`, which is subtracted (one hop leaves −5 to +3 ms; 0 is the published protocol). librosa's backtracking is no
remedy: it leads by 13 to 27 ms and deviates by up to 21 ms. An onset in the first 35 ms of a clip cannot be detected.
"""
from collections.abc import Sequence
import dataclasses

import librosa
import numpy as np

SAMPLE_RATE_HZ = 22_050
HOP_LENGTH = 512
NMS_WINDOW_S = 0.05  # of two detections closer than this the more confident one stays


@dataclasses.dataclass(frozen=True)
class Onsets:
    """Detected onsets of one clip, in time order.

    Attributes:
      times_s: [P] float64, seconds from the start of the clip.
      confidences: [P] float64 in [0, 1]: the loudest |sample| within 50 ms over the loudest of the clip.
    """
    times_s: np.ndarray
    confidences: np.ndarray


@dataclasses.dataclass(frozen=True)
class ClipScore:
    """What one clip adds to the scores, for one match window.

    Attributes:
      truths, predictions, hits: counts; hits is the largest possible number of one-to-one matches within the window.
      confidences: [P] float64, falling.
      confident_hits: [P] bool, whether each of these found an unused truth when visited in this order.
      errors_s: [hits] float64, |predicted − true| of the matched pairs, seconds.
    """
    truths: int
    predictions: int
    hits: int
    confidences: np.ndarray
    confident_hits: np.ndarray
    errors_s: np.ndarray

    def rates(self) -> dict[str, float]:
        """accuracy (recall), precision, f1 and average_precision of this clip, each in [0, 1]."""
        return _rates(self.hits, self.predictions, self.truths, self.confident_hits)


def detect_onsets(waveform: np.ndarray, sample_rate_hz: int, delta: float, lag_s: float) -> Onsets:
    """Onsets of `waveform` [samples], float, at `sample_rate_hz`.

    Args:
      waveform: mono sound; silence has no onsets.
      sample_rate_hz: of the waveform; it is resampled to 22 050 Hz.
      delta: how far the normalised spectral flux must stand above its local mean (librosa's peak picking).
      lag_s: the detector's lag, subtracted from every time.

    Raises:
      ValueError: a sample is not finite.
    """
    waveform = np.asarray(waveform, np.float32)
    if not np.isfinite(waveform).all():
        raise ValueError('the sound is not finite: its onsets cannot be detected')
    if sample_rate_hz != SAMPLE_RATE_HZ:
        waveform = librosa.resample(waveform, orig_sr=sample_rate_hz, target_sr=SAMPLE_RATE_HZ)
    envelope = np.abs(waveform)
    if not envelope.size or not envelope.max() > 0:
        return Onsets(np.zeros(0), np.zeros(0))
    envelope = envelope / envelope.max()
    times = librosa.onset.onset_detect(y=waveform, sr=SAMPLE_RATE_HZ, hop_length=HOP_LENGTH, delta=delta, units='time')
    times = np.maximum(times - lag_s, 0.0)
    confidences = np.array([_peak(envelope, time) for time in times], np.float64)
    kept: list[int] = []
    for index in np.argsort(-confidences, kind='stable'):
        if all(abs(times[index] - times[other]) >= NMS_WINDOW_S for other in kept):
            kept.append(index)
    kept.sort()
    return Onsets(times[kept], confidences[kept])


def score_onsets(detected: Onsets, truth_s: Sequence[float], window_s: float) -> ClipScore:
    """Matches detected onsets with the true ones, `truth_s` in seconds, at most `window_s` apart."""
    truth = np.sort(np.asarray(truth_s, np.float64))
    pairs = match(detected.times_s, truth, window_s)
    order = np.argsort(-detected.confidences, kind='stable')
    unused = np.ones(len(truth), bool)
    confident_hits = np.zeros(len(order), bool)
    for rank, index in enumerate(order):
        distances = np.where(unused, np.abs(truth - detected.times_s[index]), np.inf)
        if len(truth) and distances.min() <= window_s:
            confident_hits[rank] = True
            unused[distances.argmin()] = False
    errors = np.array([abs(detected.times_s[i] - truth[j]) for i, j in pairs], np.float64)
    return ClipScore(len(truth), len(order), len(pairs), detected.confidences[order], confident_hits, errors)


def match(predicted_s: np.ndarray, truth_s: np.ndarray, window_s: float) -> list[tuple[int, int]]:
    """One-to-one pairs (index in `predicted_s`, index in `truth_s`), both sorted, at most `window_s` apart.

    As many pairs as possible; among those the ones with the smallest sum of distances. Pairs never need to cross, so that
    a table over prefixes is exact.
    """
    rows, columns = len(predicted_s), len(truth_s)
    best = np.zeros((rows + 1, columns + 1))  # −(pairs) + (summed distance, scaled below 1)
    scale = 1.0 / (1.0 + min(rows, columns) * window_s)
    distance = np.abs(np.subtract.outer(predicted_s, truth_s))
    cost = np.where(distance <= window_s, distance * scale - 1.0, np.inf)
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            best[i, j] = min(best[i - 1, j], best[i, j - 1], best[i - 1, j - 1] + cost[i - 1, j - 1])
    pairs, i, j = [], rows, columns
    while i and j:
        if best[i, j] == best[i - 1, j]:
            i -= 1
        elif best[i, j] == best[i, j - 1]:
            j -= 1
        else:
            i, j = i - 1, j - 1
            pairs.append((i, j))
    return pairs[::-1]


def aggregate(scores: Sequence[ClipScore]) -> dict:
    """Scores over clips, of one window.

    Returns:
      clips (scored), clips_without_truth (skipped, counted), truths, predictions, hits; `macro`: the mean over clips of
      accuracy, precision, f1 and average_precision; `micro`: the same over all onsets together; median_error_ms: the
      median |predicted − true| of all matched pairs, None without any. Without a scored clip the rates are 0.
    """
    scored = [score for score in scores if score.truths]
    hits, predictions, truths = (sum(getattr(score, name) for score in scored) for name in ('hits', 'predictions', 'truths'))
    confidences = np.concatenate([np.zeros(0), *(score.confidences for score in scored)])
    flags = np.concatenate([np.zeros(0, bool), *(score.confident_hits for score in scored)])
    micro = _rates(hits, predictions, truths, flags[np.argsort(-confidences, kind='stable')])
    rates = [score.rates() for score in scored]
    macro = {name: float(np.mean([rate[name] for rate in rates])) if rates else 0.0 for name in micro}
    errors = np.concatenate([np.zeros(0), *(score.errors_s for score in scored)])
    return {
        'clips': len(scored), 'clips_without_truth': len(scores) - len(scored),
        'truths': truths, 'predictions': predictions, 'hits': hits,
        'macro': macro, 'micro': micro,
        'median_error_ms': float(np.median(errors) * 1e3) if errors.size else None,
    }


def _peak(envelope: np.ndarray, time_s: float) -> float:
    """The largest value of `envelope` [samples at 22 050 Hz] within 50 ms of `time_s`."""
    start, stop = (max(0, round((time_s + side) * SAMPLE_RATE_HZ)) for side in (-NMS_WINDOW_S, NMS_WINDOW_S))
    return float(envelope[start:stop].max(initial=0.0))


def _rates(hits: int, predictions: int, truths: int, confident_hits: np.ndarray) -> dict[str, float]:
    """Rates from counts; `confident_hits` [P] bool by falling confidence. A rate that is undefined is 0."""
    precision_at = np.cumsum(confident_hits) / np.arange(1, len(confident_hits) + 1)
    return {
        'accuracy': hits / truths if truths else 0.0,
        'precision': hits / predictions if predictions else 0.0,
        'f1': 2 * hits / (predictions + truths) if predictions + truths else 0.0,
        'average_precision': float(precision_at[confident_hits].sum() / truths) if truths else 0.0,
    }
