"""What is scored and against what: folders of sound by name, references, captions and onsets, and how they pair.

A clip's name is its file's without the suffix, however its letters are composed. Nothing is dropped in silence: two files of
one name are an error, and missing and extra names are one unless they are allowed.
"""
import collections
from collections.abc import Collection
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import json
import math
import pathlib
import re
from typing import Any

import soundfile

from mmaudio_jax import media
from mmaudio_jax import tables
from mmaudio_jax.evaluation_media import Part

_NAME_COLUMNS = ('id', 'name', 'video_id', 'youtube_id')
_CAPTION_COLUMNS = ('caption', 'label')
_SHOWN = 5  # names of an error
_SHORTER = 0.99  # of the duration: a clip that lasts less is short
_Media = pathlib.Path | Part


@dataclasses.dataclass(frozen=True)
class References:
    """What sounds are measured against, by clip's name; each may be empty.

    Attributes:
      sounds: true sound. videos: the picture. captions: the text.
      onsets: true onset times in seconds.
    """
    sounds: Mapping[str, _Media]
    videos: Mapping[str, _Media]
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
            name = tables.composed(path.stem).removesuffix(ending)
            if name in found:
                raise ValueError(f'{folder}: {found[name].name} and {path.name} have one name; which is the clip? '
                                 'Keep one of them')
            found[name] = path
    return dict(sorted(found.items()))


def sounds(folder: pathlib.Path, ending: str = '') -> dict[str, pathlib.Path]:
    """Name → file of the sounds right in `folder`, as `files` gives them; says what is passed over."""
    found = files(folder, media.SOUND_SUFFIXES, ending)
    _say_passed_over(folder, found.values())
    return found


def _say_passed_over(folder: pathlib.Path, used: Collection[pathlib.Path]) -> None:
    others = sorted(path.name for path in folder.iterdir() if path not in used and not path.name.startswith('.'))
    if others:
        print(f'score: passes over {len(others)} of {folder}, which are not what is scored by their names, first {others[0]}',
              flush=True)


def systems(generated: str, compare: str) -> dict[str, pathlib.Path]:
    """System's name → folder, from config.score.generated or from config.score.compare ('a=DIR b=DIR'); none for neither.

    Raises:
      ValueError: both, or not of that form.
    """
    if generated and compare:
        raise ValueError('name either one folder (config.score.generated) or several (--compare a=DIR b=DIR)')
    if generated:
        folder = pathlib.Path(generated)
        return {folder.name or 'generated': folder}
    result: dict[str, pathlib.Path] = {}
    for part in filter(None, re.split(r'[ ,]+(?=[^ ,=/]+=)', compare.strip(' ,'))):  # a folder's name may hold spaces
        name, _, folder_name = part.partition('=')
        if not name or not folder_name or name in result:
            raise ValueError(f'--compare: {part!r} is not of the form name=FOLDER with a name of its own')
        result[name] = pathlib.Path(folder_name)
    return result


def references(source: str, captions: str, duration_s: float, names: Sequence[str] | None = None,
               ending: str = '') -> References:
    """References from a folder or a table.

    Args:
      source: '' for none; a folder of sounds and videos (a sound file goes before the video's own track; NAME_times.txt holds
        onsets, one a line, of which the first number counts); or a .jsonl table with the keys id, audio, video, caption,
        start_s and onset_times_s, whose files are beside it.
      captions: '' or a .csv, .tsv or .jsonl table of names and captions, which goes before the captions of `source`.
      duration_s: of a clip that does not begin with its file.
      names: the clips of the table that count; None for all.
      ending: of the names of sounds and videos; those of a folder that have it lose it, and the others do not count then
        (Greatest Hits has NAME_denoised.mp4 and NAME_mic.mp4 beside NAME_times.txt).

    Raises:
      FileNotFoundError: no such folder or file.
      ValueError: two files or rows of one name, a folder without references, a table without the columns, without some of
        `names`, or no table.
    """
    path = pathlib.Path(source)
    found = References({}, {}, {}, {})
    if source and path.suffix == '.jsonl':
        found = _table(path, duration_s, names)
    elif source:
        videos, heard = (_marked(files(path, suffixes), ending) for suffixes in (media.VIDEO_SUFFIXES, media.SOUND_SUFFIXES))
        times = {name: file for name, file in files(path, ('.txt',)).items() if name.endswith('_times')}
        used = {*videos.values(), *heard.values(), *times.values()}
        if not used:
            raise ValueError(f'{path}: holds no references: no video ({" ".join(media.VIDEO_SUFFIXES)}), no sound '
                             f'({" ".join(media.SOUND_SUFFIXES)}), no NAME_times.txt')
        _say_passed_over(path, used)
        onsets = {name.removesuffix('_times'): _times(file) for name, file in times.items()}
        found = References(videos | heard, videos, {}, onsets)
    if captions:
        rows = table_rows(pathlib.Path(captions))
        own = {tables.composed(name): name for name in names or ()}  # the records' ids, as they are
        clips = [tables.composed(_cell(row, _NAME_COLUMNS, captions)) for row in rows]
        texts = {own.get(name, name): _cell(row, _CAPTION_COLUMNS, captions) for name, row in zip(clips, rows)}
        if len(texts) < len(rows):
            counts = collections.Counter(clips)
            raise ValueError(f'{captions}: {len(rows) - len(texts)} names come twice ({counts.most_common(1)[0][0]}); which '
                             'caption is the clip\'s? Keep one of each')
        found = dataclasses.replace(found, captions=texts)
    return found


def captions_of(captions: Mapping[str, str], clips: set[str], table: str) -> dict[str, str]:
    """The captions of the clips; says how many rows of the table are passed over.

    Raises:
      ValueError: none is of one of the clips.
    """
    kept = {name: caption for name, caption in captions.items() if name in clips}
    if not kept:
        raise ValueError(f'{table}: none of its {len(captions)} names ({_some(captions)}) is that of one of the {len(clips)} '
                         f'clips ({_some(clips)})')
    if len(kept) < len(captions):
        first = min(captions.keys() - kept.keys())
        print(f'score: passes over {len(captions) - len(kept)} rows of {table}, which are of other clips, first {first}',
              flush=True)
    return kept


def _marked(found: dict[str, pathlib.Path], ending: str) -> dict[str, pathlib.Path]:
    """The files whose names have the ending, without it; all of them when none has."""
    return {name.removesuffix(ending): path for name, path in found.items() if ending and name.endswith(ending)} or found


def _table(path: pathlib.Path, duration_s: float, names: Sequence[str] | None) -> References:
    """A clip table (data_pipelines/clips.py)."""
    lines = table_rows(path)
    rows = {tables.composed(str(row.get('id'))): row for row in lines}
    if len(rows) < len(lines):
        raise ValueError(f'{path}: two rows have one id, or none')
    lacking = [name for name in names or () if tables.composed(name) not in rows]
    if lacking:
        raise ValueError(f'{path}: has no row for {len(lacking)} of the {len(names or ())} records ({_some(lacking)}); extract '
                         'again (--mode=extract), or restore the table')
    heard: dict[str, _Media] = {}
    videos: dict[str, _Media] = {}
    used = {name: rows[tables.composed(name)] for name in (rows if names is None else names)}
    for name, row in used.items():
        start_s = float(row.get('start_s') or 0.0)  # _object has checked it
        for file, files_of in ((row.get('audio') or row.get('video'), heard), (row.get('video'), videos)):
            if file:
                place = tables.beside(path, file)
                files_of[name] = Part(place, start_s, duration_s) if start_s else place
    return References(heard, videos, {name: row['caption'] for name, row in used.items() if row.get('caption')},
                      {name: row['onset_times_s'] for name, row in used.items() if 'onset_times_s' in row})


def _is_time(value: Any) -> bool:
    """Whether it is a number of seconds from 0 on; true and false are no numbers."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < math.inf


def short(clips: Mapping[str, _Media], duration_s: float) -> dict[str, float]:
    """Name → seconds of the sounds that last less than duration_s, not decoded; damaged and missing ones are not among them."""
    found = {}
    for name, clip in clips.items():
        path = pathlib.Path(clip)
        try:
            by_header = path.suffix.lower() in media.SOUND_FORMATS
            seconds = soundfile.info(path).duration if by_header else media.probe(path).sound_s
        except (OSError, soundfile.SoundFileError, media.MediaError):  # said where it is read
            continue
        seconds -= clip.start_s if isinstance(clip, Part) else 0.0
        if 0 < seconds < _SHORTER * duration_s:
            found[name] = round(seconds, 3)
    return found


def pair(generated: Mapping[str, Any], asked: set[str], allow_unpaired: bool, folder: pathlib.Path) -> Pairing:
    """Pairs by name.

    Raises:
      ValueError: nothing is there, or nothing pairs; or missing or extra names that are not allowed.
    """
    if not generated:
        raise ValueError(f'{folder}: holds no sound that can be scored (docs/evaluation.md says which): {_contents(folder)}')
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


def _contents(folder: pathlib.Path) -> str:
    """'it holds 6 .mp3, 3 folders', the most frequent first."""
    counts = collections.Counter('folders' if path.is_dir() else path.suffix.lower() or 'files without a suffix'
                                 for path in folder.iterdir() if not path.name.startswith('.'))
    if not counts:
        return 'it is empty'
    return f'it holds {", ".join(f"{count} {kind}" for kind, count in counts.most_common(_SHOWN))}'


def _some(names) -> str:
    ordered = sorted(names)
    return ', '.join(ordered[:_SHOWN]) + (', …' if len(ordered) > _SHOWN else '')


def table_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a .csv, .tsv or .jsonl table, in UTF-8, with or without a mark, or Latin-1; blank lines do not count.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a row that cannot be read, or whose start_s or onset_times_s are no times; names file and line.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such table')
    text = tables.read_text(path)
    if path.suffix == '.jsonl':
        return [_object(line, path, number) for number, line in enumerate(text.split('\n'), 1) if line.strip()]
    (_, header), *rows = [found for found in tables.csv_rows(path, text) if found[1]] or [(1, [])]
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f'{path}, line {line}: {len(row)} cells, but the header has {len(header)} columns; a '
                             'cell with a comma in it needs quotes')
    return [dict(zip(header, row)) for _, row in rows]


def _object(line: str, path: pathlib.Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f'{path}, line {number}: {error}') from error
    if not isinstance(row, dict):
        raise ValueError(f'{path}, line {number}: is not a JSON object')
    if row.get('start_s') is not None and not _is_time(row['start_s']):
        raise ValueError(f'{path}, line {number}: start_s is {json.dumps(row["start_s"])}; seconds from 0 on are needed')
    times = row.get('onset_times_s', [])
    if not isinstance(times, list) or not all(map(_is_time, times)):
        raise ValueError(f'{path}, line {number}: onset_times_s is {json.dumps(times)}; a list of seconds is needed, each from '
                         '0 on, [] where nothing sounds')
    return row


def _cell(row: Mapping[str, Any], columns: tuple[str, ...], table: str) -> str:
    for column in columns:
        if row.get(column):
            return str(row[column])
    raise ValueError(f'{table}: a row has none of the columns {", ".join(columns)}: {dict(row)}')


def _times(path: pathlib.Path) -> list[float]:
    """The first number of every line, seconds; what follows it may be in any encoding."""
    times = []
    for number, line in enumerate(path.read_text(encoding='utf-8-sig', errors='replace').split('\n'), 1):
        if not line.strip():
            continue
        if re.match(r'\s*[-+\d.]*\d,\d', line):
            raise ValueError(f'{path}, line {number}: {line.split()[0]!r} has a comma between two digits; write a decimal '
                             'point, or a space behind a comma that ends the time')
        word = next(iter(line.replace(',', ' ').split()), line)
        try:
            times.append(float(word))
        except ValueError as error:
            raise ValueError(f'{path}, line {number}: {word!r} is not a time in seconds, with which a line begins') from error
        if not _is_time(times[-1]):
            raise ValueError(f'{path}, line {number}: {word!r} is not a time in seconds from 0 on')
    return times
