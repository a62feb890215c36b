"""WavCaps (Mei et al. 2023): captions for AudioSet's strongly labelled part, BBC Sound Effects and Freesound, a json each.

Listing: as_final.json, bbc_final.json, fsd_final.json: {"num_captions_per_audio": 1, "data": [{"id", "caption", …}]}; ids with
or without an ending, sounds named by them below folders of the source's name. SoundBible is left out, as in MMAudio.
"""
import functools
import json
import os
import pathlib
from typing import Any, Iterator

from data_pipelines import layouts

KNOWN = ('id', 'caption', 'audio', 'duration', 'title', 'description', 'author', 'href', 'download_link', 'category', 'tags',
         'file_name')


def _read(listing: str, place: str, folder: pathlib.Path, media: layouts.Media,
          report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries of one source; its sounds lie below a folder whose name holds `place`."""
    path = next(iter(sorted(folder.rglob(listing))), None)
    if path is None:
        raise FileNotFoundError(f'{folder}: holds no {listing}')
    try:
        found = json.loads(report.read(path))
        rows, captions = list(found['data']), found.get('num_captions_per_audio', 1)
        numbered = {f'caption_{i + 1}' for i in range(captions)}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: is no list of WavCaps ({error}); is it whole?') from error
    for column in sorted({column for row in rows if isinstance(row, dict) for column in row} - set(KNOWN) - numbered):
        report.add('unknown_columns', f'{path.name}: {column}')
    for number, row in enumerate(rows, 1):
        own_id = row.get('id') if isinstance(row, dict) else None
        if isinstance(own_id, bool) or not isinstance(own_id, (str, int)):
            report.add('unusable_rows', f'{path.name}, entry {number}: no object with an id: {row!r:.80}')
            continue
        name = str(own_id)
        stem, suffix = os.path.splitext(name)
        stem = stem if suffix.lower() in layouts.SUFFIXES else name
        yield layouts.Entry(stem, 'train', _captions(row, captions), media.find(stem, within=place), video=False, cut='spread',
                            source=layouts.source_of(name))


def _captions(row: dict[str, Any], count: int) -> tuple[str, ...]:
    """One caption, or several in numbered columns or in a list."""
    numbered = [row.get(f'caption_{i + 1}', '') for i in range(count)]
    found = row.get('caption', numbered if count > 1 else '')
    return tuple(str(caption or '') for caption in (found if isinstance(found, list) else [found]))


read_audioset_sl = functools.partial(_read, 'as_final.json', 'AudioSet')
read_bbc = functools.partial(_read, 'bbc_final.json', 'BBC')
read_freesound = functools.partial(_read, 'fsd_final.json', 'FreeSound')
