"""VGGSound (Chen et al. 2020): YouTube videos of ten seconds, each with one of 309 labels as its caption.

Listing: vggsound.csv without header (YouTube id, start second, label, 'train' or 'test'), or tab-separated lists with the
header id, label, whose name says the split (vgg3-train.tsv, vgg3-val.tsv, vgg3-test.tsv). Videos: <id>_<start, six digits>.mp4.
"""
import pathlib
from typing import Iterator

from data_pipelines import layouts
from mmaudio_jax import tables
from mmaudio_jax.media import VIDEO_SUFFIXES

LISTING = 'vggsound.csv'
SPLITS = {'train': 'train', 'val': 'validation', 'test': 'test'}  # part of a list's name → split


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`; lists are preferred, as they name a validation split. See layouts.Entry."""
    named = sorted(folder.rglob('[!.]*.tsv'))
    lists = [(path, split) for path in named for part, split in SPLITS.items() if f'-{part}' in path.stem]
    listing = next(iter(sorted(folder.rglob(LISTING))), None)
    if lists:
        for path, split in lists:
            for _, row in layouts.read_csv(path, report, ('id', 'label')):
                yield _entry(row['id'], row['id'], split, row['label'], media)
    elif listing:
        yield from _read_csv(listing, media, report)
    else:
        raise FileNotFoundError(f'{folder}: holds neither {LISTING} nor lists such as vgg3-train.tsv')


def _read_csv(path: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    for line, row in tables.csv_rows(path, report.read(path)):
        if len(row) != 4 or not row[1].strip().isdigit() or row[3] not in ('train', 'test'):
            report.add('unusable_rows', f'{path.name}, line {line}: {row}')
            continue
        youtube_id, start, label, split = row
        yield _entry(f'{youtube_id}_{int(start):06d}', f'{youtube_id}_{int(start)}', split, label, media)


def _entry(name: str, other_name: str, split: str, label: str, media: layouts.Media) -> layouts.Entry:
    file = media.find(name, other_name, suffixes=VIDEO_SUFFIXES)
    return layouts.Entry(name, split, (label,), file, video=True, cut='start', label=label, source=layouts.source_of(name))
