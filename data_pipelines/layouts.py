"""What a downloaded dataset lists → clip tables, with a report of everything that is missing, doubled, empty or left out.

A layout (vggsound.py, audiocaps.py, …) yields entries as the published files list them; the steps after that are the same for
all: media are found, ids and captions checked, overlap with test sets removed, sounds cut into windows, tables written.
"""
import collections
import dataclasses
import json
import os
import pathlib
from typing import Any, Callable, Iterator, Sequence

import soundfile

from mmaudio_jax import media
from mmaudio_jax import tables

SUFFIXES = media.VIDEO_SUFFIXES + media.SOUND_SUFFIXES
HEADER_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.aif', '.aiff')  # whose headers tell the length to the sample
WINDOWS = 5  # of a sound file, at most, as in MMAudio's extraction
WINDOW_MARGIN_S = 0.1  # windows are that much longer than a clip
REPORT = 'clips_report.json'
ID_COLUMNS = ('source', 'youtube_id', 'sound_id', 'file_name', 'id', 'file', 'video', 'audio')  # of id lists
AHEAD = 64  # files that are probed ahead


@dataclasses.dataclass(frozen=True)
class Entry:
    """One thing that a dataset lists.

    Attributes:
      id: of its clips; several windows or captions add _0, _1, …
      split: 'train', 'validation' or 'test'.
      captions: one or more; each becomes a clip.
      file: the media file, None when it is not there.
      video: whether its pictures are used, not its sound alone.
      cut: 'start' (one clip from start_s), 'spread' (at most WINDOWS windows, evenly spread) or 'all' (one after the other).
      start_s: see cut.
      label: class, '' for none.
      source: the recording that it was cut from, by which overlap is found (a YouTube id, a Freesound id, a file name).
      describe: for every clip, (start in seconds, duration in seconds) → fields of its row that differ.
    """
    id: str
    split: str
    captions: tuple[str, ...]
    file: pathlib.Path | None
    video: bool
    cut: str
    start_s: float = 0.0
    label: str = ''
    source: str = ''
    describe: Callable[[float, float], dict[str, Any]] | None = None


class Media:
    """The media files below a folder, by name without suffix; hidden ones ('._x.mp4' is a note of macOS) are none.

    Links are followed, but every folder is read once, and none that the folder itself lies in: 'latest -> .' would give a file
    many names, and one that is held out would be trained on by another.
    """

    def __init__(self, folder: pathlib.Path):
        self._folder = folder
        self._files: dict[str, list[pathlib.Path]] = collections.defaultdict(list)
        known = set(map(str, pathlib.Path(os.path.realpath(folder)).parents))
        for parent, folders, names in os.walk(folder, followlinks=True):
            real = os.path.realpath(parent)
            if real in known:
                folders.clear()
                continue
            known.add(real)
            links = {name for name in folders if os.path.islink(os.path.join(parent, name))}
            folders[:] = [*sorted(set(folders) - links), *sorted(links)]  # a folder's own name comes first
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and not name.startswith('.'):
                    self._files[tables.composed(stem)].append(pathlib.Path(parent, name))
        self.count = sum(map(len, self._files.values()))

    def find(self, *stems: str, within: str = '', suffixes: Sequence[str] = SUFFIXES,
             preferred: str = '') -> pathlib.Path | None:
        """The file of the first of the names that is there with one of the suffixes; below a folder whose name holds `within`,
        if one is; of those the one with the `preferred` suffix, if there is one."""
        part = tables.composed(within).lower()
        for stem in stems:
            files = [file for file in self._files.get(tables.composed(stem), []) if file.suffix.lower() in suffixes]
            inside = [file for file in files if part in tables.composed(str(file.parent.relative_to(self._folder))).lower()]
            if files:
                return min(inside or files, key=lambda file: file.suffix.lower() != preferred)
        return None

    def __iter__(self) -> Iterator[pathlib.Path]:
        return (file for files in self._files.values() for file in files)


class Report:
    """What was found wrong, by kind; everything is listed, nothing is silent."""

    def __init__(self) -> None:
        self.lists: dict[str, list[str]] = {kind: [] for kind in (
            'missing_files', 'duplicate_ids', 'renamed_ids', 'empty_captions', 'unknown_columns', 'unusable_rows',
            'unreadable_files', 'too_short', 'also_in_test', 'named_but_tested')}
        self.excluded: dict[str, list[str]] = {}  # by id list; also those that took nothing out
        self.listings: dict[str, str] = {}  # files that were read → their digests

    def add(self, kind: str, what: str) -> None:
        """Lists something."""
        self.lists[kind].append(what)

    def read(self, path: pathlib.Path) -> str:
        """The text of a listing; what stands in it is remembered by its digest."""
        self.listings[str(path)] = media.digest(path)
        return tables.read_text(path)

    def summary(self, with_first: bool = False) -> str:
        """The counts that are not zero, in words, with the first of each if asked for, and what every id list took out."""
        first = lambda found: f' (the first: {found[0]})' if with_first else ''
        counts = [f'{len(found)} {kind.replace("_", " ")}{first(found)}' for kind, found in self.lists.items() if found]
        counts += [f'{len(found)} excluded by {name}' for name, found in self.excluded.items()]
        return ', '.join(counts) or 'nothing to complain of'


def read_csv(path: pathlib.Path, report: Report, needed: Sequence[str],
             known: Sequence[str] = ()) -> Iterator[tuple[int, dict[str, str]]]:
    """(number of its first line, cells by column) of the rows of a file with a header.

    Args:
      path: of the file.
      report: columns that are neither needed nor known, and rows of another length, are listed there.
      needed, known: names of columns.

    Raises:
      ValueError: a needed column is missing, or a row that tables.csv_rows refuses.
    """
    rows = tables.csv_rows(path, report.read(path))
    _, header = next(rows, (1, []))
    missing = [column for column in needed if column not in header]
    if missing:
        raise ValueError(f'{path}: has no column {", ".join(map(repr, missing))}; its first line is {header}')
    for column in header:
        if column not in needed and column not in known:
            report.add('unknown_columns', f'{path.name}: {column}')
    for line, row in rows:
        if len(row) == len(header):
            yield line, dict(zip(header, row))
        elif row:
            hint = '; a cell that holds what parts the columns needs quotes' if len(row) > len(header) else ''
            report.add('unusable_rows', f'{path.name}, line {line}: {len(row)} columns, not {len(header)}{hint}')


def read_ids(path: pathlib.Path, key: str = '') -> set[str]:
    """The sources and ids that an id list names, in the form of `source_of`; at least one.

    Known forms: .json (a list, or a dict of lists as WavCaps's blacklists, of which `key` is taken), a headerless csv as
    VGGSound's (its test rows), a csv or tsv with a header (the first of the columns ID_COLUMNS that it has), else one id a
    line. File name endings and the Y that AudioSet's files have before a YouTube id are taken off.

    Raises:
      FileNotFoundError: no such file. ValueError: a json of another form, a row that tables.csv_rows refuses, or no id.
    """
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such id list; correct config.clips.exclude')
    names = _json_names(path, key) if path.suffix == '.json' else _names(path)
    ids = {source_of(name) for name in names} - {''}
    if not ids:  # else what it should take out would be trained on
        raise ValueError(f'{path}: holds no id; a csv or tsv needs one of the columns {", ".join(ID_COLUMNS)}, or those of '
                         'vggsound.csv without a header, of which the test rows are taken; correct it, or config.clips.exclude')
    return ids


def _json_names(path: pathlib.Path, key: str) -> list[str]:
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except ValueError as error:
        raise ValueError(f'{path}: is no JSON ({error}); is it whole?') from error
    if isinstance(found, dict):
        if key not in found:
            raise ValueError(f'{path}: has no list {key!r}; it has {", ".join(found)}')
        found = found[key]
    if not isinstance(found, list) or not all(isinstance(name, (str, int)) for name in found):
        raise ValueError(f'{path}: is no list of ids, but {found!r:.80}; correct it, or config.clips.exclude')
    return list(map(str, found))


def _names(path: pathlib.Path) -> list[str]:
    text = tables.read_text(path)
    if path.suffix not in ('.csv', '.tsv'):
        return [line.strip() for line in text.split('\n')]
    rows = [row for _, row in tables.csv_rows(path, text) if row]
    for column in ID_COLUMNS:
        if rows and column in rows[0]:
            place = rows[0].index(column)
            return [row[place] for row in rows[1:] if len(row) > place]
    return [row[0] for row in rows if len(row) != 4 or row[3] == 'test']


def source_of(name: str) -> str:
    """The recording that a file name stands for: '---g-f_I2yQ' of 'Y---g-f_I2yQ.wav' or '---g-f_I2yQ_000030'."""
    name = tables.composed(name)
    stem = name[:-len(os.path.splitext(name)[1])] if os.path.splitext(name)[1].lower() in SUFFIXES else name
    if len(stem) == 12 and stem[0] == 'Y':
        return stem[1:]
    return stem[:11] if len(stem) == 18 and stem[11] == '_' and stem[12:].isdigit() else stem


def length_s(path: pathlib.Path, of_sound: bool = True) -> tuple[int, int] | str:
    """(samples, rate in Hz) of a file's sound, or of its pictures, or why it cannot be read; runs in worker processes."""
    try:
        if path.suffix.lower() in HEADER_SUFFIXES:
            try:
                info = soundfile.info(os.fspath(path))
                if info.frames:  # 0 in the header of a recorder that died
                    return info.frames, info.samplerate
            except soundfile.SoundFileError:
                pass  # something else under this ending
        found = media.probe(path)
        rate = found.sample_rate_hz or 1_000_000
        if of_sound and not found.sound_s:
            raise media.MediaError(path, 'holds no sound')
        return int((found.sound_s if of_sound else found.duration_s) * rate), rate
    except (media.MediaError, UnicodeError) as error:
        return str(error)


def window_starts(samples: int, rate: int, duration_s: float, cut: str) -> list[float]:
    """Where the clips of a file start, seconds; none when it is too short.

    'spread': at most WINDOWS windows of duration_s + 0.1 s, the first at the beginning, the last at the end, the others evenly
    between them, to the sample as the official partition has them. 'all': clips of duration_s one after the other.
    """
    if cut == 'all':
        return [i * duration_s for i in range(int(samples / rate / duration_s))]
    window = int(rate * (duration_s + WINDOW_MARGIN_S))
    count = min(WINDOWS, samples // window)
    interval = (samples - window) // (count - 1) if count > 1 else 0
    return [i * interval / rate for i in range(count)]
