"""Time and memory of the stages of a job, printed as they end."""
from collections.abc import Iterator
import contextlib
import resource
import sys
import time

import jax


class Stages:
    """Prints a line after each stage, or nothing."""

    def __init__(self, name: str, verbose: bool):
        self._name, self._verbose = name, verbose

    @contextlib.contextmanager
    def __call__(self, stage: str, detail: str = '') -> Iterator[None]:
        """Times the block: its results must be on the host when it ends, or the time of the device is not in it."""
        started = time.monotonic()
        yield
        taken_s = time.monotonic() - started
        if self._verbose:
            what = f'{stage} ({detail})' if detail else stage
            print(f'{self._name}: {what}: {taken_s:.2f} s, {_memory()}', flush=True)


def peak_bytes() -> tuple[int, int]:
    """The most memory that this process and its fullest device have held so far; 0 for devices that do not tell."""
    unit = 1 if sys.platform == 'darwin' else 1024  # of ru_maxrss
    devices = [(device.memory_stats() or {}).get('peak_bytes_in_use', 0) for device in jax.local_devices()]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, max(devices)


def _memory() -> str:
    process, device = peak_bytes()
    return f'peak memory {process / 1e9:.2f} GB' + (f', of the device {device / 1e9:.2f} GB' if device else '')
