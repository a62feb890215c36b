"""Weights by label, and examples drawn by them."""
import collections
import json

import numpy as np
import pytest

from mmaudio_jax import balance

LABELS = ['rain'] * 90 + ['bell'] * 9 + ['frog']


@pytest.mark.parametrize('exponent, shares', [(0.0, (0.90, 0.09, 0.01)), (1.0, (1 / 3, 1 / 3, 1 / 3)),
                                              (0.5, (0.703, 0.222, 0.074))])
def test_labels_get_their_share(exponent, shares):
    found = balance.weights(LABELS, exponent)
    assert found.mean() == pytest.approx(1)
    for label, share in zip(('rain', 'bell', 'frog'), shares):
        assert found[[other == label for other in LABELS]].sum() / len(LABELS) == pytest.approx(share, abs=1e-3)
    counts = collections.Counter(LABELS[place] for place in balance.spread(found, 3000))
    for label, share in zip(('rain', 'bell', 'frog'), shares):
        assert counts[label] / 3000 == pytest.approx(share, abs=2e-3)


def test_examples_come_up_as_often_as_their_weights_say():
    weights = np.array([0.5, 2.0, 0.0, 1.5])
    assert np.bincount(balance.spread(weights, 8), minlength=4).tolist() == [1, 4, 0, 3]
    assert balance.spread(np.ones(5), 5).tolist() == [0, 1, 2, 3, 4] and len(balance.spread(weights, 0)) == 0


def test_labels_are_read_or_the_captions_in_their_place(tmp_path):
    rows = [{'split': 'train', 'label': '', 'caption': 'a'}, {'split': 'test', 'label': 'x', 'caption': 'b'},
            {'split': 'train', 'label': '', 'caption': 'c'}]
    (tmp_path / 'clips.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    assert balance.read_labels(tmp_path, 'train') == ['a', 'c'] and balance.read_labels(tmp_path, 'test') == ['x']
    with pytest.raises(FileNotFoundError, match='out of config.input.balance'):
        balance.read_labels(tmp_path / 'none', 'train')
