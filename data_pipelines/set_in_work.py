"""A record set while it is made: which shards are missing, and how finished shards become a set; safe with many processes.

Processes share nothing but the folder. Process i of n makes the shards i, i + n, …; whoever finds all of them there makes the
folder a set, under a lock that the system drops when its holder dies. Whoever works at a set holds its file .<name>.working in
common with the others, so that nobody deletes their shards meanwhile.
"""
import contextlib
import fcntl
import json
import pathlib
import shutil
import time
from typing import Any, Callable, Iterator, Mapping

import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines.processes import take_lock
from data_pipelines.progress import Progress
from data_pipelines.progress import span
from data_pipelines.shards import Plan
from data_pipelines.shards import Report
from data_pipelines.shards import Shard
from data_pipelines.shards import Target
from data_pipelines.shards import write_json
from mmaudio_jax import balance
from mmaudio_jax import media
from mmaudio_jax import records

REJECTS_COUNT_FROM = 100  # clips: the share of rejects among fewer says nothing
CLIPS_FILE = balance.CLIPS_FILE
DIFFERS = {'tables': 'other clip tables', 'codec_fitted_to': 'a codec that was fitted to other clips (codec_fit_dataset)',
           'frames': 'other frames of the videos, by an earlier version'}
REJECTED_FILE, LATENTS_FILE, LOCK_FILE = 'rejected.jsonl', 'latents.json', '.lock'


def is_done(folder: pathlib.Path, schema: records.Schema, made_with: Mapping[str, Any]) -> bool:
    """Whether the set is there; ValueError when it is, but was made with other settings or clips."""
    if not folder.is_dir():
        return False
    records.check_metadata(folder, schema)
    stored = records.read_metadata(folder)['made_with']
    for field, value in made_with.items():
        if stored.get(field) != value:
            raise ValueError(f'{folder}: was made with {DIFFERS[field]}; delete it to extract the set again, or choose another '
                             'workdir')
    return True


def in_use(place: pathlib.Path) -> list[str]:
    """The sets of a records folder that processes are working at now."""
    found = []
    for path in sorted(place.glob('.*.working')):
        with contextlib.suppress(FileNotFoundError), open(path, 'rb') as file:
            if not take_lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB):
                found.append(path.name.removeprefix('.').removesuffix('.working'))
    return found


class SetInWork:
    """The finished and missing shards of one set, for every rate that is made of it; a context manager that lets go of it."""

    def __init__(self, plan: Plan, splits: Mapping[str, list[clips_lib.Clip]], made_with: Mapping[str, Any],
                 clips_per_shard: int, max_rejected: float):
        """
        Args:
          plan: of the set; the folders of its targets are named '.<name>.partial'.
          splits: its clips.
          made_with: what decided its contents, for metadata.json.
          clips_per_shard: clips of a shard, rejected ones included.
          max_rejected: share of the clips.
        """
        self.plan, self._made_with, self._max_rejected = plan, dict(made_with), max_rejected
        self._clips_per_shard = clips_per_shard
        self._held = contextlib.ExitStack()  # files that are locked
        self.shards = []
        for split, table in splits.items():
            count = -(-len(table) // clips_per_shard)
            for i in range(count):
                self.shards.append(Shard(split, i, count, tuple(table[i * clips_per_shard:(i + 1) * clips_per_shard])))

    def __enter__(self) -> 'SetInWork':
        return self

    def __exit__(self, *_) -> None:
        self._release()

    def make(self, index: int, count: int, make_shards: Callable[[list[Shard], Report], None]) -> None:
        """Makes the shards that this process has to make, and every folder a set when they were the last; says so.

        Args:
          index, count: of the processes that share the shards.
          make_shards: makes those that are missing.

        Raises:
          ValueError: shards of other settings or clips that may not be deleted, too many rejects, a split without any record.
          Also what make_shards raises.
        """
        job, started = f'extract {self.plan.name}', time.monotonic()
        self._prepare(alone=count == 1)
        missing = self._missing(index, count)
        progress = Progress(job, sum(len(shard.clips) for shard in missing), self.plan.targets[0].schema.duration_s)

        def report(clips: int, rejected: list[str]) -> None:
            progress.add(clips, rejected)
            self._check_rejects(progress)

        try:
            if missing:
                make_shards(missing, report)
        except (OSError, media.MediaError):
            if not self._was_finished_by_another():  # else it had the same shards, and has cleaned up and renamed the folder
                raise
        found = self._finish()
        took = span(time.monotonic() - started)
        if found is None:
            print(f'{job}: process {index} of {count} made its shards, {took}; others are still to come', flush=True)
            return
        for target in self.plan.targets:
            final, rejected = self._final(target), found['rejected']
            rejects = f'{rejected} clips rejected, see {final / REJECTED_FILE}' if rejected else 'none rejected'
            print(f'{job}: {found["records"]} records in {final}, {took}; {rejects}', flush=True)

    def _release(self) -> None:
        """Lets go of the set."""
        self._held.close()
        for target in self.plan.targets:
            if self._final(target).is_dir():
                self._working(target).unlink(missing_ok=True)

    def _working(self, target: Target) -> pathlib.Path:
        return target.folder.with_name(f'.{self.plan.name}.working')

    def _was_finished_by_another(self) -> bool:
        """Whether the folders are sets by now; waits for a process that is just about to make them so."""
        for target in self.plan.targets:
            with contextlib.suppress(OSError), self._lock(target):
                pass
        return all(self._final(target).is_dir() for target in self.plan.targets)

    def _final(self, target: Target) -> pathlib.Path:
        return target.folder.with_name(self.plan.name)

    def _prepare(self, alone: bool) -> None:
        """Makes the folders, and holds them until `_release`; keeps the shards of a killed run, unless they were made with
        other settings or clips.

        Args:
          alone: no other process works here, so that shards of other settings may be deleted.

        Raises:
          ValueError: shards of other settings or clips, and others work here, at these or those.
        """
        for target in self.plan.targets:
            target.folder.parent.mkdir(parents=True, exist_ok=True)
            working = self._held.enter_context(open(self._working(target), 'w+', encoding='utf-8'))  # NFS: + to share a lock
            take_lock(working, fcntl.LOCK_SH)
            settings = {**target.schema.metadata(), 'made_with': self._made_with, 'clips_per_shard': self._clips_per_shard}
            path, whole = target.progress / 'made_with.json', target.folder / records.METADATA_FILE
            if target.folder.is_dir():
                texts = (file.read_text(encoding='utf-8') for file in (whole, path) if file.is_file())
                stored: dict[str, Any] = next(map(json.loads, texts), {})
                if stored and {**settings, **stored} == settings:
                    continue
                if stored and not alone:
                    raise ValueError(f'{target.folder}: holds unfinished shards of other settings or clips; delete it, when '
                                     'no other process is working there')
                if stored and not take_lock(working, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    raise ValueError(f'{target.folder}: another process is extracting {self.plan.name} there, with other '
                                     'settings or clips; wait for its end, or choose another workdir')
                if stored:
                    print(f'extract {self.plan.name}: unfinished shards of other settings or clips are deleted', flush=True)
                    shutil.rmtree(target.folder)
            if not self._final(target).is_dir():
                target.progress.mkdir(parents=True, exist_ok=True)
                write_json(path, settings)
            take_lock(working, fcntl.LOCK_SH)

    def _missing(self, index: int, count: int) -> list[Shard]:
        """The shards that process `index` of `count` has still to make."""
        mine = self.shards[index::count]
        missing = [shard for shard in mine if not all(self._is_made(target, shard) for target in self.plan.targets)]
        if len(missing) < len(mine):
            print(f'extract {self.plan.name}: {len(mine) - len(missing)} of {len(mine)} shards are there', flush=True)
        return missing

    def _is_made(self, target: Target, shard: Shard) -> bool:
        return (target.note(shard).is_file() or (target.folder / records.METADATA_FILE).is_file()
                or self._final(target).is_dir())

    def _check_rejects(self, progress: Progress) -> None:
        """Raises ValueError when too many of the clips that were read were rejected."""
        if progress.done >= REJECTS_COUNT_FROM and progress.rejected.total() > self._max_rejected * progress.done:
            raise ValueError(f'{self.plan.name}: {progress.rejections()} of {progress.done} clips, more than '
                             f'config.extract.max_rejected = {self._max_rejected:g} allows; correct the files and delete '
                             f'{self.plan.targets[0].folder}, or raise it')

    def _finish(self) -> dict[str, int] | None:
        """Makes every folder whose shards are all there a set.

        Returns:
          {'records': …, 'rejected': …}, or None while other processes still have shards to make.
        """
        for target in self.plan.targets:
            with self._lock(target):
                if not self._final(target).is_dir() and not self._make_set(target):
                    self._release()
                    return None
        self._release()
        final = self._final(self.plan.targets[0])
        lines = {name: (final / name).read_bytes().count(b'\n') for name in (CLIPS_FILE, REJECTED_FILE)}
        return {'records': lines[CLIPS_FILE], 'rejected': lines[REJECTED_FILE]}

    @contextlib.contextmanager
    def _lock(self, target: Target) -> Iterator[None]:
        """One process at a time; at once when another process has made the folder a set already."""
        with contextlib.ExitStack() as stack:
            try:
                take_lock(stack.enter_context(open(target.folder / LOCK_FILE, 'w', encoding='utf-8')), fcntl.LOCK_EX)
            except FileNotFoundError:
                if not self._final(target).is_dir():
                    raise
            yield

    def _make_set(self, target: Target) -> bool:
        """Turns the finished shards into a set; False when shards are missing."""
        if not (target.folder / records.METADATA_FILE).is_file():  # else all but the last rename was done
            if not all(target.note(shard).is_file() for shard in self.shards):
                return False
            notes = [(shard, json.loads(target.note(shard).read_text(encoding='utf-8'))) for shard in self.shards]
            self._check(notes)
            lengths: dict[str, list[int]] = {}
            for shard, note in notes:
                lengths.setdefault(shard.split, []).append(len(note['clips']))
            for file, field in ((CLIPS_FILE, 'clips'), (REJECTED_FILE, 'rejected')):
                with media.atomic_file(target.folder / file) as beside:
                    lines = (clips_lib.to_line(row) for _, note in notes for row in note[field])
                    beside.write_text(''.join(lines), encoding='utf-8')
            write_json(target.folder / LATENTS_FILE, _latent_statistics(notes))
            for leftover in target.folder.glob('.*'):
                if leftover.name != LOCK_FILE:
                    leftover.unlink()  # half files of a run that was killed
            records.write_metadata(target.folder, self.plan.name, target.schema, lengths, self._made_with)
        shutil.rmtree(target.progress, ignore_errors=True)
        target.folder.rename(self._final(target))
        (self._final(target) / LOCK_FILE).unlink(missing_ok=True)
        return True

    def _check(self, notes: list[tuple[Shard, dict[str, Any]]]) -> None:
        """Raises ValueError for a split without any record, or too many rejects in all."""
        progress = Progress(self.plan.name, 0, 0.0)
        used = {shard.split for shard, note in notes if note['clips']}
        unused = [(shard.split, note['rejected'][0]) for shard, note in notes if shard.split not in used]
        for split in dict(unused):
            self._forget(split)  # so that the next run reads the corrected files
        if unused:
            split, first = unused[0]
            raise ValueError(f'no clip of {self.plan.name}, split {split}, can be used; the first: {first["file"]}: '
                             f'{first["reason"]}')
        for _, note in notes:
            progress.count(len(note['clips']) + len(note['rejected']), [row['reason'] for row in note['rejected']])
        self._check_rejects(progress)

    def _forget(self, split: str) -> None:
        """Deletes the finished shards of a split in every folder; those of other splits stay. Notes first: a shard with a note
        is whole."""
        shards = [shard for shard in self.shards if shard.split == split]
        for target in self.plan.targets:
            for shard in shards:
                target.note(shard).unlink(missing_ok=True)
            for shard in shards:
                name = records.shard_name(self.plan.name, split, shard.number, shard.count)
                (target.folder / name).unlink(missing_ok=True)


def _latent_statistics(notes: list[tuple[Shard, dict[str, Any]]]) -> dict[str, Any]:
    """Mean and deviation of latent_mean over examples and time, for every split and channel."""
    statistics = {}
    for split in dict.fromkeys(shard.split for shard, _ in notes):
        count, total, squares = np.sum([note['latents'] for shard, note in notes if shard.split == split], axis=0)
        mean = total / count
        deviation = np.sqrt(np.maximum(squares / count - np.square(mean), 0))
        statistics[split] = {'mean': np.round(mean, 6).tolist(), 'std': np.round(deviation, 6).tolist()}
    return statistics
