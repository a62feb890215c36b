"""Worker processes that start clean, keep the order of their jobs, survive a job that kills its process, and end with whoever
started them; and the lock that lets one process at a time write a folder."""
import collections
import concurrent.futures
from concurrent.futures.process import BrokenProcessPool
import contextlib
import fcntl
import itertools
import multiprocessing
import os
import pathlib
import threading
from typing import Callable, IO, Iterable, Iterator, TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')

ONE_THREAD = ('OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS')  # the processes are the parallelism
LOCK_FILE = '.lock'


@contextlib.contextmanager
def locked(folder: pathlib.Path) -> Iterator[None]:
    """One process at a time writes in `folder`, which is made; the system drops the lock when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / LOCK_FILE, 'w', encoding='utf-8') as file:
        take_lock(file, fcntl.LOCK_EX)
        yield


def take_lock(file: IO, operation: int) -> bool:
    """Takes a lock of fcntl.flock; False when another process holds it and LOCK_NB is asked for. A file system without locks
    gives none, and all go on."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _start_worker() -> None:
    """Lets a worker end when the process that started it was killed, instead of waiting for work for ever; keeps its libraries,
    which are not loaded yet, to one thread."""
    os.environ.update({name: '1' for name in ONE_THREAD})
    parent = multiprocessing.parent_process()

    def watch():
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class Workers:
    """A pool of fresh processes (forking one that runs JAX's threads may hang); a context manager.

    A process that dies, as a decoder may on a damaged file, costs the job it was at and no other.
    """

    def __init__(self, count: int):
        self._count = count
        self._executor = self._start(count)  # its processes start with the first jobs

    @staticmethod
    def _start(count: int) -> concurrent.futures.ProcessPoolExecutor:
        return concurrent.futures.ProcessPoolExecutor(count, multiprocessing.get_context('spawn'), initializer=_start_worker)

    def __enter__(self) -> 'Workers':
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._executor.shutdown(wait=kind is None, cancel_futures=True)

    def in_order(self, function: Callable[[Job], Result], jobs: Iterable[Job], ahead: int,
                 crashed: Callable[[Job], Result]) -> Iterator[tuple[Job, Result]]:
        """Yields (job, function(job)) in the order of the jobs.

        Args:
          function: what a worker does; it and the jobs must be picklable.
          jobs: read as they are needed.
          ahead: how many jobs may be under way or wait with their result.
          crashed: gives the result of a job that killed its process.
        """
        jobs = iter(jobs)
        pending: collections.deque = collections.deque()
        for job in itertools.islice(jobs, ahead):
            pending.append((job, self._submit(function, job)))
        while pending:
            job, future = pending.popleft()
            try:
                result = future.result()
            except BrokenProcessPool:
                result = self._alone(function, job, crashed)
                self._executor.shutdown(wait=False)
                self._executor = self._start(self._count)
                pending = collections.deque((other, self._again(function, other, old)) for other, old in pending)
            for following in itertools.islice(jobs, 1):
                pending.append((following, self._submit(function, following)))
            yield job, result

    def _submit(self, function: Callable[[Job], Result], job: Job) -> concurrent.futures.Future:
        """The job's future; one that failed when the pool is broken already, which in_order then repairs."""
        try:
            return self._executor.submit(function, job)
        except BrokenProcessPool as error:
            failed: concurrent.futures.Future = concurrent.futures.Future()
            failed.set_exception(error)
            return failed

    def _again(self, function: Callable[[Job], Result], job: Job,
               future: concurrent.futures.Future) -> concurrent.futures.Future:
        """The future of a job that was waiting when the pool broke: its own when it has a result, else a new one."""
        return future if future.done() and future.exception() is None else self._submit(function, job)

    def _alone(self, function: Callable[[Job], Result], job: Job, crashed: Callable[[Job], Result]) -> Result:
        """The result of a job that may have killed its process: if it kills one of its own, it did."""
        with self._start(1) as executor:
            try:
                return executor.submit(function, job).result()
            except BrokenProcessPool:
                return crashed(job)
