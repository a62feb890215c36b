"""A limit on the size of files stands for a full disk: the writes themselves fail."""
from collections.abc import Iterator
import contextlib
import resource
import signal


@contextlib.contextmanager
def after(size: int) -> Iterator[None]:
    """Within the block no file of this process can be longer than `size` bytes."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
