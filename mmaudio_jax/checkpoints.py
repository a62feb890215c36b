"""Checkpoints: state, EMA, data iterator and config saved as one, restored exactly.

A checkpoint is a folder `checkpoints/<step>` that Orbax writes beside and renames when whole, in the background. Orbax decides
at every step whether to save, so that a preemption notice (SIGTERM, or the one that JAX passes between hosts) saves too.
"""
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import signal
import sys
import threading
import time
from typing import Any
import warnings

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from mmaudio_jax import distributed
from mmaudio_jax import hosts

_DISK_FULL = os.strerror(errno.ENOSPC)
_SEEN_WITHIN_S = 20  # a network's file system may show other processes' files that late
_LONGEST = 300  # bytes of a reason that goes to the other processes
_UNFINISHED = '.orbax-checkpoint-tmp'  # in the name of a folder that Orbax has not renamed yet

# Fields that may differ between the run that saved and the run that resumes: they change no number that training computes, but
# for the rounding of its last digits.
FREE_FIELDS = (
    'name', 'stages', 'data_dir', 'impacts.workers', 'clips', 'extract.batch_size', 'extract.workers', 'extract.rates',
    'extract.clips_per_shard', 'extract.datasets', 'extract.memmaps', 'extract.max_rejected', 'extract.process_index',
    'extract.process_count', 'extract.executor', 'extract.ray_address', 'extract.ray_actors', 'extract.ray_cpus',
    'extract.ray_resources',
    'input.validation', 'input.validation_batch_size', 'input.validation_examples', 'input.workers', 'input.prefetch',
    'weights.variants', 'weights.folder', 'weights.cache', 'weights.offline', 'weights.verify', 'weights.export',
    'weights.export_format', 'model.convolution', 'model.remat', 'model.scan_layers', 'ema.snapshot_every',
    'ema.synthesis_sigma_rel', 'mesh', 'sharding', 'hosts', 'train', 'sampling', 'generate', 'evaluate', 'score', 'compile',
    'ablations')


class CheckpointError(ValueError):
    """A checkpoint cannot be written, read, or continued with this config; the message says what to do."""


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
    """Holds `workdir` for this run while the block runs; the operating system lets go of it even after kill -9.

    Raises:
      CheckpointError: another process trains there, both would write the same checkpoints; or the processes of this run do not
        all see the folder, which would show at the first checkpoint.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    with open(workdir / f'.training-{jax.process_index()}', 'w', encoding='utf-8') as file:
        free = True
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:
            pass  # a file system without locks
        if not np.all(multihost_utils.process_allgather(np.array(free))):
            raise CheckpointError(f'{workdir}: another process is training there; wait for its end, or choose another '
                                  '--workdir')
        if jax.process_count() > 1:
            _check_shared(workdir)
        yield


def _check_shared(workdir: pathlib.Path) -> None:
    """Raises CheckpointError when a file that each process writes there is not seen by all of them."""
    run = str(hosts.agreed(np.array(time.time_ns() % 2**31, np.int32)))  # of no earlier run
    seen = [workdir / f'.seen-{index}' for index in range(jax.process_count())]
    seen[jax.process_index()].write_text(run)
    multihost_utils.sync_global_devices('folder tried')
    until, missing = time.monotonic() + _SEEN_WITHIN_S, seen
    while missing and time.monotonic() < until:
        missing = [path for path in missing if not path.is_file() or path.read_text() != run]
        time.sleep(0.5 if missing else 0)
    lost = np.any(multihost_utils.process_allgather(np.array(bool(missing))))
    seen[jax.process_index()].unlink()
    if lost:
        names = ', '.join(path.name for path in missing)
        who = f'process {jax.process_index()} does not see {names} there' if missing else 'another does not'
        raise CheckpointError(f'{workdir}: is not a folder that all processes of the run see ({who}); name one that they '
                              'share with --workdir')


class Preemption:
    """Turns SIGTERM and the first Ctrl-C into a flag while the `with` block runs, so that the loop saves and ends.

    With several processes JAX's own service passes SIGTERM on, so that all of them save the same step; Ctrl-C is not a notice
    then, and ends this one.

    Attributes:
      noticed: whether to end. exit_code: with which the process then ends, 0, or 130 after Ctrl-C, as shells have it.
    """

    def __init__(self):
        self.noticed = False
        self.exit_code = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self):
        if jax.process_count() > 1:
            self._undo.enter_context(distributed.preemption_notices())
        elif threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._undo.callback(signal.signal, number, signal.signal(number, self._notice))
        return self

    def __exit__(self, *exception):
        self._undo.close()

    def _notice(self, signum, frame):
        self.noticed = True
        if signum == signal.SIGINT:
            self.exit_code = 130
            signal.signal(signal.SIGINT, signal.default_int_handler)
            print('\nsaving before the end; Ctrl-C again ends at once, and the run then goes on from its last checkpoint',
                  file=sys.stderr, flush=True)


@dataclasses.dataclass
class _SaveDecision(ocp.checkpoint_managers.SaveDecisionPolicy):
    """Save every n steps, at the last step, and when a preemption was noticed."""
    every: int
    last: int
    preempted: Callable[[], bool]

    def should_save(self, step, previous_steps, *, context) -> bool:
        del previous_steps
        regular = step.step > 0 and self.every > 0 and step.step % self.every == 0
        return regular or step.step == self.last or context.reached_preemption or self.preempted()


class _Manager(ocp.CheckpointManager):
    """Orbax's own manager asks JAX with the number of the step, in the middle of the calls that Checkpointer.preempted counts.

    Attributes:
      told: the answer that it is given instead.
    """
    told = False

    def reached_preemption(self, step: int) -> bool:
        return self.told


class Checkpointer:
    """The checkpoints of one workdir.

    Args:
      workdir: holds checkpoints/.
      train_config: config.train: total_steps, checkpoint_every, keep_last, keep_every.
      preempted: says whether this process was told to end; asked at every step.
    """

    def __init__(self, workdir: pathlib.Path, train_config: Any, preempted: Callable[[], bool] = lambda: False):
        self._directory = pathlib.Path(workdir).absolute() / 'checkpoints'
        self._preempted = preempted
        self._failed = False  # to write in the background
        self._asked = 0  # how often `preempted` was called
        self._barrier = ocp.multihost.get_barrier_sync_fn()
        self._report_unfinished()
        keep: list = [ocp.checkpoint_managers.LatestN(train_config.keep_last)]
        if train_config.keep_every:
            keep.append(ocp.checkpoint_managers.EveryNSteps(train_config.keep_every))
        self._manager = _Manager(self._directory, options=ocp.CheckpointManagerOptions(
            preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(keep),
            save_decision_policy=_SaveDecision(train_config.checkpoint_every, train_config.total_steps, preempted),
            async_options=ocp.AsyncOptions(barrier_sync_fn=self._meet),
            cleanup_tmp_directories=True, enable_should_save_is_saving_in_progress_check=False))
        own = {jax.process_index()}  # reads without the others: one that cannot read would leave them waiting
        self._reader = ocp.Checkpointer(ocp.CompositeCheckpointHandler(),
                                        multiprocessing_options=ocp.options.MultiprocessingOptions(min(own), own))
        self._in_flight: int | None = None  # the step that is being written in the background

    @property
    def directory(self) -> pathlib.Path:
        """workdir/checkpoints."""
        return self._directory

    def check(self, config: Any) -> None:
        """Raises CheckpointError, naming the field, when the newest readable checkpoint is of another config."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                saved = self._read(step, config=ocp.args.JsonRestore()).config
            except Exception:  # damaged: restore_latest says so
                continue
            check_config(saved, to_json(config), self._directory / str(step))
            return

    def latest_step(self) -> int | None:
        """The newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def preempted(self) -> bool:
        """Whether the run was told to end. Every process must ask at every step: JAX agrees on one call for all.

        JAX names the call after the latest one of all processes, 1 when there was none, and waits for exactly that number. So
        calls are counted, not steps: the first step of a run that goes on is behind 1, and is not known during its restore.

        Raises:
          CheckpointError: what is written in the background failed on this process; the others end because it does.
        """
        if self._failed:
            self.wait()
        self._asked += 1
        self._manager.told |= ocp.multihost.reached_preemption(self._asked)
        return self._manager.told or self._preempted()

    def should_save(self, step: int) -> bool:
        """Orbax's decision for this step; False for a step that is saved already."""
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, iterator: Any, config: Any) -> None:
        """Starts to write a checkpoint, whatever should_save says, and returns as soon as the state may be donated.

        Args:
          step: number of steps taken; not that of a checkpoint that is there.
          state: pytree of arrays, finite (the caller has checked).
          iterator: its get_state() gives JSON-able data, the same on every process; its next batch is that of step + 1.
          config: the run's ConfigDict.

        Raises:
          CheckpointError: this save or the previous one could not be written. Earlier checkpoints are as they were.
        """
        self.wait()
        self._in_flight = step
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), config=ocp.args.JsonSave(to_json(config)),
                                  iterator=ocp.args.JsonSave(iterator.get_state()))
        with self._explained():
            self._manager.save(step, args=args, force=True)

    def wait(self) -> None:
        """Blocks until everything is on disk; raises CheckpointError when it could not be written."""
        with self._explained():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits for what is being written and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()
            self._reader.close()

    def restore_latest(self, abstract_state: Any, iterator: Any, config: Any) -> tuple[Any, int] | None:
        """The newest checkpoint that every process can read; the data iterator is set to it.

        A folder that is damaged, or holds numbers that are not finite, is passed over with a message and renamed to
        `<step>.damaged`.

        Args:
          abstract_state: tree of jax.ShapeDtypeStruct with shardings (partitioning.abstract).
          iterator: set by set_state() with what get_state() gave.
          config: the run's config; it must equal the saved one but for FREE_FIELDS.

        Returns:
          (state, step), or None when there is no checkpoint.

        Raises:
          CheckpointError: another config (names the field), or no checkpoint is readable.
          ValueError: the records changed, so that the iterator cannot continue.
        """
        self.wait()
        damaged: list[tuple[int, str]] = []
        for step in self._agreed_steps():
            restored: Any = None
            reason = ''
            try:
                saved = self._read(step, config=ocp.args.JsonRestore()).config
                check_config(saved, to_json(config), self._directory / str(step))
                restored = self._read(step, state=ocp.args.StandardRestore(abstract_state), iterator=ocp.args.JsonRestore())
            except CheckpointError:
                raise
            except Exception as error:  # whatever a damaged file makes Orbax, TensorStore or JSON raise
                reason = first_line(error)
            reason = _of_any_process(reason)
            if not reason and not is_finite(restored.state):
                reason = 'its numbers are not finite'
            if reason:
                damaged.append((step, reason))
                continue
            iterator.set_state(restored.iterator)
            self._set_aside(damaged, step)
            return restored.state, step
        if damaged:
            step, reason = damaged[0]
            raise CheckpointError(f'none of the checkpoints in {self._directory} can be read '
                                  f'(step {step}: {reason}); restore the folder from a copy, or rename it '
                                  'to start from the beginning')
        return None

    def _agreed_steps(self) -> list[int]:
        """Steps of the checkpoints, the newest first, as process 0 sees them."""
        steps = sorted(self._manager.all_steps(), reverse=True)
        own = np.resize(np.array(steps, np.int64), hosts.agreed(len(steps)))  # of the same form where nothing is seen yet, too
        return hosts.agreed(own).tolist()

    def _read(self, step: int, **items: Any) -> Any:
        return self._reader.restore(self._directory / str(step), args=ocp.args.Composite(**items))

    def _report_unfinished(self) -> None:
        for folder in sorted(self._directory.glob(f'*{_UNFINISHED}*')):
            hosts.say(f'checkpoint {folder.name.split(".")[0]} in {self._directory} was not finished when its run '
                      'stopped: skipped')

    def _set_aside(self, damaged: list[tuple[int, str]], used: int) -> None:
        for step, reason in damaged:
            hosts.say(f'checkpoint {step} in {self._directory} is damaged ({reason}): renamed to {step}.damaged, '
                      f'continuing from step {used}')
            if jax.process_index() == 0:
                folder = self._directory / str(step)
                folder.rename(unused(self._directory / f'{step}.damaged'))
        if damaged:
            multihost_utils.sync_global_devices('damaged checkpoints renamed')
        self._manager.reload()  # a process may have seen fewer checkpoints when it started

    def _meet(self, *, key: str, timeout_ms: int) -> None:
        """Orbax's threads wait for those of the other processes here; one that failed does not, for they wait elsewhere."""
        if sys.exc_info()[0] is not None:  # Orbax also calls from `finally`
            self._failed = True
            return
        self._barrier(key=key, timeout_ms=timeout_ms)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns what Orbax raises into a CheckpointError that says what is still there."""
        try:
            yield
        except Exception as error:
            cause = error if error.__cause__ is None else error.__cause__  # Orbax hides a lost process behind a TimeoutError
            if jax.process_count() > 1 and distributed.is_lost(cause):
                raise cause  # nothing is wrong with the folder
            whole = sorted(int(entry.name) for entry in self._directory.iterdir() if entry.name.isdigit())
            kept = f'the checkpoint of step {whole[-1]} is intact' if whole else 'there is no earlier one'
            raise CheckpointError(
                f'the checkpoint of step {self._in_flight} could not be written to {self._directory} ({first_line(error)}); '
                f'{kept}. Free some disk space or repair the folder, then run the same command again') from error


def is_finite(state: Any) -> bool:
    """Whether every number of a pytree of arrays is finite; every process must ask, for they may hold parts of an array."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    # One after the other: exchanges of several programs at once can block each other for ever.
    return all(bool(_is_finite(leaf)) for leaf in floats)


@jax.jit
def _is_finite(tensor: jax.Array) -> jax.Array:  # one tensor a call: compiled once a shape, not once for hundreds of tensors
    return jnp.isfinite(tensor).all()


def _of_any_process(reason: str) -> str:
    """The first text that is not empty, on every process; each gives its own."""
    if jax.process_count() == 1:
        return reason
    texts = multihost_utils.process_allgather(np.frombuffer(reason.encode()[:_LONGEST].ljust(_LONGEST), np.uint8))
    return next(filter(None, (text.tobytes().decode(errors='replace').strip() for text in texts)), '')


def check_config(saved: Mapping[str, Any], current: Mapping[str, Any], source: pathlib.Path) -> None:
    """Raises CheckpointError naming the first field, outside FREE_FIELDS, in which two plain configs differ."""
    difference = _first_difference(saved, current, '')
    if difference is not None:
        name, was, now = difference
        raise CheckpointError(f'config.{name} is {now}, but {source} was made with {was}. Set it back to continue that run, '
                              'or start a new one with another --workdir')


def to_json(config: Any) -> dict:
    """A ConfigDict as plain JSON data: tuples become lists, unset placeholders None."""
    plain = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    return json.loads(json.dumps(plain))


def without_free_fields(config: Any, kept: tuple[str, ...]) -> dict:
    """The config as plain JSON data without FREE_FIELDS, but with those that `kept` names."""
    free = set(FREE_FIELDS) - set(kept)

    def chosen(plain: dict, name: str) -> dict:
        return {key: chosen(value, f'{name}{key}.') if isinstance(value, dict) else value
                for key, value in plain.items() if f'{name}{key}' not in free}
    return chosen(to_json(config), '')


def _first_difference(saved: Any, current: Any, name: str) -> tuple[str, Any, Any] | None:
    """(field, saved value, current value); fields that only one of them has are of another version of this code."""
    if name in FREE_FIELDS:
        return None
    if isinstance(saved, Mapping) and isinstance(current, Mapping):
        for key in dict.fromkeys([*current, *saved]):
            inner = f'{name}.{key}' if name else key
            if key in saved and key in current:
                difference = _first_difference(saved[key], current[key], inner)
                if difference is not None:
                    return difference
            elif inner not in FREE_FIELDS:
                known = f'it is {current[key]} now' if key in current else f'there it was {saved[key]}'
                warnings.warn(f'config.{inner} is not a field of both this version of the code and that of the run: {known}',
                              stacklevel=2)
        return None
    return None if saved == current else (name, saved, current)


def first_line(error: BaseException) -> str:
    """What an error, or what caused it, says first; of a full disk, only that."""
    while error.__cause__ is not None:  # a SystemError of a library's binding names the function that was called only
        error = error.__cause__
    text = str(error).strip().splitlines()
    if any(_DISK_FULL in line for line in text):
        return _DISK_FULL  # TensorStore says so at the end of a paragraph
    return f'{type(error).__name__}: {text[0][:200]}' if text else type(error).__name__


def unused(path: pathlib.Path) -> pathlib.Path:
    """The path, with a number behind it when something is there."""
    number, candidate = 1, path
    while candidate.exists():
        number += 1
        candidate = path.with_name(f'{path.name}{number}')
    return candidate
