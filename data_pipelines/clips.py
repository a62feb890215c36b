"""Clip tables: which part of which file is an example, with its caption.

A dataset is a folder with one table a split, <split>.jsonl, one JSON object a line: id, video and audio (paths beside the
table, or absolute, or null), caption, split, and optionally start_s, label and fill. audio null means the sound inside the
video; video null, a sound alone. What else stands in a line (onset times, seeds) belongs to others and is kept out of the
records.
"""
import dataclasses
import json
import pathlib
import re
from typing import Any, Iterable, Mapping

from mmaudio_jax import media
from mmaudio_jax import tables

SPLITS = ('train', 'validation', 'test')
REQUIRED = ('id', 'video', 'audio', 'caption', 'split')
NULLABLE = ('video', 'audio')
FILLS = ('', 'silence', 'repeat')
SURROGATES = re.compile('[\ud800-\udfff]')  # no text: no encoding has them


@dataclasses.dataclass(frozen=True)
class Clip:
    """One example to extract.

    Attributes:
      id: unique in its split. split: 'train', 'validation' or 'test'.
      video, audio: files; see the module's docstring.
      caption: text, '' for none.
      start_s: seconds from the file's start.
      label: the class that sampling weights are counted by, '' for none.
      fill: what follows a sound that ends too early: '' (the clip is rejected), 'silence' or 'repeat' (the sound again).
    """
    id: str
    video: pathlib.Path | None
    audio: pathlib.Path | None
    caption: str
    split: str
    start_s: float
    label: str = ''
    fill: str = ''

    @property
    def sound(self) -> pathlib.Path:
        """The file that holds the sound."""
        source = self.audio or self.video
        assert source is not None  # read_table refuses such a line
        return source


def read_table(path: pathlib.Path) -> list[Clip]:
    """The clips of one <split>.jsonl, in the order of its lines.

    Raises:
      FileNotFoundError: no such table.
      ValueError: a line that is not such an object, an id that comes twice, an empty table; names file and line.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'{path}: no such clip table; config.extract.datasets names the folder that holds it')
    clips: list[Clip] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            try:
                clip = _parse(json.loads(line), path)
            except ValueError as error:
                raise ValueError(f'{path}, line {number}: {error}') from error
            if clip.id in lines:
                raise ValueError(f'{path}, line {number}: the id {clip.id!r} is that of line {lines[clip.id]} already')
            lines[clip.id] = number
            clips.append(clip)
    if not clips:
        raise ValueError(f'{path}: the table is empty; write its clips, or remove it')
    return clips


def _lines(path: pathlib.Path) -> list[str]:
    """Of a table, which end where JSON's do; str.splitlines() also cuts captions at U+2028."""
    try:
        return path.read_text(encoding='utf-8-sig').split('\n')
    except UnicodeDecodeError as error:
        line = error.object[:error.start].count(b'\n') + 1
        raise ValueError(f'{path}, line {line}: is not UTF-8 ({error.reason}); save the table as UTF-8') from error


def _parse(row: Any, path: pathlib.Path) -> Clip:
    """One line of the table at `path`."""
    if not isinstance(row, dict):
        raise ValueError('is not a JSON object')
    for column in REQUIRED:
        if column not in row:
            raise ValueError(f'has no {column!r}; needed are {", ".join(REQUIRED)}')
        nullable = column in NULLABLE
        if not isinstance(row[column], str) and not (nullable and row[column] is None):
            raise ValueError(f'{column!r} is {row[column]!r}, not a string{" or null" if nullable else ""}')
    for column in ('id', 'caption', 'label'):
        if SURROGATES.search(str(row.get(column, ''))):
            raise ValueError(f'{column!r} is {row[column]!r}, which holds half a character (a lone surrogate); write the whole '
                             'character, or none')
    start_s = row.get('start_s', 0.0)
    if isinstance(start_s, bool) or not isinstance(start_s, (int, float)) or not 0 <= start_s < float('inf'):
        raise ValueError(f"'start_s' is {start_s!r}, not a time in seconds from 0 on")
    if not row['id']:
        raise ValueError("'id' is empty")
    if row['video'] is None and row['audio'] is None:
        raise ValueError("'video' and 'audio' are both null")
    if row['split'] != path.stem:
        raise ValueError(f"'split' is {row['split']!r}, but the table is {path.name}")
    if not isinstance(row.get('label', ''), str):
        raise ValueError(f"'label' is {row['label']!r}, not a string")
    if row.get('fill', '') not in FILLS:
        raise ValueError(f"'fill' is {row['fill']!r}; it must be one of {', '.join(map(repr, FILLS))}")
    video, audio = (tables.beside(path, row[column]) if row[column] is not None else None for column in ('video', 'audio'))
    return Clip(row['id'], video, audio, row['caption'], row['split'], float(start_s), row.get('label', ''),
                row.get('fill', ''))


def write_table(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes the table that `read_table` reads, whole or not at all.

    Args:
      path: the table; media files in its folder are named relative to it, others by their absolute path.
      rows: the fields of Clip, and any others; empty label and fill are left out.
    """
    lines = []
    for row in rows:
        row = {name: value for name, value in row.items() if name not in ('label', 'fill') or value}
        for column in ('video', 'audio'):
            if row[column] is not None:
                file = pathlib.Path(row[column])
                inside = file.is_relative_to(path.parent)
                row[column] = (file.relative_to(path.parent) if inside else file.absolute()).as_posix()
        lines.append(to_line(row))
    with media.atomic_file(path) as beside:
        beside.write_text(''.join(lines), encoding='utf-8')


def to_line(value: Any) -> str:
    """One line of JSON; a file name that is no text (bytes that no encoding explains) is escaped."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:
        line = json.dumps(value)
    return line + '\n'


def read_splits(folder: pathlib.Path) -> dict[str, list[Clip]]:
    """The tables of a dataset's folder, in the order train, validation, test.

    Raises:
      FileNotFoundError: no table at all.
      ValueError: as `read_table`.
    """
    paths = {split: folder / f'{split}.jsonl' for split in SPLITS}
    found = {split: read_table(path) for split, path in paths.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f'{folder}: holds none of {", ".join(path.name for path in paths.values())}; '
                                'config.extract.datasets names folders of clip tables')
    return found


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the tables of a dataset's folder, by split: they change when the clips do."""
    paths = [folder / f'{split}.jsonl' for split in SPLITS]
    return {path.stem: media.digest(path) for path in paths if path.is_file()}
