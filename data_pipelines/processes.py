"""Worker processes that start clean, keep the order of their jobs and end with whoever started them."""
import collections
import concurrent.futures
import itertools
import multiprocessing
import os
import threading
from typing import Callable, Iterable, Iterator, TypeVar

Job = TypeVar('Job')
Result = TypeVar('Result')


def _die_with_parent() -> None:
    """Lets a worker end when the process that started it was killed, instead of waiting for work for ever."""
    parent = multiprocessing.parent_process()

    def watch():
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def start(workers: int) -> concurrent.futures.ProcessPoolExecutor:
    """A pool of fresh processes: forking one that runs JAX's threads may hang."""
    context = multiprocessing.get_context('spawn')
    return concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_die_with_parent)


def in_order(pool: concurrent.futures.Executor, function: Callable[[Job], Result], jobs: Iterable[Job],
             ahead: int) -> Iterator[tuple[Job, Result]]:
    """Yields (job, result) in the order of the jobs; at most `ahead` results wait in memory."""
    jobs = iter(jobs)
    pending = collections.deque((job, pool.submit(function, job)) for job in itertools.islice(jobs, ahead))
    while pending:
        job, future = pending.popleft()
        result = future.result()
        for following in itertools.islice(jobs, 1):
            pending.append((following, pool.submit(function, following)))
        yield job, result
