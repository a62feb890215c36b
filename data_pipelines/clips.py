"""Clip tables: which part of which file is an example, with its caption; and how one is read.

A dataset is a folder with one table a split, <split>.jsonl, one JSON object a line: id, video and audio (paths beside the
table, or null), caption, split, and optionally start_s. audio null means the sound inside the video; video null, a sound
alone. What else stands in a line (onset times, seeds) belongs to others and is kept out of the records.
"""
import dataclasses
import hashlib
import json
import pathlib
from typing import Any, Sequence

import numpy as np

from mmaudio_jax import media

SPLITS = ('train', 'validation', 'test')
REQUIRED = ('id', 'video', 'audio', 'caption', 'split')
NULLABLE = ('video', 'audio')
PEAK = 0.95  # training clips are scaled to it
SILENT_PEAK = 1e-6


@dataclasses.dataclass(frozen=True)
class Clip:
    """One example to extract. Paths start at the table's folder; start_s in seconds from the file's start."""
    id: str
    video: pathlib.Path | None
    audio: pathlib.Path | None
    caption: str
    split: str
    start_s: float


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
    for number, line in enumerate(path.read_text(encoding='utf-8').splitlines(), 1):
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
    start_s = row.get('start_s', 0.0)
    if isinstance(start_s, bool) or not isinstance(start_s, (int, float)) or not 0 <= start_s < float('inf'):
        raise ValueError(f"'start_s' is {start_s!r}, not a time in seconds from 0 on")
    if not row['id']:
        raise ValueError("'id' is empty")
    if row['video'] is None and row['audio'] is None:
        raise ValueError("'video' and 'audio' are both null")
    if row['split'] != path.stem:
        raise ValueError(f"'split' is {row['split']!r}, but the table is {path.name}")
    video, audio = (path.parent / row[column] if row[column] is not None else None for column in ('video', 'audio'))
    return Clip(row['id'], video, audio, row['caption'], row['split'], float(start_s))


def write_table(path: pathlib.Path, clips: Sequence[Clip]) -> None:
    """Writes the table that `read_table` reads, whole or not at all; media files are named relative to its folder."""
    lines = []
    for clip in clips:
        row = dataclasses.asdict(clip)
        for column in ('video', 'audio'):
            if row[column] is not None:
                row[column] = row[column].relative_to(path.parent).as_posix()
        lines.append(json.dumps(row, ensure_ascii=False) + '\n')
    with media.atomic_file(path) as beside:
        beside.write_text(''.join(lines), encoding='utf-8')


def read_splits(folder: pathlib.Path) -> dict[str, list[Clip]]:
    """The tables of a dataset's folder, in the order train, validation, test.

    Raises:
      FileNotFoundError: no table at all.
      ValueError: as `read_table`.
    """
    tables = {split: folder / f'{split}.jsonl' for split in SPLITS}
    found = {split: read_table(path) for split, path in tables.items() if path.is_file()}
    if not found:
        raise FileNotFoundError(f'{folder}: holds none of {", ".join(path.name for path in tables.values())}; '
                                'config.extract.datasets names folders of clip tables')
    return found


def digests(folder: pathlib.Path) -> dict[str, str]:
    """SHA-256 of the tables of a dataset's folder, by split: they change when the clips do."""
    paths = [folder / f'{split}.jsonl' for split in SPLITS]
    return {path.stem: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


@dataclasses.dataclass(frozen=True)
class Request:
    """What to read of every clip: frame streams over duration_s, and `samples` of sound at sample_rate_hz."""
    frames: tuple[media.FrameRequest, ...]
    duration_s: float
    sample_rate_hz: int
    samples: int


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A clip as read: uint8 frame streams `[F, h, w, 3]` (none for a sound alone), float32 sound `[samples]`, or why not."""
    frames: list[np.ndarray] | None
    waveform: np.ndarray | None
    rejected: str | None


def load(clip: Clip, request: Request) -> Loaded:
    """Reads one clip; what cannot be used is no error but `rejected`.

    The sound is mono by averaging. In the split train it is scaled to a peak of 0.95, as MMAudio's data code does.
    """
    try:
        source = clip.audio or clip.video
        assert source is not None  # read_table refuses such a line
        waveform = media.read_audio(source, request.sample_rate_hz, clip.start_s, request.samples / request.sample_rate_hz)
        peak = float(np.abs(waveform).max())
        if not peak >= SILENT_PEAK:
            return Loaded(None, None, f'{source}: silent (peak {peak:.1e})')
        if clip.split == 'train':
            waveform = waveform * np.float32(PEAK / peak)
        frames = None
        if clip.video is not None and request.frames:
            frames = media.read_frames(clip.video, request.frames, clip.start_s, request.duration_s)
    except media.MediaError as error:
        return Loaded(None, None, str(error))
    return Loaded(frames, waveform, None)
