"""What training tells: scalars as JSON lines and for TensorBoard, and a progress line. The libraries' own logs are silenced.

`logs/metrics.jsonl` has one object a line. Training lines hold means over the steps since the previous training line, and how
many those were (`steps`), so that every step is in exactly one line, also after a run that was killed goes on.
"""
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import logging
import math
import os
import pathlib
import sys
import time
from typing import Any
import warnings

from absl import logging as absl_logging
import jax
from jax.experimental import multihost_utils
import tensorboardX

_FILE = 'metrics.jsonl'


class NonFiniteError(ValueError):
    """The loss, the gradient or the state is no longer a finite number; the message names the step."""


def silence() -> None:
    """Keeps Orbax, Grain, JAX and absl from printing; their errors are raised, and Orbax's traceback would be there twice."""
    absl_logging.use_absl_handler()
    absl_logging.set_verbosity(absl_logging.FATAL)
    absl_logging.set_stderrthreshold('fatal')
    for name in ('absl', 'jax', 'orbax', 'grain'):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings('ignore', module=r'(orbax|grain|jax|flax|tensorboardX|etils)\b.*')


class TrainLog:
    """The log of one run in workdir/logs. Only process 0 writes and prints.

    Args:
      workdir: of the run.
      config: name, train.total_steps, train.log_every and input.batch_size are read.
      step: finished steps of the state that the run starts from; later lines of an earlier run are removed.
    """

    def __init__(self, workdir: pathlib.Path, config: Any, step: int):
        self._total, self._log_every = config.train.total_steps, config.train.log_every
        self._batch_size = config.input.batch_size
        self._primary = jax.process_index() == 0
        folder = pathlib.Path(workdir) / 'logs'
        self._recorded: set[tuple[int, str]] = set()
        self._sums: dict[str, float] = {}
        self._steps = 0  # in the open interval
        self._last_step = step
        self._timed_steps, self._timed_s = 0, 0.0
        self._mark: float | None = None  # when the step before finished
        self._open_line = False
        if self._primary:
            folder.mkdir(parents=True, exist_ok=True)
            kept = _lines_until(folder / _FILE, step)
            self._recorded = {(line['step'], name) for line in kept for name in line}
            self._file = (folder / _FILE).open('a')
            self._board = tensorboardX.SummaryWriter(str(folder), purge_step=step + 1)

    def add(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of a finished step (float32 []); waits for the device.

        Raises:
          NonFiniteError: loss or grad_norm is not finite.
        """
        values = {name: float(value) for name, value in metrics.items()}
        for name in ('loss', 'grad_norm'):
            if not math.isfinite(values[name]):
                raise NonFiniteError(f'{name} is {values[name]} at step {step} (learning rate {values["learning_rate"]:.3g})')
        now = time.monotonic()
        if self._mark is not None:
            self._timed_s += now - self._mark
            self._timed_steps += 1
        self._mark = now
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
        self._steps += 1
        self._last_step = step
        if self._log_every and step % self._log_every == 0:
            self.close_interval()

    def close_interval(self) -> None:
        """Writes the means since the previous line and prints the progress line; nothing when there was no step."""
        if not self._steps:
            return
        values: dict[str, Any] = {name: total / self._steps for name, total in self._sums.items()}
        values['steps'] = self._steps
        speed = self._timed_steps / self._timed_s if self._timed_s else 0.0
        if speed:
            values |= {'steps_per_s': speed, 'examples_per_s': speed * self._batch_size}
        self.write(self._last_step, values)
        self._print(progress_line(self._last_step, self._total, values), passing=True)
        self._sums, self._steps, self._timed_steps, self._timed_s = {}, 0, 0, 0.0

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One line of JSON and the same scalars for TensorBoard."""
        if not self._primary:
            return
        rounded = {name: float(f'{value:.7g}') if isinstance(value, float) else value for name, value in values.items()}
        self._file.write(json.dumps({'step': step, **rounded}) + '\n')
        self._file.flush()
        self._recorded |= {(step, name) for name in values}
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def has(self, step: int, name: str) -> bool:
        """Whether a value of that name is recorded for that step (on process 0, which decides for all)."""
        return bool(_agreed((step, name) in self._recorded))

    def say(self, text: str) -> None:
        """A line that stays on the screen."""
        self._print(text, passing=False)

    def settle(self) -> None:
        """Everything that was written is on the disk when this returns: called before a checkpoint that relies on it."""
        if self._primary:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside does not count as training time."""
        try:
            yield
        finally:
            self._mark = None

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        if self._primary:
            if self._open_line:
                print(flush=True)
            self._file.close()
            self._board.close()

    def _print(self, text: str, passing: bool) -> None:
        if not self._primary:
            return
        terminal = sys.stdout.isatty()
        start = '\r\033[K' if terminal and self._open_line else ''
        self._open_line = passing and terminal  # on a terminal the next progress line takes this one's place
        print(start + text, end='' if self._open_line else '\n', flush=True)


def progress_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """'step 1 400/3 000  loss 0.8123  6.7 steps/s  54 examples/s  4 min 10 s left' (no speed before it is known)."""
    parts = [f'step {_thousands(step)}/{_thousands(total)}', f'loss {values["loss"]:.4f}']
    speed = values.get('steps_per_s')
    if speed:
        parts += [f'{speed:.3g} steps/s', f'{values["examples_per_s"]:.3g} examples/s']
        if step < total:
            parts.append(f'{duration((total - step) / speed)} left')
    return '  '.join(parts)


def duration(seconds: float) -> str:
    """'42 s', '4 min 10 s', '3 h 05 min' or '2 d 7 h'."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f'{whole} s'
    if whole < 3600:
        return f'{whole // 60} min {whole % 60:02d} s'
    if whole < 86_400:
        return f'{whole // 3600} h {whole % 3600 // 60:02d} min'
    return f'{whole // 86_400} d {whole % 86_400 // 3600} h'


def _thousands(number: int) -> str:
    return f'{number:,}'.replace(',', ' ')


def _agreed(value: bool) -> bool:
    """Process 0's answer on every process."""
    if jax.process_count() == 1:
        return value
    return bool(multihost_utils.broadcast_one_to_all(value))


def _lines_until(path: pathlib.Path, step: int) -> list[dict]:
    """The lines of the file up to that step; later ones, and a last one that was cut off, are removed from it."""
    if not path.exists():
        return []
    kept, texts = [], path.read_text().splitlines(keepends=True)
    for text in texts:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue  # the run was killed while it wrote this line, which belongs to a step that is done again
        if line['step'] <= step:
            kept.append(line)
    if len(kept) < len(texts):
        partial = path.with_name(f'.{path.name}.partial')
        partial.write_text(''.join(json.dumps(line) + '\n' for line in kept))
        partial.replace(path)
    return kept
