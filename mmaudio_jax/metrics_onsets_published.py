"""Greatest Hits onset scores with every slip of the published code, to compare with published numbers. Else use metrics.py.

What is wrong with them, and kept: one number is the detector's threshold and the match window; confidence is of the signed
waveform, stretched from its minimum to its maximum; thinning skips every other neighbour; the most confident candidate is
sought in the wrong list; truth after the last used detection is not counted as missed, so that one hit of eight scores AP 1
and F1 1; silence, without any detection, scores AP 1.
"""
from collections.abc import Sequence

import librosa
import numpy as np

SAMPLE_RATE_HZ = 22_050
DURATION_S = 8
_HALF = int(0.05 * SAMPLE_RATE_HZ)  # samples on each side of an onset
_TINY = 1e-6


def onset_rates(waveform: np.ndarray, sample_rate_hz: int, truth_s: Sequence[float], delta: float) -> dict[str, float]:
    """accuracy, average_precision and f1 of one clip.

    Args:
      waveform: mono, float [samples]; its first 8 s count.
      sample_rate_hz: of the waveform; it is resampled to 22 050 Hz.
      truth_s: true onsets in the order of their file; the first at 8 s or later ends them.
      delta: of the detector, and of the match in seconds.

    Raises:
      ValueError: neither truth nor detections, or a detection in the first 50 ms: the published code has no figure.
    """
    waveform = np.asarray(waveform, np.float32)
    if sample_rate_hz != SAMPLE_RATE_HZ:
        waveform = librosa.resample(waveform, orig_sr=sample_rate_hz, target_sr=SAMPLE_RATE_HZ)
    waveform = waveform[:DURATION_S * SAMPLE_RATE_HZ]
    stretched = (waveform - waveform.min()) / (waveform.max() - waveform.min() + _TINY)
    onsets = librosa.onset.onset_detect(y=waveform, sr=SAMPLE_RATE_HZ, units='samples', delta=delta)
    if len(onsets) and onsets[0] < _HALF:
        raise ValueError('a detection in the first 50 ms, on which the published code fails')
    peaks = {int(onset): float(stretched[onset - _HALF:onset + _HALF].max()) for onset in onsets}
    late = next((index for index, time_s in enumerate(truth_s) if time_s >= DURATION_S), len(truth_s))
    truth = np.asarray(truth_s[:late], np.float64) * SAMPLE_RATE_HZ
    labels, confidences, hits = _match(_thinned(peaks), peaks, stretched, truth, delta * SAMPLE_RATE_HZ)
    if not labels:
        raise ValueError('neither true nor detected onsets: the published code has no figure')
    positive, found = np.array(labels, bool), np.array(confidences)
    claimed = found > 0
    claims = 2 * (positive & claimed).sum() / max(1, positive.sum() + claimed.sum())
    return {'accuracy': hits / len(truth) if len(truth) else 0.0, 'average_precision': _average_precision(positive, found),
            'f1': float(claims)}


def _thinned(peaks: dict[int, float]) -> list[int]:
    """Onsets by falling peak, each removing its neighbours within 50 ms but for those that it skips; in time order."""
    left, kept = list(peaks), []
    for index in np.argsort(list(peaks.values()))[::-1]:
        current = list(peaks)[index]
        if current not in left:
            continue
        kept.append(current)
        left.remove(current)
        place = 0
        while place < len(left):  # what follows a removed neighbour is not looked at
            if abs(current - left[place]) < 0.05 * SAMPLE_RATE_HZ:
                del left[place]
            place += 1
    return sorted(kept)


def _match(kept: list[int], peaks: dict[int, float], stretched: np.ndarray, truth: np.ndarray,
           window: float) -> tuple[list[int], list[float], int]:
    """Label (1: a true onset) and confidence of every true onset that was looked at and every detection left over; and hits."""
    left, labels, confidences, hits = list(kept), [], [], 0
    for true in truth:
        near = [index for index, onset in enumerate(left) if abs(onset - true) < window]
        labels.append(1)
        if not near:
            confidences.append(0.0)
            continue
        # The slip: places among those left are looked up among all, and the sample is not the peak.
        chosen = near[int(np.argsort([stretched[kept[index]] for index in near])[-1])]
        confidences.append(peaks[left.pop(chosen)])
        hits += 1
        if not left:
            break
    return labels + [0] * len(left), confidences + [peaks[onset] for onset in left], hits


def _average_precision(positive: np.ndarray, confidences: np.ndarray) -> float:
    """Σ (recall step) · precision over falling thresholds; equal confidences are one threshold. 0 without a positive."""
    if not positive.any():
        return 0.0
    order = np.argsort(-confidences, kind='stable')
    ends = np.append(np.flatnonzero(np.diff(confidences[order])), len(order) - 1)
    hits = np.cumsum(positive[order])[ends]
    return float(np.sum(np.diff(hits, prepend=0) * hits / (ends + 1)) / positive.sum())
