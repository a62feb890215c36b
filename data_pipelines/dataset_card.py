"""The card of a record set: what is in it, as card.json and card.png beside the records; from the set's small files alone.

card.json: name, encoder, codec, rate, splits (records, hours, with video, with caption), captions (distinct, words), labels (of
the split train: how many, evenness, the most over-represented with their share and factor over an even share, and the weight
that config.input.balance would give them), durations_s (of the source files), loudness_db, silent_share, near_duplicates
(groups of clips of different files that sound the same), rejected (by kind), latents (mean and deviation by channel).
"""
import collections
import json
import math
import pathlib
from typing import Any, Iterable, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines import near_duplicates
from data_pipelines.progress import kind
from data_pipelines.set_in_work import CLIPS_FILE
from data_pipelines.set_in_work import LATENTS_FILE
from data_pipelines.set_in_work import REJECTED_FILE
from mmaudio_jax import balance
from mmaudio_jax import media
from mmaudio_jax import records

CARD, PICTURE = 'card.json', 'card.png'
MOST = 20  # labels and groups of near-duplicates that the card names
BALANCE = 0.5  # exponent of the weights that the card shows
PERCENTILES = (5, 50, 95)
QUIET_DB, MOSTLY_SILENT = -45.0, 0.5  # what counts as a quiet clip, and as a mostly silent one


def write_missing(folders: Iterable[pathlib.Path]) -> None:
    """Writes the card of every set that is there, and was extracted, but has none."""
    for folder in folders:
        if (folder / CLIPS_FILE).is_file() and not (folder / CARD).is_file():
            write(folder)


def write(folder: pathlib.Path) -> dict[str, Any]:
    """Writes card.png and card.json of the set in `folder`, the picture first, and returns what the latter holds."""
    rows = _read_lines(folder / CLIPS_FILE)
    card = make(folder.name, records.read_metadata(folder), rows, _read_lines(folder / REJECTED_FILE),
                json.loads((folder / LATENTS_FILE).read_text(encoding='utf-8')))
    draw(folder / PICTURE, card, rows)
    with media.atomic_file(folder / CARD) as beside:
        beside.write_text(json.dumps(card, indent=1, ensure_ascii=False) + '\n', encoding='utf-8')
    return card


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    with open(path, encoding='utf-8') as file:
        return [json.loads(line) for line in file]


def make(name: str, metadata: dict[str, Any], rows: list[dict[str, Any]], rejected: list[dict[str, Any]],
         latents: dict[str, Any]) -> dict[str, Any]:
    """The card as a dict; see the module's docstring.

    Args:
      name: of the set.
      metadata: its metadata.json. rows, rejected: the lines of its clips.jsonl and rejected.jsonl. latents: its latents.json.
    """
    by_split = {split: [row for row in rows if row['split'] == split] for split in clips_lib.SPLITS}
    captions = [row['caption'] for row in rows if row['caption'].strip()]
    kinds = collections.Counter(kind(row['reason']) for row in rejected)
    return {
        'name': name,
        **{field: metadata[field] for field in ('encoder', 'codec', 'rate', 'duration_s', 'feature_dtype')},
        'splits': {
            split: {
                'records': len(found),
                'hours': round(len(found) * metadata['duration_s'] / 3600, 4),
                'with_video': sum(row['video'] for row in found),
                'with_caption': sum(bool(row['caption'].strip()) for row in found),
            } for split, found in by_split.items() if found
        },
        'captions': {'distinct': len(set(captions)), 'words': _spread([len(caption.split()) for caption in captions])},
        'labels': _labels(by_split['train']),
        'durations_s': _spread({row['file']: row['file_s'] for row in rows if 'file_s' in row}.values()),
        'loudness_db': _with_count(rows, 'loudness_db', 'quiet', lambda value: value < QUIET_DB),
        'silent_share': _with_count(rows, 'silent_share', 'mostly_silent', lambda value: value > MOSTLY_SILENT),
        'near_duplicates': _near_duplicates(rows),
        'rejected': {'clips': len(rejected), 'by_reason': dict(kinds.most_common())},
        'latents': latents,
    }


def _spread(values: Iterable[float]) -> dict[str, float]:
    """Mean and percentiles; empty for no values."""
    values = list(values)
    if not values:
        return {}
    return {'mean': round(float(np.mean(values)), 3),
            **{f'p{percent:02d}': round(float(np.percentile(values, percent)), 3) for percent in PERCENTILES}}


def _with_count(rows: Sequence[dict[str, Any]], field: str, name: str, is_counted) -> dict[str, float]:
    """_spread of a measure of the rows that have it, and how many are out of the ordinary."""
    values = [row[field] for row in rows if field in row]
    return {**_spread(values), name: sum(map(is_counted, values))} if values else {}


def _labels(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The balance of the labels (of the captions, where there are no labels)."""
    source = 'label' if any(row['label'] for row in rows) else 'caption'
    counts = collections.Counter(row[source] for row in rows)
    if not counts:
        return {}
    shares = {label: count / len(rows) for label, count in counts.items()}
    entropy = -sum(share * math.log(share) for share in shares.values())
    weights = dict(zip((row[source] for row in rows), balance.weights([row[source] for row in rows], BALANCE)))
    return {
        'of': source,
        'count': len(counts),
        'evenness': round(entropy / math.log(len(counts)), 4) if len(counts) > 1 else 1.0,  # 1: all labels equally often
        'rarest': min(counts.values()),
        'over_represented': [{'label': label, 'records': count, 'share': round(shares[label], 5),
                              'times_even_share': round(shares[label] * len(counts), 2),
                              f'weight_at_{BALANCE:g}': round(float(weights[label]), 4)}
                             for label, count in counts.most_common(MOST)],
    }


def _near_duplicates(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How many clips sound like one of another file, and the largest groups of them."""
    known = [row for row in rows if 'signature' in row]
    groups = near_duplicates.groups([row['signature'] for row in known], [row['file'] for row in known])
    return {
        'groups': len(groups),
        'clips': sum(map(len, groups)),
        'across_splits': sum(len({known[place]['split'] for place in group}) > 1 for group in groups),
        'largest': [[f'{known[place]["split"]}/{known[place]["id"]}' for place in group[:MOST]] for group in groups[:MOST]],
    }


def draw(path: pathlib.Path, card: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Labels, loudness, silence and lengths in one picture, written whole."""
    figure = Figure(figsize=(11, 7.5), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    hours = sum(split['hours'] for split in card['splits'].values())
    made_by = f'{card["encoder"]} + {card["codec"]} at {card["rate"]}'
    figure.suptitle(f'{card["name"]}: {len(rows)} records, {hours:.2f} h, {made_by}', parse_math=False)
    labels = card['labels'].get('over_represented', [])
    axes[0, 0].barh(range(len(labels)), [row['records'] for row in labels][::-1])
    axes[0, 0].set_yticks(range(len(labels)), [row['label'][:40] for row in labels][::-1], parse_math=False)  # '$' is a letter
    axes[0, 0].set_title(f'most common of {card["labels"].get("count", 0)} {card["labels"].get("of", "label")}s (train)')
    files = {row['file']: row['file_s'] for row in rows if 'file_s' in row}
    measured = [row for row in rows if 'loudness_db' in row]
    for axis, title, values in ((axes[0, 1], 'loudness, dB of full scale', [row['loudness_db'] for row in measured]),
                                (axes[1, 0], 'share of silence', [row['silent_share'] for row in measured]),
                                (axes[1, 1], 'length of the source files, seconds', list(files.values()))):
        axis.hist(values, bins=40)
        axis.set_title(title)
    for axis in axes.ravel():
        axis.tick_params(labelsize=8)
    with media.atomic_file(path) as beside:
        canvas.print_figure(beside, format='png')
