"""The metrics by name: which embeddings each needs, and how it is computed from them.

Source: the protocol of MMAudio (arXiv 2412.15322) as its public code computes it. Onsets: metrics.py.
"""
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
from typing import Any

import numpy as np

from mmaudio_jax import metrics
from mmaudio_jax import metrics_distribution
from mmaudio_jax import metrics_onsets_published
from mmaudio_jax.metrics_distribution import Result

Clips = Mapping[str, Mapping[str, np.ndarray]]  # clip's name → embeddings by name
Offsets = Callable[[np.ndarray, np.ndarray], np.ndarray]  # embedders.offset_head
_OFFSET_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
      title: of the column. lower: whether lower is better. digits: printed after the point.
      generated, reference: the embedder whose output it needs of either side, '' for none.
      factor: by which the paper multiplies it for print.
      unpaired: with unpaired clips allowed it takes all clips of both sides, as published.
    """
    title: str
    lower: bool
    digits: int
    generated: str
    reference: str
    factor: float = 1.0
    unpaired: bool = False

    def clips(self, paired: Sequence[str], generated: Clips, reference: Clips) -> tuple[Sequence[str], Sequence[str]]:
        """The clips of either side that the figure covers, of the paired ones and of all; no reference where it needs none."""
        if self.unpaired:
            return sorted(generated), sorted(reference)
        return paired, paired if self.reference else ()


METRICS = {
    'fd_passt': Metric('FD PaSST', True, 2, 'passt', 'passt'),
    'fd_panns': Metric('FD PANNs', True, 2, 'panns', 'panns', unpaired=True),
    'fd_vgg': Metric('FD VGG', True, 2, 'vggish', 'vggish', unpaired=True),
    'kl_panns': Metric('KL PANNs', True, 2, 'panns', 'panns'),
    'kl_passt': Metric('KL PaSST', True, 2, 'passt', 'passt'),
    'is_panns': Metric('IS', False, 2, 'panns', '', unpaired=True),
    'is_passt': Metric('IS PaSST', False, 2, 'passt', ''),
    'ib_score': Metric('IB-score', False, 2, 'imagebind_sound', 'imagebind_picture', factor=100.0),
    'desync': Metric('DeSync', True, 3, 'synchformer_sound', 'synchformer_picture'),
    'clap': Metric('CLAP', False, 3, 'clap_sound', 'clap_text'),
    'onset_accuracy': Metric('onset accuracy', False, 4, '', ''),
    'onset_ap': Metric('onset AP', False, 4, '', ''),
    'onset_f1': Metric('onset F1', False, 4, '', ''),
}
ONSETS = {'onset_accuracy': 'accuracy', 'onset_ap': 'average_precision', 'onset_f1': 'f1'}


def compute(name: str, generated: Clips, reference: Clips, paired: Sequence[str], offsets: Offsets | None) -> Result:
    """One metric of one system, in its printed unit.

    Args:
      name: a key of METRICS that is not one of ONSETS.
      generated, reference: all clips of either side, embedded as METRICS says; {} for no reference.
      paired: the clips that both sides have, sorted.
      offsets: embedders.offset_head, for 'desync'.

    Raises:
      ValueError: the metric is not defined for these clips; the message says why.
    """
    metric = METRICS[name]
    ours, theirs = metric.clips(paired, generated, reference)

    def both(key: str) -> tuple[np.ndarray, np.ndarray]:
        return _stack(generated, ours, key), _stack(reference, theirs, key)

    if name == 'fd_vgg':
        patches, others = ([clips[key]['patches'] for key in keys] for clips, keys in ((generated, ours), (reference, theirs)))
        result = metrics_distribution.frechet(np.concatenate(patches), np.concatenate(others), [len(rows) for rows in patches],
                                              [len(rows) for rows in others])
    elif name.startswith('fd_'):
        result = metrics_distribution.frechet(*both('features'))
    elif name.startswith('kl_'):
        result = metrics_distribution.mean(metrics_distribution.kl_divergences(*both('logits')))
    elif name.startswith('is_'):
        result = metrics_distribution.inception(_stack(generated, ours, 'logits'))
    elif name == 'desync':
        assert offsets is not None
        result = metrics_distribution.mean(_desync(generated, reference, paired, offsets))
    elif name in ('ib_score', 'clap'):
        result = metrics_distribution.mean(metrics_distribution.cosines(*both('vector')))
    else:
        raise ValueError(f'{name!r} is no metric of embeddings: onset_results has those of onsets')
    return scaled(result, metric.factor)


def scaled(result: Result, factor: float) -> Result:
    """The result in another unit."""
    return dataclasses.replace(result, value=factor * result.value, low=factor * result.low, high=factor * result.high,
                               influences=tuple(factor * influence for influence in result.influences))


def onset_results(rates: Mapping[str, Mapping[str, float] | None], note: str) -> dict[str, Result]:
    """The onset metrics, means over clips.

    Args:
      rates: clip → accuracy, average_precision and f1, or None for a clip without a true onset, which is left out.
      note: how they were measured.

    Raises:
      ValueError: no clip has rates.
    """
    counted = [rate for rate in rates.values() if rate is not None]
    if not counted:
        raise ValueError(f'none of the {len(rates)} clips has a true onset; onset metrics need some')
    if len(counted) < len(rates):
        note += f'; {len(rates) - len(counted)} clips without a true onset are left out'
    return {metric: dataclasses.replace(metrics_distribution.mean(np.array([rate[key] for rate in counted])), note=note)
            for metric, key in ONSETS.items()}


def onset_rates(waveform: np.ndarray, sample_rate_hz: int, truth_s: Sequence[float], options: Any, duration_s: float,
                compat: bool) -> dict[str, float] | None:
    """Onset rates of one clip, None when it has no true onset before duration_s.

    Args:
      waveform: mono, float [samples].
      sample_rate_hz: of the waveform.
      truth_s: true onsets, seconds.
      options: config.evaluate.
      duration_s: how much of the clip counts.
      compat: as the published code computes them (metrics_onsets_published), on its own 8 s.

    Raises:
      ValueError: the published code has no figure for the clip.
    """
    if compat:
        return metrics_onsets_published.onset_rates(waveform, sample_rate_hz, truth_s, options.onset_delta)
    truth = [time_s for time_s in truth_s if time_s < duration_s]
    if not truth:
        return None
    detected = metrics.detect_onsets(waveform[:int(sample_rate_hz * duration_s)], sample_rate_hz, options.onset_delta,
                                     options.onset_lag_s)
    return metrics.score_onsets(detected, truth, options.onset_windows_s[0]).rates()


def _stack(clips: Clips, names: Sequence[str], key: str) -> np.ndarray:
    return np.stack([clips[name][key] for name in names])


def _desync(sound: Clips, picture: Clips, names: Sequence[str], offsets: Offsets) -> np.ndarray:
    """Mean size of the two offsets of each clip, seconds `[N]`; read in batches, because segments are large."""
    sizes = []
    for start in range(0, len(names), _OFFSET_BATCH):
        batch = names[start:start + _OFFSET_BATCH]
        filled = [*batch, *[batch[-1]] * (_OFFSET_BATCH - len(batch))]  # one shape, compiled once
        pictures, sounds = _stack(picture, filled, 'segments'), _stack(sound, filled, 'segments')
        if pictures.shape[1] != sounds.shape[1]:
            raise ValueError(f'the references have {pictures.shape[1]} segments of picture and the sounds {sounds.shape[1]}: '
                             'DeSync needs both of one duration (config.score.duration_s)')
        sizes.append(metrics_distribution.offset_sizes(offsets(pictures, sounds))[:len(batch)])
    return np.concatenate(sizes)
