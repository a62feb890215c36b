"""Greatest Hits (Owens et al. 2016): videos of a drumstick that hits and scratches things, with the times of its actions.

Listing: train.txt and test.txt, a recording's name a line. Files: <name>_denoised.mp4 (or <name>.mp4 …) and <name>_times.txt:
time in seconds, material, action and reaction, separated by spaces. Videos are cut into clips one after the other; a clip's
caption says what is done to what ('a drumstick hits metal, scratches cloth'), and onset_times_s in its row holds the times,
counted from its start.
"""
import functools
import math
import pathlib
from typing import Any, Iterator

from data_pipelines import layouts
from mmaudio_jax.media import VIDEO_SUFFIXES

SPLITS = {'train.txt': 'train', 'test.txt': 'test'}
VERBS = {'hit': 'hits', 'scratch': 'scratches'}


def read(folder: pathlib.Path, media: layouts.Media, report: layouts.Report) -> Iterator[layouts.Entry]:
    """The entries below `folder`. See layouts.Entry."""
    listings = [(path, split) for name, split in SPLITS.items() for path in sorted(folder.rglob(name))[:1]]
    if not listings:
        raise FileNotFoundError(f'{folder}: holds neither train.txt nor test.txt')
    times = {path.name.removesuffix('_times.txt'): path for path in sorted(folder.rglob('*_times.txt'))}
    for path, split in listings:
        for name in filter(None, map(str.strip, report.read(path).splitlines())):
            file = media.find(f'{name}_denoised', f'{name}_mic', name, suffixes=VIDEO_SUFFIXES)
            if name not in times:
                report.add('missing_files', f'{name}_times.txt')
                continue
            actions = list(_actions(times[name], report))
            yield layouts.Entry(name, split, ('a drumstick touches things',), file, video=True, cut='all', source=name,
                                describe=functools.partial(_describe, actions))


def _actions(path: pathlib.Path, report: layouts.Report) -> Iterator[tuple[float, str, str]]:
    """(time in seconds, material, action) of every line."""
    for number, line in enumerate(report.read(path).splitlines(), 1):
        words = line.split()
        try:
            action = float(words[0]), words[1], words[2]
            if not 0 <= action[0] < math.inf:
                raise ValueError
            yield action
        except (ValueError, IndexError):
            report.add('unusable_rows', f'{path.name}, line {number}: {line!r}')


def _describe(actions: list[tuple[float, str, str]], start_s: float, duration_s: float) -> dict[str, Any]:
    """Caption and onset times of the clip from start_s on; what an annotator could not name ('None') is not in the caption."""
    inside = [action for action in actions if start_s <= action[0] < start_s + duration_s]
    named = dict.fromkeys(f'{VERBS[action]} {material.replace("-", " ")}' for _, material, action in inside
                          if action in VERBS and material != 'None')
    row: dict[str, Any] = {'onset_times_s': [round(time_s - start_s, 6) for time_s, _, _ in inside]}
    return {**row, 'caption': f'a drumstick {", ".join(named)}'} if named else row
