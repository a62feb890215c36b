"""Any folder of media: with a csv or tsv that lists them, or without one, when the names are the captions.

Columns (a header is needed): file, or video, or audio (paths below the folder, or names), or id alone, which is then the file's
name, as in MMAudio's tables of captions; and, as they are there, caption, id, split, start_s, label, source. Without start_s,
sounds are cut into windows and videos start at their beginning. Without an id, it is the file's path, and the start where there
is one: 'rain/long_000030' is the clip of 'rain/long.wav' from 30 s on. Without any listing, 'wolf/growl-2.ogg' becomes the
training clip 'wolf growl' with the label 'wolf'.
"""
import collections
import math
import pathlib
import re
from typing import Iterator

from data_pipelines import clips
from data_pipelines import layouts
from mmaudio_jax import tables
from mmaudio_jax.media import VIDEO_SUFFIXES

FILES = ('file', 'video', 'audio', 'id')  # the first that is there
KNOWN = ('caption', 'id', 'split', 'start_s', 'label', 'source')
SPLITS = {'': 'train', 'val': 'validation', **{split: split for split in clips.SPLITS}}


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`. See layouts.Entry."""
    listings = sorted([*folder.glob('[!.]*.csv'), *folder.glob('[!.]*.tsv')])
    if not listings:
        yield from _by_name(folder, media)
    for path in listings:
        _, header = next(tables.csv_rows(path, tables.read_text(path)), (1, []))
        named = FILES if set(header).issubset(KNOWN) else FILES[:-1]  # another column may be a misspelt 'file'
        column = next((name for name in named if name in header), None)
        if column is None:
            raise ValueError(f'{path}: has no column {" or ".join(FILES[:-1])}; its first line is {header}')
        for line, row in layouts.read_csv(path, report, (column,), KNOWN):
            entry = _entry(folder, column, row, media)
            if isinstance(entry, str):
                report.add('unusable_rows', f'{path.name}, line {line}: {entry}')
            else:
                yield entry


def _entry(folder: pathlib.Path, column: str, row: dict[str, str], media: layouts.Media) -> layouts.Entry | str:
    """The entry of a row, or what is wrong with it."""
    named = pathlib.PurePath(row[column])
    if not named.name.strip():
        return 'names no file'
    file = folder / named if (folder / named).is_file() else _found(named, column, media)
    video = column == 'video' or column != 'audio' and (file or named).suffix.lower() in VIDEO_SUFFIXES
    start = row.get('start_s', '').strip()
    split = SPLITS.get(row.get('split', '').strip())
    if split is None:
        return f'split is {row["split"]!r}; it must be train, validation or test'
    try:
        start_s = float(start or 0)
    except ValueError:
        start_s = math.nan
    if not 0 <= start_s < math.inf:
        return f'start_s is {start!r}, not a time in seconds from 0 on'
    name, place = row.get('id', '').strip(), f'_{_written(start_s)}' if start else ''  # as VGGSound names its clips
    clip = name if name and column != 'id' else (name or named.with_suffix('').as_posix()) + place
    return layouts.Entry(clip, split, (row.get('caption', ''),), file,
                         video, 'start' if video or start else 'spread', start_s, row.get('label', ''),
                         row.get('source', '') or str(named))


def _found(named: pathlib.PurePath, column: str, media: layouts.Media) -> pathlib.Path | None:
    """The file that a row names by its name, or by a name of another suffix."""
    suffix = named.suffix.lower()
    stem = named.stem if suffix in layouts.SUFFIXES else named.name
    return media.find(stem, named.stem, named.name, within='/'.join(named.parts[:-1]), preferred=suffix,
                      suffixes=VIDEO_SUFFIXES if column == 'video' else layouts.SUFFIXES)


def _written(start_s: float) -> str:
    """'000030' of 30.0, '000030.25' of 30.25."""
    whole, _, part = f'{start_s:.6f}'.rstrip('0').partition('.')
    return whole.zfill(6) + (f'.{part}' if part else '')


def _by_name(folder: pathlib.Path, media: layouts.Media) -> Iterator[layouts.Entry]:
    """Every file, its folder and name for a caption; numbers at the end of names are no words."""
    stems = collections.Counter(file.with_suffix('') for file in media)
    for file in sorted(media):
        name = file.relative_to(folder).with_suffix('')
        parts = [_words(part) for part in name.parts[-2:]]
        caption = ' '.join(dict.fromkeys(' '.join(filter(None, parts)).split()))
        video = file.suffix.lower() in VIDEO_SUFFIXES
        unique = name if stems[file.with_suffix('')] == 1 else file.relative_to(folder)
        yield layouts.Entry(unique.as_posix(), 'train', (caption,), file, video, 'start' if video else 'spread',
                            label=parts[0] if len(parts) > 1 else caption, source=unique.as_posix())


def _words(name: str) -> str:
    """'wolf growl' of 'WolfGrowl-02'."""
    spaced = re.sub(r'(?<=[a-z])(?=[A-Z])', ' ', name)
    return ' '.join(re.findall(r'[^\W\d_]+', spaced.lower()))
