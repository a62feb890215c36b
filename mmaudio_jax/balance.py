"""Sampling weights by label: common sounds crowd out rare ones (the published model's known bias), weights push back.

An example's weight is proportional to (number of examples with its label) ** -exponent and 1 in the mean: 0 leaves the set
as it is, 1 gives every label the same share, between them lies a compromise.
"""
import collections
import json
import pathlib
from typing import Sequence

import numpy as np

CLIPS_FILE = 'clips.jsonl'  # of a record set: one line a record, in their order


def read_labels(folder: pathlib.Path, split: str) -> list[str]:
    """The label of every record of a split, in order; where the set has none, the caption.

    Args:
      folder: of the record set.
      split: 'train', 'validation' or 'test'.

    Raises:
      FileNotFoundError: the set was made without clips.jsonl.
    """
    path = folder / CLIPS_FILE
    if not path.is_file():
        raise FileNotFoundError(f'{path}: missing, so that the labels of the set are not known; extract the set again, or take '
                                'it out of config.input.balance')
    with open(path, encoding='utf-8') as file:
        rows = [row for row in map(json.loads, file) if row['split'] == split]
    return [row['label'] for row in rows] if any(row['label'] for row in rows) else [row['caption'] for row in rows]


def weights(labels: Sequence[str], exponent: float) -> np.ndarray:
    """Weight of every example, float64 [examples], mean 1; see the module's docstring."""
    counts = collections.Counter(labels)
    found = np.array([float(counts[label]) for label in labels])**-exponent
    return found / found.mean()


def spread(example_weights: np.ndarray, length: int) -> np.ndarray:
    """`length` examples in proportion to their weights, without chance: int64 [length], ascending.

    Example i comes up floor or ceil of length · weight_i / (sum of weights) times (systematic sampling).
    """
    ends = np.cumsum(np.asarray(example_weights, np.float64))
    places = (np.arange(length) + 0.5) / length * ends[-1]
    return np.minimum(np.searchsorted(ends, places, side='right'), len(ends) - 1)
