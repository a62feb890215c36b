"""Several processes as one run: starts jax.distributed, and lets no process outlive a lost one.

Every process runs the same command. TPU pods, Slurm and Open MPI are found by JAX (under the latter two each process gets
one GPU of its node); anywhere else config.hosts, or the environment, names the coordinator, the number and the index.
"""
from collections.abc import Iterator
import contextlib
import os
import re
import sys
import traceback
from typing import Any

from absl import logging

_ENVIRONMENT = {'coordinator': 'JAX_COORDINATOR_ADDRESS', 'count': 'JAX_NUM_PROCESSES', 'index': 'JAX_PROCESS_ID'}
# What XLA and its coordinator say of a lost process; a device that is out of memory names its collectives and barriers, too.
_LOST = re.compile(r'^(UNAVAILABLE|ABORTED)|\bGloo\b|\bBarrier (failed|timed out)|CoordinationService|[Cc]oordination service|'
                   'heartbeat timeout|GetKeyValue.. timed out|remote process exited')
_NO_CLUSTER = 'coordinator_address should be defined'  # how JAX says that it found none


@contextlib.contextmanager
def joined(hosts: Any, alone: bool) -> Iterator[None]:
    """Inside the block the processes of a run work together; each computes alone when there is only one.

    When something is raised in one of several processes it ends at once, with a line that says what to do: it would wait for
    the others at the exit, and they for it. The others then fail in their next exchange, at the latest after
    hosts.lost_after_s.

    Args:
      hosts: config.hosts: coordinator, count, index, start_timeout_s, lost_after_s.
      alone: join nothing.

    Raises:
      ValueError: the fields do not say which process this is, or the others cannot be reached.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # before jax: its compiler's chatter is not the user's
    logging.set_verbosity(logging.ERROR)
    count = 1 if alone else _start(hosts)
    try:
        yield
    except Exception as error:
        if count == 1:
            raise
        print(f'error: {explain(error)}', file=sys.stderr, flush=True)
        if not isinstance(error, (ValueError, OSError)) and not is_lost(error):
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)


def explain(error: Exception) -> str:
    """One line for an error in one of several processes."""
    import jax
    place = f'process {jax.process_index()} of {jax.process_count()}'
    if not is_lost(error):
        return f'{place}: {error}'
    reason = str(error).strip().splitlines()[0][:200]
    return (f'{place}: the exchange with the other processes broke off ({reason}). One of them has ended: see its output. '
            'The same command continues from the last checkpoint, also with another number of processes')


def is_lost(error: BaseException) -> bool:
    """Whether another process is the cause: XLA's exchange failed, or the coordinator said so."""
    import jax
    if isinstance(error, jax.errors.JaxRuntimeError):
        return _LOST.search(str(error)) is not None
    return isinstance(error, ValueError) and 'Gloo' in str(error)  # as JAX raises it where arrays are made


def _start(hosts: Any) -> int:
    """Starts jax.distributed where there is something to join; the number of processes."""
    import jax
    given = {name: str(getattr(hosts, name)) or os.environ.get(variable, '') for name, variable in _ENVIRONMENT.items()}
    named: dict[str, Any] = {}
    if given['coordinator']:
        try:
            named = {'coordinator_address': given['coordinator'], 'num_processes': int(given['count']),
                     'process_id': int(given['index']), 'cluster_detection_method': 'deactivate'}
        except ValueError as error:
            raise ValueError(f'config.hosts.coordinator is {given["coordinator"]!r}, but count is {given["count"]!r} and index '
                             f'{given["index"]!r}: set config.hosts.count and config.hosts.index, or '
                             f'{_ENVIRONMENT["count"]} and {_ENVIRONMENT["index"]}') from error
    try:
        jax.distributed.initialize(**named, initialization_timeout=hosts.start_timeout_s,
                                   heartbeat_timeout_seconds=hosts.lost_after_s)
    except ValueError as error:
        if named or _NO_CLUSTER not in str(error):
            raise ValueError(f'the processes cannot start together: {error}; correct config.hosts') from error
        return 1
    except RuntimeError as error:
        where = given['coordinator'] or 'the address that the cluster gives'
        raise ValueError(f'the other processes were not met at {where} within {hosts.start_timeout_s} s '
                         f'({str(error).splitlines()[0][:200]}): is the command running on every host?') from error
    return jax.process_count()
