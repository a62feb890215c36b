"""The card: counts that can be worked out by hand, and its picture."""
import pytest

from data_pipelines import dataset_card

METADATA = {'encoder': 'pixels', 'codec': 'pca', 'rate': '16k', 'duration_s': 9.0, 'feature_dtype': 'float16'}


def row(i: int, label: str, split: str = 'train', **fields):
    return {'id': str(i), 'split': split, 'caption': f'{label} {i % 2}', 'label': label, 'file': f'{i // 2}.wav',
            'video': i > 4, 'loudness_db': -10.0 * i, 'silent_share': 0.1 * i, 'file_s': 20.0 + i // 2,
            'signature': f'{7**40 * (i + 1):032x}'[-32:], **fields}


ROWS = [row(i, 'rain' if i < 6 else 'bell') for i in range(8)]
ROWS.append(row(8, 'frog', 'test', signature=ROWS[0]['signature'], caption=''))
REJECTED = [{'reason': 'ends at 1.5 s'}, {'reason': 'ends at 2.5 s'}, {'reason': 'silent'}]


def test_the_numbers():
    card = dataset_card.make('birds', METADATA, ROWS, REJECTED, {'train': {'mean': [0.0], 'std': [1.0]}})
    assert card['splits'] == {'train': {'records': 8, 'hours': 0.02, 'with_video': 3, 'with_caption': 8},
                              'test': {'records': 1, 'hours': 0.0025, 'with_video': 1, 'with_caption': 0}}
    assert card['captions']['distinct'] == 4 and card['captions']['words']['mean'] == 2.0
    assert card['labels']['count'] == 2 and card['labels']['rarest'] == 2 and card['labels']['evenness'] == 0.8113
    first, second = card['labels']['over_represented']
    assert first == {'label': 'rain', 'records': 6, 'share': 0.75, 'times_even_share': 1.5, 'weight_at_0.5': 0.8453}
    assert second['weight_at_0.5'] == pytest.approx(0.8453 * 3**0.5, abs=1e-3)
    assert card['durations_s']['mean'] == 22.0
    assert card['loudness_db'] == {'mean': -40.0, 'p05': -76.0, 'p50': -40.0, 'p95': -4.0, 'quiet': 4}
    assert card['silent_share']['mostly_silent'] == 3
    assert card['near_duplicates'] == {'groups': 1, 'clips': 2, 'across_splits': 1, 'largest': [['train/0', 'test/8']]}
    assert card['rejected'] == {'clips': 3, 'by_reason': {'ends at # s': 2, 'silent': 1}}


def test_a_set_without_measures_labels_or_captions_has_a_card(tmp_path):
    rows = [{'id': 'a', 'split': 'test', 'caption': '', 'label': '', 'file': 'a', 'video': True}]
    card = dataset_card.make('bare', METADATA, rows, [], {})
    assert card['labels'] == {} and card['loudness_db'] == {} and card['captions'] == {'distinct': 0, 'words': {}}
    dataset_card.draw(tmp_path / 'card.png', card, rows)
    dataset_card.draw(tmp_path / 'full.png', dataset_card.make('birds', METADATA, ROWS, [], {}), ROWS)
    odd = [row(i, 'a label of forty letters, or a few more, ' + end) for i, end in enumerate(('$a\\x and $6', 'b'))]
    dataset_card.draw(tmp_path / 'odd.png', dataset_card.make('$a\\x$', METADATA, odd, [], {}), odd)
    assert all((tmp_path / name).read_bytes().startswith(b'\x89PNG') for name in ('card.png', 'full.png', 'odd.png'))
