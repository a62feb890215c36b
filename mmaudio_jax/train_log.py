"""What training tells: scalars as JSON lines and for TensorBoard, and a progress line. The libraries' own logs are silenced.

`logs/metrics.jsonl` has one object a line. Training lines hold means over the steps since the previous training line, and how
many those were (`steps`), so that every step is in exactly one line, also after a run that was killed goes on.
"""
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import dataclasses
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
import tensorboardX

from mmaudio_jax import flops
from mmaudio_jax import hosts
from mmaudio_jax import stages

_DATA_SHARE = 0.02  # of the time of a step: more than this spent waiting for data is said in the progress line
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
      step_flops: model operations of one step over all devices (flops.training).
    """

    def __init__(self, workdir: pathlib.Path, config: Any, step: int, step_flops: float):
        self._total, self._log_every = config.train.total_steps, config.train.log_every
        self._batch_size, self._step_flops = config.input.batch_size, step_flops
        self._max_skipped = config.train.max_skipped
        self._primary = jax.process_index() == 0
        folder = pathlib.Path(workdir) / 'logs'
        self._recorded: set[tuple[int, str]] = set()
        self._sums: dict[str, float] = {}
        self._steps = 0  # in the open interval
        self._last_step = step
        self._skipped = 0  # in the open interval
        self._in_a_row = 0  # skipped ones
        self._spent = (0.0, 0.0, 0.0)  # on data, of it with an idle device, and on dispatch since the step before finished
        self._timed = _Timed()
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
          NonFiniteError: loss or grad_norm is not finite, after train.max_skipped steps in a row that were left out for it.
        """
        waiting = time.monotonic()
        values = {name: float(value) for name, value in metrics.items()}
        now = time.monotonic()
        if self._mark is not None:
            self._timed.add(now - self._mark, *self._spent, now - waiting)
        self._mark, self._spent = now, (0.0, 0.0, 0.0)
        self._steps += 1
        self._last_step = step
        if self._is_finite(step, values):
            for name, value in values.items():
                self._sums[name] = self._sums.get(name, 0.0) + value
        if self._log_every and step % self._log_every == 0:
            self.close_interval()

    def spent(self, data_s: float, dispatch_s: float, idle: bool) -> None:
        """How long the newest step took to get its batch and to be sent; `idle` when the device had nothing to do meanwhile."""
        self._spent = (data_s, data_s if idle else 0.0, dispatch_s)

    def _is_finite(self, step: int, values: Mapping[str, float]) -> bool:
        bad = [name for name in ('loss', 'grad_norm') if not math.isfinite(values[name])]
        if not bad:
            self._in_a_row = 0
            return True
        self._in_a_row += 1
        self._skipped += 1
        what = f'{bad[0]} is {values[bad[0]]} at step {step} (learning rate {values["learning_rate"]:.3g})'
        if self._in_a_row > self._max_skipped:
            raise NonFiniteError(what if self._in_a_row == 1 else f'{what}, {self._in_a_row} steps in a row')
        self.say(f'{what}: left out, {self._in_a_row} in a row; config.train.max_skipped is {self._max_skipped}')
        return False

    def close_interval(self) -> None:
        """Writes the means since the previous line and prints the progress line; nothing when there was no step."""
        if not self._steps:
            return
        counted = self._steps - self._skipped
        values: dict[str, Any] = {name: total / counted for name, total in self._sums.items()}
        values |= {'steps': self._steps, 'skipped': self._skipped, **self._timed.values(self._batch_size, self._step_flops),
                   **_memory()}
        self.write(self._last_step, values)
        self._print(progress_line(self._last_step, self._total, values), passing=True)
        self._sums, self._steps, self._skipped, self._timed = {}, 0, 0, _Timed()

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
        return hosts.agreed((step, name) in self._recorded)

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


@dataclasses.dataclass
class _Timed:
    """Where the time of the steps of an interval went, seconds."""
    steps: int = 0
    total_s: float = 0.0
    data_s: float = 0.0
    wait_s: float = 0.0
    wait_longest_s: float = 0.0
    dispatch_s: float = 0.0
    device_s: float = 0.0

    def add(self, total_s: float, data_s: float, wait_s: float, dispatch_s: float, device_s: float) -> None:
        self.steps += 1
        self.total_s += total_s
        self.data_s += data_s
        self.wait_s += wait_s
        self.wait_longest_s = max(self.wait_longest_s, wait_s)
        self.dispatch_s += dispatch_s
        self.device_s += device_s

    def values(self, batch_size: int, step_flops: float) -> dict[str, float]:
        """Speed, utilisation, and the means a step of getting data, sending off, and waiting for the device.

        data_wait_s is the part of data_s in which the device had nothing to do.
        """
        if not self.total_s:
            return {}
        speed = self.steps / self.total_s
        values = {'steps_per_s': speed, 'examples_per_s': speed * batch_size, 'data_s': self.data_s / self.steps,
                  'data_wait_s': self.wait_s / self.steps, 'data_wait_longest_s': self.wait_longest_s,
                  'dispatch_s': self.dispatch_s / self.steps, 'device_s': self.device_s / self.steps,
                  'model_tflops_per_s': step_flops * speed / 1e12}
        peak = flops.peak(jax.devices()[0].device_kind)
        if peak:
            values['utilisation'] = step_flops * speed / (peak * jax.device_count())
        return values


def _memory() -> dict[str, float]:
    """The most memory that this process and its fullest device have held so far, GiB."""
    process, device = stages.peak_bytes()
    return {'host_peak_gib': process / 2**30} | ({'device_peak_gib': device / 2**30} if device else {})


class Profile:
    """A JAX profile of the steps `first` to `last` in workdir/profile, for TensorBoard or Perfetto; none for ().

    Each of several processes has a folder of its own in it: JAX names files by second and host, which they may share.

    Raises:
      ValueError: config.train.profile_steps is not () or (first, last).
    """

    def __init__(self, workdir: pathlib.Path, steps: Sequence[int]):
        if steps and (len(steps) != 2 or not 0 < steps[0] <= steps[1]):
            raise ValueError(f'config.train.profile_steps is {steps}; it must be () or (first, last)')
        own = f'process_{jax.process_index()}' if jax.process_count() > 1 else ''
        self._folder, self._steps = pathlib.Path(workdir) / 'profile' / own, tuple(steps)
        self._runs = self._ran = False

    def before(self, step: int) -> None:
        """Starts with the first of these steps that is run: the run may resume behind some of them."""
        if self._steps and not self._runs and self._steps[0] <= step <= self._steps[1]:
            jax.profiler.start_trace(str(self._folder))
            self._runs = self._ran = True

    def after(self, step: int, results: Any) -> None:
        """Ends when `step` was the last; waits for its results."""
        if self._runs and step == self._steps[1]:
            jax.block_until_ready(results)
            self.close()

    def close(self) -> None:
        """Writes what there is, or says that none of the steps was run."""
        if self._runs:
            jax.profiler.stop_trace()
        elif self._steps and not self._ran and jax.process_index() == 0:
            print(f'training: no profile: none of the steps {self._steps[0]} to {self._steps[1]} '
                  '(config.train.profile_steps) was run', file=sys.stderr, flush=True)
        self._runs = False


def progress_line(step: int, total: int, values: Mapping[str, float]) -> str:
    """'step 1 400/3 000  loss 0.8123  6.7 steps/s  54 examples/s  4 min 10 s left' (no speed before it is known)."""
    parts = [f'step {_thousands(step)}/{_thousands(total)}']
    parts.append(f'loss {values["loss"]:.4f}' if 'loss' in values else 'no finite loss')
    speed = values.get('steps_per_s')
    if speed:
        parts += [f'{speed:.3g} steps/s', f'{values["examples_per_s"]:.3g} examples/s']
        if 'utilisation' in values:
            parts.append(f'{100 * values["utilisation"]:.0f} % of the peak')
        if values.get('data_wait_s', 0.0) * speed > _DATA_SHARE:
            parts.append(f'{100 * values["data_wait_s"] * speed:.0f} % waiting for data')
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
