"""--mode=ablations: rows × seeds as runs of their own, and the table of what came out, with mean and spread.

Each run is the command `python run.py --config=ROW --workdir=WORKDIR/ROW/seed_N` with all its stages. The first one makes
the media and records, which the others share, config.ablations.at_once of them at a time. They resume where they stopped;
when this process is told to stop (SIGTERM, SIGINT), so are they.
The figures are those of a run's scores.json (score.py) or report.json (evaluate.py): the former when the flags of all runs ask
for scores, otherwise, as a row's file may ask for them, the one that was asked for last (the newer one).
"""
from collections.abc import Mapping
from collections.abc import Sequence
import concurrent.futures
import json
import os
import pathlib
import queue
import shlex
import signal
import statistics
import subprocess
import sys
import threading
from typing import Any

from mmaudio_jax import media
from mmaudio_jax import score_metrics
from mmaudio_jax import score_tables

_SCORES = ('sample', 'generated', 'compare')  # fields of config.score that ask for scores.json, as evaluate.py has it
_OWN_FLAGS = ('--config=', '--workdir=', '--mode=', '--config.ablations.')
# Figure of a report → title of its column and digits after the point.
_ONSETS = {'f1': ('onset F1', 3), 'average_precision': ('AP', 3), 'median_error_ms': ('median error ms', 1),
           'shuffled_f1': ('shuffled F1', 3), 'codec_f1': ('codec F1', 3)}
_COLUMNS = _ONSETS | {name: (score_tables.title(name), metric.digits) for name, metric in score_metrics.METRICS.items()}


def run(config, workdir: pathlib.Path) -> int:
    """Runs what is missing of config.ablations and writes workdir/ablations.json and ablations.md after every run.

    --config.FIELD=VALUE flags of this command reach every run.

    Args:
      config: its section ablations, and data_dir.
      workdir: holds one folder a row; also media/ and records/ when config.data_dir is ''.

    Returns:
      0, or 1 when a run failed (the others are done, and the next call tries it again) or the table was told to stop.

    Raises:
      ValueError: no rows or seeds, two rows of one name, no run at once, or --config.seed, which all runs would get.
    """
    rows, seeds = config.ablations.rows, config.ablations.seeds
    if not rows or not seeds:
        raise ValueError('config.ablations has no rows or no seeds; the built-in table is '
                         '--config=configs/ablations/table.py')
    if any(argument.startswith('--config.seed=') for argument in (*config.ablations.flags, *sys.argv[1:])):
        raise ValueError('--config.seed would be that of every run; the seeds of the runs are config.ablations.seeds')
    if config.ablations.at_once < 1:
        raise ValueError(f'config.ablations.at_once is {config.ablations.at_once}; it must be at least 1')
    names = [name for name, _ in rows]
    published = score_tables.published(config.ablations.published).get('rows', {})
    if len(set(names)) < len(names):
        raise ValueError(f'config.ablations.rows has two rows of one name: {", ".join(names)}')
    data = pathlib.Path(config.data_dir or workdir).absolute()
    # Seed by seed, so that an interrupted table has every row.
    (first, *others) = [(name, file, seed) for seed in seeds for name, file in rows]
    cores: queue.SimpleQueue[set[int]] = queue.SimpleQueue()
    writing = threading.Lock()
    for share in _shares(config.ablations.at_once):
        cores.put(share)

    def finish(name: str, file: str, seed: int) -> str:
        """Runs one row and seed on its share of the cores; '' or what failed."""
        if children.stopped:
            return f'{name}, seed {seed}'
        share = cores.get()
        succeeded = _run_one(name, file, seed, workdir, data, share, config.ablations.flags, children)
        cores.put(share)
        with writing:
            _write(workdir, summarize(workdir, names, seeds, scored), published)
        return '' if succeeded else f'{name}, seed {seed}'

    scored = _asks_for_scores(config.ablations.flags)
    with _Children() as children:
        results = [finish(*first)]
        with concurrent.futures.ThreadPoolExecutor(config.ablations.at_once) as pool:
            results += pool.map(lambda one: finish(*one), others)
    failed = [result for result in results if result]
    print(table(summarize(workdir, names, seeds, scored), published), flush=True)
    if children.stopped:
        print(f'ablations: told to stop, {len(failed)} runs are not done; the same command continues', file=sys.stderr,
              flush=True)
    elif failed:
        print(f'ablations: failed: {"; ".join(failed)}; the same command tries again', file=sys.stderr, flush=True)
    return 1 if failed else 0


class _Children:
    """The runs that are going on. Within the block SIGTERM and SIGINT reach them as SIGTERM: they save, and end."""

    def __init__(self):
        self.stopped = False
        self._running: set[subprocess.Popen] = set()
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> '_Children':
        self._previous = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _stop(self, signum, frame) -> None:
        self.stopped = True
        for child in list(self._running):
            child.terminate()

    def run(self, command: Sequence[str], cores: set[int]) -> int:
        """Runs a command on these cores, or on all; its exit code."""
        # Small networks gain little from many cores: one run on each share of them gets more done.
        place = (lambda: os.sched_setaffinity(0, cores)) if cores else None
        with subprocess.Popen(command, preexec_fn=place) as child:
            self._running.add(child)
            if self.stopped:  # while it was started
                child.terminate()
            code = child.wait()
            self._running.remove(child)
        return code


def _run_one(name: str, file: str, seed: int, workdir: pathlib.Path, data: pathlib.Path, cores: set[int],
             flags: Sequence[str], children: _Children) -> bool:
    """Whether it ended well and its figures are there: a run that was told to stop ends well, too."""
    folder = workdir / name / f'seed_{seed}'
    command = [sys.executable, sys.argv[0], f'--config={file}', f'--workdir={folder}', f'--config.seed={seed}',
               f'--config.data_dir={data}', f'--config.score.cache={data / "embeddings"}', *flags, *_passed_on(sys.argv[1:])]
    print(f'ablations: {name}, seed {seed}: {shlex.join(command[1:])}', flush=True)
    code = children.run(command, cores)
    there = _figures(folder, _asks_for_scores(flags))
    reason = f'exit code {code}' if code else '' if there else 'ended without a report'
    if reason and not children.stopped:
        print(f'ablations: FAILED: {name}, seed {seed}: {reason}', file=sys.stderr, flush=True)
    return not reason


def _shares(at_once: int) -> list[set[int]]:
    """The cores of this process dealt out to `at_once` runs; empty sets (no binding) where that is not possible."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
    if at_once == 1 or len(cores) < at_once:
        return [set() for _ in range(at_once)]
    return [set(cores[place::at_once]) for place in range(at_once)]


def summarize(workdir: pathlib.Path, names: Sequence[str], seeds: Sequence[int], scored: bool = False) -> dict[str, Any]:
    """Figures of the runs that are there; `scored`: scores alone, no report of another command.

    Returns:
      {'seeds', 'rows': {name: {'runs': {seed: figures}, 'mean': figures, 'spread': figures}}}; figures are the scores of a run,
      or f1 and average_precision of the generated sound at the window that its report quotes (mean over clips),
      median_error_ms, shuffled_f1 (the control) and codec_f1. `spread` is the sample standard deviation over seeds, None with
      fewer than two.
    """
    rows = {}
    for name in names:
        found = {seed: _figures(workdir / name / f'seed_{seed}', scored) for seed in seeds}
        runs = {str(seed): figures for seed, figures in found.items() if figures}
        if runs:
            columns: dict[str, list[float]] = {key: [] for figures in runs.values() for key in figures}
            for figures in runs.values():
                for key, value in figures.items():
                    if value is not None:
                        columns[key].append(value)
            rows[name] = {
                'runs': runs,
                'mean': {key: statistics.fmean(values) if values else None for key, values in columns.items()},
                'spread': {key: statistics.stdev(values) if len(values) > 1 else None for key, values in columns.items()},
            }
    return {'seeds': list(seeds), 'rows': rows}


def table(summary: Mapping[str, Any], published: Mapping[str, Mapping[str, float]] | None = None) -> str:
    """The summary as Markdown, mean ± spread, and below a row what was published for it; '' when no run is done."""
    if not summary['rows']:
        return ''
    keys = list(dict.fromkeys(key for row in summary['rows'].values() for key in row['mean']))
    lines = [f'| run | seeds | {" | ".join(_COLUMNS[key][0] for key in keys)} |', '|---' * (len(keys) + 2) + '|']
    for name, row in summary['rows'].items():
        cells = []
        for key in keys:
            mean, spread, places = row['mean'].get(key), row['spread'].get(key), _COLUMNS[key][1]
            cell = '' if mean is None else f'{mean:.{places}f}'
            cells.append(cell if spread is None else f'{cell} ± {spread:.{places}f}')
        lines.append(f'| {name} | {len(row["runs"])} | {" | ".join(cells)} |')
        if published and name in published:
            cells = [f'{published[name][key]:.{_COLUMNS[key][1]}f}' if key in published[name] else '' for key in keys]
            lines.append(f'| *{name}, published* | | {" | ".join(cells)} |')
    return '\n'.join(lines)


def _figures(folder: pathlib.Path, scored: bool) -> dict[str, float | None]:
    """Of one run, {} when it has none yet; those of scores.json alone when `scored`."""
    names = ('scores.json',) if scored else ('scores.json', 'report.json')
    paths = [folder / name for name in names if (folder / name).is_file()]
    if not paths:
        return {}
    path = max(paths, key=lambda path: path.stat().st_mtime_ns)
    report = json.loads(path.read_text())
    if path.name == 'scores.json':
        scores = next(iter(report['systems'].values()))['scores']
        return {name: scores.get(name, {}).get('value') for name in report['metrics']}
    rows = report['onsets'][f'{report["quoted_window_s"]:g}']
    return {
        'f1': rows['generated']['macro']['f1'],
        'average_precision': rows['generated']['macro']['average_precision'],
        'median_error_ms': rows['generated']['median_error_ms'],
        'shuffled_f1': rows['shuffled']['macro']['f1'] if 'shuffled' in rows else None,
        'codec_f1': rows['codec']['macro']['f1'],
    }


def _asks_for_scores(flags: Sequence[str]) -> bool:
    """Whether the runs' flags do, those of the table (`flags`) and of this command; the last of a field counts."""
    given = [flag.partition('=') for flag in (*flags, *_passed_on(sys.argv[1:]))]
    values = {name: value if is_set else 'true' for name, is_set, value in given}
    return any(values.get(f'--config.score.{name}', '').lower() not in ('', 'false', 'f', '0') for name in _SCORES)


def _passed_on(arguments: Sequence[str]) -> list[str]:
    """The flags of this command that its runs get too."""
    return [argument for argument in arguments if argument.startswith('--') and not argument.startswith(_OWN_FLAGS)]


def _write(workdir: pathlib.Path, summary: Mapping[str, Any], published: Mapping[str, Mapping[str, float]]) -> None:
    text = (f'{table(summary, published)}\n\nMean ± deviation over the seeds {", ".join(map(str, summary["seeds"]))}, by\n\n'
            f'    python {shlex.join(sys.argv)}\n')
    for name, content in (('ablations.json', json.dumps(summary, indent=1) + '\n'), ('ablations.md', text)):
        with media.atomic_file(workdir / name) as beside:
            beside.write_text(content, encoding='utf-8')
