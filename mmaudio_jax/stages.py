"""Time and memory of the stages of a job, printed as they end."""
from collections.abc import Iterator
import contextlib
import resource
import sys
import time

import jax


class Stages:
    """Prints a line after each stage, or nothing.

    Attributes:
      seconds: stage → time spent in it so far.
    """

    def __init__(self, name: str, verbose: bool):
        self._name, self._verbose = name, verbose
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, stage: str, detail: str = '') -> Iterator[None]:
        """Times the block: its results must be on the host when it ends, or the time of the device is not in it."""
        started = time.monotonic()
        yield
        taken_s = time.monotonic() - started
        self.seconds[stage] = self.seconds.get(stage, 0.0) + taken_s
        if self._verbose:
            what = f'{stage} ({detail})' if detail else stage
            print(f'{self._name}: {what}: {taken_s:.2f} s, {memory()}', flush=True)


def memory() -> str:
    """The most memory that this process had so far, and the most of the first device where it tells."""
    # ru_maxrss counts kilobytes, on macOS bytes.
    unit = 1 if sys.platform == 'darwin' else 1024
    text = f'peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.2f} GB'
    statistics = jax.local_devices()[0].memory_stats() or {}
    if 'peak_bytes_in_use' in statistics:
        text += f', of the device {statistics["peak_bytes_in_use"] / 1e9:.2f} GB'
    return text
