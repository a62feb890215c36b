"""Several processes as one run: starts jax.distributed, and lets no process outlive a lost one.

Every process runs the same command. TPU pods, Slurm and Open MPI 4 are found by JAX (under the latter two each process gets
one GPU of its node); anywhere else config.hosts, or the environment, names the coordinator, the number and the index.
"""
from collections.abc import Iterator
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import traceback
from typing import Any

from absl import logging

_ENVIRONMENT = {'coordinator': 'JAX_COORDINATOR_ADDRESS', 'count': 'JAX_NUM_PROCESSES', 'index': 'JAX_PROCESS_ID'}
# What XLA and its coordinator say of a lost process; a device that is out of memory names its collectives and barriers, too.
_LOST = re.compile(r'^(UNAVAILABLE|ABORTED)|\bGloo\b|\bBarrier (failed|timed out)|CoordinationService|[Cc]oordination service|'
                   'heartbeat timeout|GetKeyValue.. timed out|remote process exited')
_NO_CLUSTER = 'coordinator_address should be defined'  # how JAX says that it found none
_COUNTS = ('SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE')  # of a launcher's processes
# Number of the processes that a launcher started together → index of this one. Not SLURM_NTASKS: a batch script, which is one
# process, has that of its job; srun gives each step its own.
_LAUNCHED = {'OMPI_COMM_WORLD_SIZE': 'OMPI_COMM_WORLD_RANK', 'SLURM_STEP_NUM_TASKS': 'SLURM_PROCID'}
_SILENT_S = 2  # only who waits for longer at the start says so
_END_TIMEOUT_S = 7 * 24 * 3600  # the parts of a job take very different times, and JAX itself waits for 300 s only


@contextlib.contextmanager
def joined(hosts: Any, alone: bool) -> Iterator[None]:
    """Inside the block the processes of a run work together; each computes alone when there is only one.

    At the end of the block a process waits for those that still work. When something is raised in one of several processes
    it ends at once, with a line that says what to do: it would wait for the others at the exit, and they for it. The others
    then fail in their next exchange, or JAX aborts them, at the latest after hosts.lost_after_s.

    Args:
      hosts: config.hosts: coordinator, count, index, start_timeout_s, lost_after_s.
      alone: join nothing.

    Raises:
      ValueError: the fields do not say which process this is, or their coordinator cannot be one.
    """
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '2')  # before jax: its compiler's chatter is not the user's
    logging.set_verbosity(logging.ERROR)
    count = 1 if alone else _start(hosts)
    stop: SystemExit | None = None
    try:
        try:
            yield
        except SystemExit as raised:  # as training does after a preemption notice
            stop = raised
        if count > 1:
            _part()
    except KeyboardInterrupt:
        if count == 1:
            raise
        print('stopped', file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(130)
    except Exception as error:
        if count == 1:
            raise
        print(f'error: {explain(error)}', file=sys.stderr, flush=True)
        if not isinstance(error, (ValueError, OSError)) and not is_lost(error):
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(1)
    if stop:
        raise stop


def explain(error: Exception) -> str:
    """One line for an error in one of several processes, also for that of a device that could not be opened."""
    from jax._src import distributed as service  # jax.process_index() would open the devices
    place = f'process {service.global_state.process_id} of {service.global_state.num_processes}'
    if not is_lost(error):
        return f'{place}: {error}'
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return (f'{place}: the exchange with the other processes broke off ({reason}). One of them has ended: see its output. '
            'The same command continues from the last checkpoint, also with another number of processes')


def is_lost(error: BaseException) -> bool:
    """Whether another process is the cause: XLA's exchange failed, or the coordinator said so."""
    if isinstance(error, RuntimeError):  # JaxRuntimeError is one
        return _LOST.search(str(error)) is not None
    return isinstance(error, ValueError) and 'Gloo' in str(error)  # as JAX raises it where arrays are made


@contextlib.contextmanager
def preemption_notices() -> Iterator[None]:
    """Inside the block SIGTERM to one of several processes is a notice to all (multihost_utils.reached_preemption_sync_point).

    Outside it ends the process, as it does where there is only one.
    """
    import jax
    from jax._src import distributed as service  # jax.distributed.initialize starts the notices for good, or never
    state: Any = service.global_state
    handler = signal.getsignal(signal.SIGTERM)
    jax.config.update('jax_enable_preemption_service', True)
    state.initialize_preemption_sync_manager()
    try:
        yield
    finally:
        state.preemption_sync_manager.shutdown()
        state.preemption_sync_manager = None
        signal.signal(signal.SIGTERM, handler)


def _part() -> None:
    """Waits until every process is here, and leaves the coordinator."""
    import jax
    from jax._src import distributed as service  # the coordinator's barriers are nowhere else
    state: Any = service.global_state
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would have to wait, too
    state.client.wait_at_barrier('mmaudio_jax: all are done', _END_TIMEOUT_S * 1000)
    jax.distributed.shutdown()


def _start(hosts: Any) -> int:
    """Starts jax.distributed where there is something to join; the number of processes.

    When the others do not come in time JAX aborts the process, so what it waits for is said before.
    """
    import jax
    from jax._src import distributed as service  # jax.process_count() would open the devices, outside of joined's block
    named = _named(hosts)
    counts = {os.environ[name] for name in _COUNTS if name in os.environ}
    if not named and counts == {'1'}:  # one process of a launcher: joined to nobody, it would be given one GPU of several
        return 1
    jax.config.update('jax_enable_preemption_service', False)
    waiting = threading.Timer(_SILENT_S, _say_what_is_waited_for, (named, hosts.start_timeout_s))
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(**named, initialization_timeout=hosts.start_timeout_s,
                                   heartbeat_timeout_seconds=hosts.lost_after_s)
    except ValueError as error:
        if named or _NO_CLUSTER not in str(error):
            raise ValueError(f'the processes cannot start together: {error}; correct config.hosts') from error
        _check_launched_alone()
        return 1
    except RuntimeError as error:
        if 'mpi4py' in str(error):  # newer JAX, of Open MPI 5
            _check_launched_alone()
        raise
    finally:
        waiting.cancel()
    return service.global_state.num_processes


def _check_launched_alone() -> None:
    """Raises ValueError when a launcher started several processes that JAX does not find: each would do the whole run alone."""
    for name, index in _LAUNCHED.items():
        count = os.environ.get(name, '')
        if count.isdecimal() and int(count) > 1 and index in os.environ:
            where, number, own = _ENVIRONMENT.values()
            raise ValueError(f'{name} says that {count} processes were started, but JAX cannot tell where they meet (Open MPI '
                             f'5 does not say so): set {where}=HOST:PORT of process 0, {number}={count} and {own}=${index} for '
                             f'each of them; where each is to work alone, unset {name}')


def _named(hosts: Any) -> dict[str, Any]:
    """Arguments for jax.distributed.initialize, by config.hosts or the environment; none when they name no coordinator.

    Raises:
      ValueError: they do not say which process this is, or their coordinator cannot be one.
    """
    given = {name: str(getattr(hosts, name)) or os.environ.get(variable, '') for name, variable in _ENVIRONMENT.items()}
    where, count, index = given.values()
    if not where and (count or index):
        raise ValueError(f'config.hosts.count is {count!r} and index {index!r}, but there is no coordinator: set '
                         f'config.hosts.coordinator, or {_ENVIRONMENT["coordinator"]}, to HOST:PORT of process 0')
    if not where:
        return {}
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise ValueError(f'config.hosts.coordinator is {where!r}, but count is {count!r} and index {index!r}: set '
                         f'config.hosts.count and config.hosts.index (from 0), or {_ENVIRONMENT["count"]} and '
                         f'{_ENVIRONMENT["index"]}')
    _check_coordinator(where, own=int(index) == 0)
    return {'coordinator_address': where, 'num_processes': int(count), 'process_id': int(index),
            'cluster_detection_method': 'deactivate'}


def _check_coordinator(where: str, own: bool) -> None:
    """Raises ValueError when no process could be met there: JAX would abort. `own`: it is this process that opens the port."""
    host, _, port = where.rpartition(':')
    if not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f'config.hosts.coordinator is {where!r}; it must be HOST:PORT of process 0, as 10.0.0.1:1234')
    try:
        socket.getaddrinfo(host.strip('[]'), int(port))
        if own:
            socket.create_server(('', int(port))).close()
    except OSError as error:
        raise ValueError(f'config.hosts.coordinator is {where!r}: {error.strerror}; name the host of process 0 and a free '
                         'port there') from error


def _say_what_is_waited_for(named: dict[str, Any], timeout_s: int) -> None:
    who = f'process {named["process_id"]} of {named["num_processes"]}' if named else 'this process'
    where = named.get('coordinator_address', 'the address that the cluster gives')
    print(f'{who} waits for the others at {where}, at most {timeout_s} s (config.hosts.start_timeout_s): the same command must '
          'run on every host', file=sys.stderr, flush=True)
