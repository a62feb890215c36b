"""What is scored and against what: folders of sound by name, references, captions and onsets, and how they pair.

A clip's name is its file's without the suffix. Nothing is dropped in silence: two files of one name are an error, and missing
and extra names are one unless they are allowed.
"""
from collections.abc import Mapping
import csv
import dataclasses
import json
import pathlib
from typing import Any

from mmaudio_jax.evaluation_media import SOUND_SUFFIXES

VIDEO_SUFFIXES = ('.mp4', '.mkv', '.webm', '.mov', '.m4v', '.avi')
_NAME_COLUMNS = ('id', 'name', 'video_id', 'youtube_id')
_CAPTION_COLUMNS = ('caption', 'label')
_SHOWN = 5  # names of an error


@dataclasses.dataclass(frozen=True)
class References:
    """What sounds are measured against, by clip's name; each may be empty.

    Attributes:
      sounds: true sound. videos: the picture. captions: the text.
      onsets: true onset times in seconds.
    """
    sounds: Mapping[str, pathlib.Path]
    videos: Mapping[str, pathlib.Path]
    captions: Mapping[str, str]
    onsets: Mapping[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Pairing:
    """Which clips of one system are scored.

    Attributes:
      names: both generated and asked for, sorted.
      missing: asked for and not generated. extra: generated and not asked for.
    """
    names: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]


def files(folder: pathlib.Path, suffixes: tuple[str, ...], ending: str = '') -> dict[str, pathlib.Path]:
    """Name → file for the files with one of `suffixes` right in `folder`, sorted by name; names lose an `ending`.

    Raises:
      FileNotFoundError: no such folder.
      ValueError: two files of one name.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such folder')
    found: dict[str, pathlib.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes and path.is_file() and not path.name.startswith('.'):
            name = path.stem.removesuffix(ending)
            if name in found:
                raise ValueError(f'{folder}: {found[name].name} and {path.name} have one name; which is the clip? '
                                 'Keep one of them')
            found[name] = path
    return dict(sorted(found.items()))


def systems(generated: str, compare: str) -> dict[str, pathlib.Path]:
    """System's name → folder, from config.score.generated or from config.score.compare ('a=DIR,b=DIR').

    Raises:
      ValueError: neither, both, or not of that form.
    """
    if bool(generated) == bool(compare):
        raise ValueError('name either one folder (config.score.generated) or several (--compare a=DIR b=DIR)')
    if generated:
        folder = pathlib.Path(generated)
        return {folder.name or 'generated': folder}
    result: dict[str, pathlib.Path] = {}
    for part in compare.replace(',', ' ').split():
        name, _, folder_name = part.partition('=')
        if not name or not folder_name or name in result:
            raise ValueError(f'config.score.compare: {part!r} is not of the form name=FOLDER with a name of its own')
        result[name] = pathlib.Path(folder_name)
    return result


def references(source: str, captions: str) -> References:
    """References from a folder or a table.

    Args:
      source: '' for none; a folder of sounds and videos (a sound file goes before the video's own track; NAME_times.txt holds
        onsets, one a line, of which the first number counts); or a .jsonl table with the keys id, audio, video, caption and
        onset_times_s, whose files are beside it.
      captions: '' or a .csv, .tsv or .jsonl table of names and captions, which goes before the captions of `source`.

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: two files of one name, a table without the columns.
    """
    path = pathlib.Path(source)
    texts: dict[str, str] = {}
    onsets: dict[str, list[float]] = {}
    sounds: dict[str, pathlib.Path] = {}
    videos: dict[str, pathlib.Path] = {}
    if source and path.suffix == '.jsonl':
        for row in _rows(path):
            name = str(row['id'])
            sounds[name] = path.parent / (row.get('audio') or row.get('video') or '')
            if row.get('video'):
                videos[name] = path.parent / row['video']
            if row.get('caption'):
                texts[name] = row['caption']
            if 'onset_times_s' in row:
                onsets[name] = list(row['onset_times_s'])
    elif source:
        videos = files(path, VIDEO_SUFFIXES)
        sounds = videos | files(path, SOUND_SUFFIXES)
        onsets = {name.removesuffix('_times'): _times(file) for name, file in files(path, ('.txt',)).items()
                  if name.endswith('_times')}
    if captions:
        rows = _rows(pathlib.Path(captions))
        texts = {_cell(row, _NAME_COLUMNS, captions): _cell(row, _CAPTION_COLUMNS, captions) for row in rows}
    return References(sounds, videos, texts, onsets)


def pair(generated: Mapping[str, Any], asked: set[str], allow_unpaired: bool, folder: pathlib.Path) -> Pairing:
    """Pairs by name.

    Raises:
      ValueError: nothing pairs; or missing or extra names that are not allowed.
    """
    names = tuple(sorted(set(generated) & asked))
    missing, extra = tuple(sorted(asked - set(generated))), tuple(sorted(set(generated) - asked))
    if not names:
        raise ValueError(f'{folder}: none of its {len(generated)} clips ({_some(generated)}) has the name of one of the '
                         f'{len(asked)} references ({_some(asked)})')
    if (missing or extra) and not allow_unpaired:
        parts = [f'{len(group)} {word} ({_some(group)})' for group, word in ((missing, 'missing'), (extra, 'extra')) if group]
        raise ValueError(f'{folder}: {" and ".join(parts)} of {len(asked)} clips asked for; make them whole, or set '
                         'config.score.allow_unpaired=True to score the others')
    return Pairing(names, missing, extra)


def _some(names) -> str:
    ordered = sorted(names)
    return ', '.join(ordered[:_SHOWN]) + (', …' if len(ordered) > _SHOWN else '')


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such table')
    with open(path, encoding='utf-8', newline='') as file:
        if path.suffix == '.jsonl':
            return [json.loads(line) for line in file if line.strip()]
        return list(csv.DictReader(file, delimiter='\t' if path.suffix == '.tsv' else ','))


def _cell(row: Mapping[str, Any], columns: tuple[str, ...], table: str) -> str:
    for column in columns:
        if row.get(column):
            return str(row[column])
    raise ValueError(f'{table}: a row has none of the columns {", ".join(columns)}: {dict(row)}')


def _times(path: pathlib.Path) -> list[float]:
    """The first number of every line, seconds."""
    try:
        return [float(line.replace(',', ' ').split()[0]) for line in path.read_text().splitlines() if line.strip()]
    except ValueError as error:
        raise ValueError(f'{path}: a line does not begin with a time in seconds') from error
