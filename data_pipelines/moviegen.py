"""Movie Gen Audio Bench (Polyak et al. 2024) and folders like it: videos to test on, with a prompt for their sound.

Listing: <video's name>.jsonl for each video, one object with audio_prompt; or one .jsonl for all of them, a line each, with id
(the video's name) and audio_prompt.
"""
import functools
import json
import pathlib
from typing import Any, Iterator

from data_pipelines import layouts
from mmaudio_jax.media import VIDEO_SUFFIXES

KNOWN = ('id', 'audio_prompt', 'video_prompt', 'music_prompt')


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`. See layouts.Entry."""
    listings = sorted(folder.rglob('[!.]*.jsonl'))
    if not listings:
        raise FileNotFoundError(f'{folder}: holds no .jsonl with audio_prompt')
    find = functools.partial(media.find, suffixes=VIDEO_SUFFIXES)
    for path in listings:
        for number, line in enumerate(report.read(path).split('\n'), 1):
            row = _object(line)
            if not line.strip():
                continue
            if 'audio_prompt' not in row:
                report.add('unusable_rows', f'{path.name}, line {number}: no object with audio_prompt')
                continue
            for column in sorted(set(row) - set(KNOWN)):
                report.add('unknown_columns', f'{path.name}: {column}')
            name = path.stem if find(path.stem) else str(row.get('id', path.stem))
            yield layouts.Entry(name, 'test', (str(row['audio_prompt']),), find(name), video=True, cut='start', source=name)


def _object(line: str) -> dict[str, Any]:
    """The object of a line, empty when it is none."""
    try:
        row = json.loads(line)
    except ValueError:
        return {}
    return row if isinstance(row, dict) else {}
