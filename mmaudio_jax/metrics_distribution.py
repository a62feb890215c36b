"""Scores of sets of clips: Fréchet distance, KL, inception score, mean similarity, mean offset, with their uncertainty.

NumPy, float64. Sources: Heusel et al. 2017 (Fréchet distance), Salimans et al. 2016 (inception score), and the protocol that
MMAudio (arXiv 2412.15322) reports with. Where a figure is not defined a ValueError says why; no number stands for a failure.

Every score is a Result. Its interval is a bootstrap over clips of the score's first-order change: the influence of a clip is
the derivative of the score by the clip's weight, and a resample changes the score by the influences of the clips that it
repeats less those that it leaves out. For a mean this is the bootstrap itself; for a Fréchet distance it takes one
decomposition where resampling it would take a thousand, and it leaves out the bias that repeated clips have. Both sets of a
Fréchet distance are resampled, each by itself.
"""
from collections.abc import Sequence
import dataclasses

import numpy as np
import scipy.linalg
import scipy.special

SPLITS = 10  # of the inception score
SPLIT_SEED = 2020  # of its permutation, as published
BOOTSTRAP_SEED = 0
REPLICATES = 1000
LEVEL = 0.95  # of the intervals
_CHUNK = 256  # bootstrap replicates at a time: memory stays flat
_TINY = np.finfo(np.float64).tiny


@dataclasses.dataclass(frozen=True)
class Result:
    """One figure.

    Attributes:
      value: the score.
      low, high: bootstrap interval of LEVEL around it; equal to value when nothing can be resampled.
      clips: how many clips (or pairs of clips) it covers.
      note: what the reader must know about the figure; '' when there is nothing.
      influences: of each clip of each set that is resampled, float64 [N], summing to zero.
    """
    value: float
    low: float
    high: float
    clips: int
    note: str = ''
    influences: tuple[np.ndarray, ...] = dataclasses.field(default=(), repr=False, compare=False)


def _result(value: float, influences: Sequence[np.ndarray], note: str) -> Result:
    """The interval from the influences; `clips` are those of the first set."""
    generator = np.random.default_rng(BOOTSTRAP_SEED)
    deviations = np.zeros(REPLICATES)
    for influence in influences:
        deviations += _resampled_sums(influence, generator)
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Result(float(value), float(value + low), float(value + high), len(influences[0]), note, tuple(influences))


def difference(first: Result, second: Result) -> Result:
    """first − second with its interval, for two systems on the same clips: a clip is resampled in both at once.

    Raises:
      ValueError: results over different numbers of clips.
    """
    sizes = [[len(influence) for influence in result.influences] for result in (first, second)]
    if sizes[0] != sizes[1]:
        raise ValueError(f'a difference needs the same clips, not {first.clips} and {second.clips}')
    influences = [one - other for one, other in zip(first.influences, second.influences)]
    return _result(first.value - second.value, influences, '')


def frechet(features: np.ndarray, reference: np.ndarray, features_clips: Sequence[int] | None = None,
            reference_clips: Sequence[int] | None = None) -> Result:
    """|μ₁ − μ₂|² + tr Σ₁ + tr Σ₂ − 2 tr (Σ₁Σ₂)^½ of two sets of feature vectors, with its interval.

    The last trace is the nuclear norm of A Bᵀ with A = (x − μ₁) / √(N₁ − 1), B likewise: no root of a product of matrices,
    and exact for sets that do not span the space. Rows beyond D are folded into a triangular factor first.

    Args:
      features, reference: float `[N₁, D]` and `[N₂, D]`.
      features_clips, reference_clips: how many successive rows belong to each clip; None: one.

    Raises:
      ValueError: fewer than two rows, widths that differ, values that are not finite, row counts that do not add up.
    """
    a, b, means = _centred(features, reference)
    groups = [_groups(counts, len(rows)) for counts, rows in ((features_clips, a), (reference_clips, b))]
    traces = np.sum(np.square(a)) + np.sum(np.square(b))
    left, right = _triangle(a), _triangle(b)
    u, singular, vt = scipy.linalg.svd(left @ right.T, full_matrices=False, overwrite_a=True, check_finite=False)
    value = float(means @ means + traces - 2 * singular.sum())
    kept = singular > singular[0] * max(a.shape[1], 1) * np.finfo(np.float64).eps if singular.size else singular > 0
    # The derivative of the nuclear norm by a row's weight is half the norm of the row in the basis of the coupling.
    roots = np.sqrt(singular[kept])
    influences = []
    for rows, basis, side in ((a, right.T @ vt[kept].T / roots, 1), (b, left.T @ u[:, kept] / roots, -1)):
        scale = len(rows) - 1
        shift = 2 * side * (rows @ means) * np.sqrt(scale) / len(rows)
        influences.append(shift + np.square(rows).sum(axis=1) - np.square(rows @ basis).sum(axis=1))
    per_clip = [np.add.reduceat(influence - influence.mean(), starts) for influence, starts in zip(influences, groups)]
    return _result(value, per_clip, _frechet_note(len(a), len(b), a.shape[1]))


def _frechet_note(first: int, second: int, width: int) -> str:
    if min(first, second) > width:
        return ''
    return (f'biased upwards: {first} and {second} vectors do not span {width} dimensions; '
            'comparable only with distances of as many vectors')


def _centred(features: np.ndarray, reference: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both sets less their means over √(N − 1), and the difference of the means."""
    parts, means = [], []
    for name, rows in (('the features', features), ('the reference', reference)):
        rows = np.array(rows, np.float64)  # a copy: it is changed below
        if rows.ndim != 2 or len(rows) < 2:
            raise ValueError(f'{name} of a Fréchet distance must be two or more vectors, not an array of {list(rows.shape)}')
        if not np.isfinite(rows).all():
            raise ValueError(f'{name} of a Fréchet distance hold values that are not finite')
        mean = rows.mean(axis=0)
        rows -= mean
        rows /= np.sqrt(len(rows) - 1)
        parts.append(rows)
        means.append(mean)
    if parts[0].shape[1] != parts[1].shape[1]:
        raise ValueError(f'a Fréchet distance needs vectors of one width, not {parts[0].shape[1]} and {parts[1].shape[1]}')
    return parts[0], parts[1], means[0] - means[1]


def _triangle(rows: np.ndarray) -> np.ndarray:
    """A matrix of at most as many rows as columns with the same product with its transpose: R of QR."""
    if rows.shape[0] <= rows.shape[1]:
        return rows
    return scipy.linalg.qr(rows, mode='r', check_finite=False)[0][:rows.shape[1]]


def _groups(counts: Sequence[int] | None, rows: int) -> np.ndarray:
    """Index of the first row of each clip."""
    sizes = np.ones(rows, int) if counts is None else np.asarray(counts, int)
    if sizes.sum() != rows or (sizes < 1).any():
        raise ValueError(f'{rows} vectors cannot be those of clips with {sizes.sum()} vectors in all')
    return np.cumsum(sizes) - sizes


def kl_divergences(logits: np.ndarray, reference_logits: np.ndarray) -> np.ndarray:
    """KL(reference ‖ sample) of the class probabilities (softmax) of each pair, nats: float `[N, C]`, `[N, C]` → `[N]`.

    No epsilon: both sides are logarithms of softmax.

    Raises:
      ValueError: shapes that differ, no pairs, or values that are not finite.
    """
    logits, reference_logits = _pair(logits, reference_logits, 'logits')
    log_p = scipy.special.log_softmax(reference_logits, axis=1)
    log_q = scipy.special.log_softmax(logits, axis=1)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=1)


def cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine of each pair of vectors: float `[N, D]`, `[N, D]` → `[N]`; norms below 1e-8 count as 1e-8."""
    first, second = _pair(first, second, 'embeddings')
    norms = [np.maximum(np.linalg.norm(rows, axis=1), 1e-8) for rows in (first, second)]
    return np.sum(first * second, axis=1) / (norms[0] * norms[1])


def offset_sizes(offsets_s: np.ndarray) -> np.ndarray:
    """Mean size of the offsets of each clip, seconds: float `[N, crops]`, signed → `[N]`. (Not the size of their mean.)"""
    offsets_s = np.asarray(offsets_s, np.float64)
    if offsets_s.ndim != 2 or not offsets_s.size or not np.isfinite(offsets_s).all():
        raise ValueError(f'offsets must be finite and [clips, crops], not an array of {list(offsets_s.shape)}')
    return np.abs(offsets_s).mean(axis=1)


def mean(values: np.ndarray) -> Result:
    """The mean over clips of one value a clip, float `[N]`, with its interval.

    Raises:
      ValueError: no clip, or values that are not finite.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not values.size or not np.isfinite(values).all():
        raise ValueError(f'a mean needs one finite value a clip, not an array of {list(values.shape)}')
    value = values.mean()
    return _result(value, [(values - value) / len(values)], '' if len(values) > 1 else 'one clip: no interval')


def inception_scores(logits: np.ndarray) -> np.ndarray:
    """Inception score of each of SPLITS parts, float `[N, C]` → `[SPLITS]`.

    exp of the mean over a part of KL(p ‖ mean p), p = softmax(logits). The rows are permuted by RandomState(SPLIT_SEED) and cut
    as published, so that the score depends (slightly) on the order of the clips.

    Raises:
      ValueError: fewer clips than parts, or values that are not finite.
    """
    p, log_p = _probabilities(logits)
    scores = []
    for rows in _splits(len(p)):
        marginal = p[rows].mean(axis=0)
        entropy = np.sum(p[rows] * log_p[rows], axis=1).mean()
        scores.append(np.exp(entropy - np.sum(scipy.special.xlogy(marginal, marginal))))
    return np.array(scores)


def inception(logits: np.ndarray) -> Result:
    """The mean of `inception_scores` with its interval, float `[N, C]`. The note tells the deviation of the parts."""
    scores = inception_scores(logits)
    p, log_p = _probabilities(logits)
    influences = np.zeros(len(p))
    for rows, score in zip(_splits(len(p)), scores):
        surprise = np.sum(p[rows] * (log_p[rows] - np.log(np.maximum(p[rows].mean(axis=0), _TINY))), axis=1)
        influences[rows] = score * (surprise - surprise.mean()) / len(rows) / SPLITS
    return _result(scores.mean(), [influences], f'deviation of the {SPLITS} parts: {scores.std():.4g}')


def _probabilities(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or len(logits) < SPLITS:
        raise ValueError(f'the inception score cuts the clips into {SPLITS} parts and needs as many clips at least, '
                         f'not logits of {list(logits.shape)}')
    if not np.isfinite(logits).all():
        raise ValueError('the logits of an inception score hold values that are not finite')
    log_p = scipy.special.log_softmax(logits, axis=1)
    return np.exp(log_p), log_p


def _splits(count: int) -> list[np.ndarray]:
    """Rows of each part of the inception score."""
    order = np.random.RandomState(SPLIT_SEED).permutation(count)
    return [order[i * count // SPLITS:(i + 1) * count // SPLITS] for i in range(SPLITS)]


def _pair(first: np.ndarray, second: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.ndim != 2 or first.shape != second.shape or not len(first):
        raise ValueError(f'{what} must come in pairs, not as arrays of {list(first.shape)} and {list(second.shape)}')
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError(f'the {what} hold values that are not finite')
    return first, second


def _resampled_sums(values: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Sums over REPLICATES resamples of `values` [N], each of N draws: float64 [REPLICATES]."""
    sums = np.empty(REPLICATES)
    for start in range(0, REPLICATES, _CHUNK):
        size = min(_CHUNK, REPLICATES - start)
        sums[start:start + size] = generator.multinomial(len(values), np.full(len(values), 1 / len(values)), size) @ values
    return sums
