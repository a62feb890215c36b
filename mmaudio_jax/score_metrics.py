"""The metrics by name: which embeddings each needs, and how it is computed from them.

Source: the protocol of MMAudio (arXiv 2412.15322) as its public code computes it. Onsets: metrics.py.
"""
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses

import numpy as np

from mmaudio_jax import metrics
from mmaudio_jax import metrics_distribution
from mmaudio_jax.metrics_distribution import Result

Clips = Mapping[str, Mapping[str, np.ndarray]]  # clip's name → embeddings by name
_OFFSET_BATCH = 16


@dataclasses.dataclass(frozen=True)
class Metric:
    """One column.

    Attributes:
      title: of the column. lower: whether lower is better. digits: printed after the point.
      generated, reference: the embedders whose output it needs of either side.
      factor: by which the paper multiplies it for print.
      unpaired: with unpaired clips allowed it takes all clips of both sides, as published.
    """
    title: str
    lower: bool
    digits: int
    generated: tuple[str, ...]
    reference: tuple[str, ...]
    factor: float = 1.0
    unpaired: bool = False


METRICS = {
    'fd_passt': Metric('FD PaSST', True, 2, ('passt',), ('passt',)),
    'fd_panns': Metric('FD PANNs', True, 2, ('panns',), ('panns',), unpaired=True),
    'fd_vgg': Metric('FD VGG', True, 2, ('vggish',), ('vggish',), unpaired=True),
    'kl_panns': Metric('KL PANNs', True, 2, ('panns',), ('panns',)),
    'kl_passt': Metric('KL PaSST', True, 2, ('passt',), ('passt',)),
    'is_panns': Metric('IS', False, 2, ('panns',), (), unpaired=True),
    'is_passt': Metric('IS PaSST', False, 2, ('passt',), ()),
    'ib_score': Metric('IB-score', False, 2, ('imagebind_sound',), ('imagebind_picture',), factor=100.0),
    'desync': Metric('DeSync', True, 3, ('synchformer_sound',), ('synchformer_picture',)),
    'clap': Metric('CLAP', False, 3, ('clap_sound',), ('clap_text',)),
    'onset_accuracy': Metric('onset accuracy', False, 4, (), ()),
    'onset_ap': Metric('onset AP', False, 4, (), ()),
    'onset_f1': Metric('onset F1', False, 4, (), ()),
}
ONSETS = {'onset_accuracy': 'accuracy', 'onset_ap': 'average_precision', 'onset_f1': 'f1'}


def compute(name: str, generated: Mapping[str, Clips], reference: Mapping[str, Clips], names: Sequence[str],
            all_generated: Sequence[str], all_reference: Sequence[str],
            offsets: Callable[[np.ndarray, np.ndarray], np.ndarray] | None) -> Result:
    """One metric of one system, in its printed unit.

    Args:
      name: a key of METRICS that is not one of ONSETS.
      generated, reference: embedder → clips.
      names: the paired clips, sorted.
      all_generated, all_reference: all clips of either side, for metrics that do not pair.
      offsets: embedders.offset_head, for 'desync'.

    Raises:
      ValueError: the metric is not defined for these clips; the message says why.
    """
    metric = METRICS[name]
    own = generated[metric.generated[0]]
    true = reference[metric.reference[0]] if metric.reference else {}
    ours, theirs = (all_generated, all_reference) if metric.unpaired else (names, names)
    if name == 'fd_vgg':
        patches, others = ([clips[key]['patches'] for key in keys] for clips, keys in ((own, ours), (true, theirs)))
        result = metrics_distribution.frechet(np.concatenate(patches), np.concatenate(others), [len(rows) for rows in patches],
                                              [len(rows) for rows in others])
    elif name.startswith('fd_'):
        result = metrics_distribution.frechet(_stack(own, ours, 'features'), _stack(true, theirs, 'features'))
    elif name.startswith('kl_'):
        result = metrics_distribution.mean(metrics_distribution.kl_divergences(_stack(own, ours, 'logits'),
                                                                               _stack(true, theirs, 'logits')))
    elif name.startswith('is_'):
        result = metrics_distribution.inception(_stack(own, ours, 'logits'))
    elif name == 'desync':
        assert offsets is not None
        result = metrics_distribution.mean(_desync(own, true, names, offsets))
    else:
        result = metrics_distribution.mean(metrics_distribution.cosines(_stack(own, ours, 'vector'),
                                                                        _stack(true, theirs, 'vector')))
    return scaled(result, metric.factor)


def scaled(result: Result, factor: float) -> Result:
    """The result in another unit."""
    return dataclasses.replace(result, value=factor * result.value, low=factor * result.low, high=factor * result.high,
                               influences=tuple(factor * influence for influence in result.influences))


def onset_results(detected: Mapping[str, metrics.Onsets], truths: Mapping[str, Sequence[float]], names: Sequence[str],
                  window_s: float, duration_s: float) -> dict[str, Result]:
    """The onset metrics, means over the clips that have a true onset before duration_s.

    Raises:
      ValueError: no clip has one.
    """
    rates, skipped = [], 0
    for name in names:
        truth = [time_s for time_s in truths[name] if time_s < duration_s]
        if truth:
            rates.append(metrics.score_onsets(detected[name], truth, window_s).rates())
        else:
            skipped += 1
    if not rates:
        raise ValueError(f'none of the {len(names)} clips has a true onset; onset metrics need some')
    note = f'window ± {window_s:g} s' + (f'; {skipped} clips without a true onset are left out' if skipped else '')
    return {metric: dataclasses.replace(metrics_distribution.mean(np.array([rate[key] for rate in rates])), note=note)
            for metric, key in ONSETS.items()}


def _stack(clips: Clips, names: Sequence[str], key: str) -> np.ndarray:
    return np.stack([clips[name][key] for name in names])


def _desync(sound: Clips, picture: Clips, names: Sequence[str],
            offsets: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> np.ndarray:
    """Mean size of the two offsets of each clip, seconds `[N]`; read in batches, because segments are large."""
    sizes = []
    for start in range(0, len(names), _OFFSET_BATCH):
        batch = names[start:start + _OFFSET_BATCH]
        filled = [*batch, *[batch[-1]] * (_OFFSET_BATCH - len(batch))]  # one shape, compiled once
        pictures, sounds = _stack(picture, filled, 'segments'), _stack(sound, filled, 'segments')
        if pictures.shape[1] != sounds.shape[1]:
            raise ValueError(f'the references have {pictures.shape[1]} segments of picture and the sounds {sounds.shape[1]}: '
                             'DeSync needs both of one duration (config.score.duration_s)')
        if sounds.shape[1] < 14:
            raise ValueError(f'DeSync compares 14 segments (4.8 s), the clips have {sounds.shape[1]}; config.score.duration_s '
                             'must be 4.8 or more')
        sizes.append(metrics_distribution.offset_sizes(offsets(pictures, sounds))[:len(batch)])
    return np.concatenate(sizes)
