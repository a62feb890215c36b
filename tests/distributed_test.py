"""One, two and four processes on this machine as one run: the same numbers, every example once, and no process left waiting."""
from collections.abc import Iterator
import contextlib
import functools
import json
import os
import pathlib
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import base
from mmaudio_jax import checkpoints
from mmaudio_jax import distributed
from mmaudio_jax import partitioning
from tests import resume_test
from tests import tiny_run

DEVICES = 4  # in a mesh of data 2 and fsdp 2, over 1, 2 or 4 processes
LOST_AFTER_S = 10
GLOO_WORDS = set('Gloo Rank is connected to peer ranks Expected number of'.split())  # of what it prints when it starts


@pytest.fixture(name='records', scope='module')
def fixture_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    tiny_run.write_records(folder)
    return folder


@pytest.fixture(name='cache', scope='module')
def fixture_cache(tmp_path_factory):
    return tmp_path_factory.mktemp('compiled')


def address() -> str:
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        return f'127.0.0.1:{probe.getsockname()[1]}'


def places(count: int) -> list[dict]:
    """config.hosts of `count` processes on this machine."""
    where = address()
    return [{'coordinator': where, 'count': str(count), 'index': str(index), 'lost_after_s': LOST_AFTER_S}
            for index in range(count)]


def start(workdir: pathlib.Path, cache: pathlib.Path, count: int, pause_s: float = 0.0) -> list[tiny_run.Run]:
    """`count` processes that train together."""
    return [tiny_run.Run(workdir, cache, one if count > 1 else None, DEVICES // count, pause_s, log_every=1)
            for one in places(count)]


def run_together(target, folder: pathlib.Path, records: pathlib.Path, count: int) -> None:
    """target(records, hosts) in `count` processes with DEVICES devices in all; each must end well."""
    outputs = [folder / f'output_{count}_{index}.txt' for index in range(count)]
    processes = [tiny_run.start_child(target, output, DEVICES // count, str(records), one)
                 for output, one in zip(outputs, places(count))]
    for process, output in zip(processes, outputs):
        process.join(120)
        assert process.exitcode == 0, output.read_text()


def start_each(target, folder: pathlib.Path, count: int = 2) -> list[tuple]:
    """target(folder, hosts) in `count` processes of one device: (process, file of its output) of each."""
    outputs = [folder / f'output_{index}.txt' for index in range(count)]
    return [(tiny_run.start_child(target, output, 1, str(folder), one), output) for output, one in zip(outputs, places(count))]


def ends(started: list[tuple], within_s: float) -> list[tuple]:
    """(exit code, output) of each process."""
    deadline = time.monotonic() + within_s
    for process, output in started:
        process.join(max(0, deadline - time.monotonic()))
        assert process.exitcode is not None, output.read_text()
    return [(process.exitcode, output.read_text()) for process, output in started]


def losses(workdir: pathlib.Path) -> list[float]:
    lines = [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text().splitlines()]
    return [line['loss'] for line in lines if 'loss' in line]


@pytest.fixture(name='alone', scope='module')
def fixture_alone(tmp_path_factory, records, cache):
    workdir = resume_test.new_workdir(tmp_path_factory.mktemp('alone'), records, 'run')
    start(workdir, cache, 1)[0].finish()
    return workdir


def assert_same_end(workdir: pathlib.Path, alone: pathlib.Path) -> None:
    """Losses of every step to 1e-5, and the last checkpoint nearly: another number of processes adds in another order."""
    apart = np.abs(np.divide(losses(workdir), losses(alone)) - 1).max()
    assert apart < 1e-5
    ours, expected = (resume_test.saved(folder, resume_test.STEPS) for folder in (workdir, alone))
    assert ours.keys() == expected.keys() and ours['iterator'] == expected['iterator']
    worst = max(np.abs(ours[name] - expected[name]).max() for name in ours if 'params' in name)
    print(f'largest difference of a loss, relative: {apart:.1e}, of a parameter: {worst:.1e}')
    assert worst < 1e-5


@pytest.mark.slow  # 20 s
@pytest.mark.parametrize('count', [2, 4])
def test_several_processes_compute_what_one_does(tmp_path, records, cache, alone, count):
    workdir = resume_test.new_workdir(tmp_path, records, 'run')
    runs = start(workdir, cache, count)
    told = [run.finish() for run in runs]  # Gloo's threads write into it, too, and into each other's lines
    assert 'on 4 cpu devices' in told[0] and f'step {resume_test.STEPS}/' in told[0]
    told = [re.sub(r'process \d of \d waits for the others .*\n', '', text) for text in told]
    assert all(set(re.findall('[A-Za-z]+', text)) <= GLOO_WORDS for text in told[1:])  # only the first one tells
    assert_same_end(workdir, alone)


@pytest.mark.slow  # 30 s
@pytest.mark.parametrize('count, killed, left', [(2, 0, 1), (2, 1, 1), (4, 2, 2)])
def test_a_killed_process_ends_the_others_and_fewer_go_on(tmp_path, records, cache, alone, count, killed, left):
    workdir = resume_test.new_workdir(tmp_path, records, 'run')
    runs = start(workdir, cache, count, pause_s=0.3)
    runs[0].wait_for('step 5/')
    runs[killed].kill()
    died = time.monotonic()
    for other in runs[:killed] + runs[killed + 1:]:
        other.process.join(10 * LOST_AFTER_S)
        print(f'ended {time.monotonic() - died:.1f} s later:', other.output()[-400:])
        assert other.process.exitcode not in (0, None) and time.monotonic() - died < 2 * LOST_AFTER_S
        assert re.search(f'error: process . of {count}: the exchange with the other processes broke off|another task died',
                         other.output())
    step = max(int(folder.name) for folder in (workdir / 'checkpoints').iterdir() if folder.name.isdigit())
    assert 3 <= step < resume_test.STEPS
    resumed = [run.finish() for run in start(workdir, cache, left)][0]
    assert f'from step {step}:' in resumed
    assert_same_end(workdir, alone)


@pytest.mark.slow  # 20 s
def test_sigterm_to_one_saves_on_all_and_more_go_on(tmp_path, records, cache, alone):
    workdir = resume_test.new_workdir(tmp_path, records, 'run')
    runs = start(workdir, cache, 2, pause_s=0.3)
    runs[0].wait_for('step 2/')
    os.kill(runs[1].process.pid, signal.SIGTERM)
    output = [run.finish() for run in runs][0]
    assert 'told to stop: saved step' in output
    step = max(int(folder.name) for folder in (workdir / 'checkpoints').iterdir())
    assert step < resume_test.STEPS
    resumed = [run.finish() for run in start(workdir, cache, 4)][0]
    assert f'from step {step}:' in resumed
    assert_same_end(workdir, alone)


@pytest.mark.slow  # 10 s
def test_an_epoch_has_every_example_as_often_as_the_mixture_says(tmp_path, records):
    """Each process reads its own rows only; together they are the batches of one process."""
    epochs = {}
    for count in (1, 2, 4):
        run_together(tiny_run.read_epoch, tmp_path, records, count)
        parts = [json.loads((records / f'epoch_{index}.json').read_text()) for index in range(count)]
        assert all(len(rows) == 8 // count for part in parts for rows in part)
        epochs[count] = [sorted(tuple(row) for rows in batches for row in rows) for batches in zip(*parts)]
    assert epochs[1] == epochs[2] == epochs[4]
    values, times = np.unique([value for batch in epochs[1] for _, value in batch], return_counts=True)
    assert len(values) == tiny_run.TRAIN_CLIPS and (times == 2).all()


@pytest.mark.slow  # 10 s
def test_sampling_by_two_processes_is_that_of_one(tmp_path, records):
    for count in (1, 2):
        run_together(tiny_run.sample, tmp_path, records, count)
    one, two = (np.load(records / f'latents_{count}.npy') for count in (1, 2))
    assert one.shape[0] == 6 and one.std() > 0.1
    np.testing.assert_allclose(two, one, atol=1e-5)
    rows = [dict(np.load(records / f'rows_2_{index}.npz')) for index in range(2)]
    assert len(rows[0]) == len(rows[1]) == 2
    for row, waveform in {**rows[0], **rows[1]}.items():
        np.testing.assert_allclose(waveform, 2 * one[int(row), :, 0], atol=2e-5)


@pytest.mark.parametrize('fields, message', [
    ({'coordinator': '127.0.0.1:1'}, 'set config.hosts.count and config.hosts.index'),
    ({'coordinator': '127.0.0.1:1', 'count': '2', 'index': '2'}, 'set config.hosts.count and config.hosts.index'),
    ({'count': '2'}, "count is '2' and index '', but there is no coordinator: set config.hosts.coordinator"),
    ({'index': '0'}, 'but there is no coordinator'),
    ({'coordinator': '127.0.0.1', 'count': '2', 'index': '1'}, "is '127.0.0.1'; it must be HOST:PORT of process 0"),
    ({'coordinator': '127.0.0.1:70000', 'count': '2', 'index': '0'}, "is '127.0.0.1:70000'; it must be HOST:PORT"),
    ({'coordinator': 'nowhere.invalid:1234', 'count': '2', 'index': '1'}, "'nowhere.invalid:1234': .*; name the host"),
])
def test_a_place_that_cannot_be_is_an_error(fields, message):
    config = base.get_config()
    config.hosts.update(fields)
    with pytest.raises(ValueError, match=message):
        with distributed.joined(config.hosts, alone=False):
            pass


def test_a_port_in_use_is_an_error():
    config = base.get_config()
    with socket.create_server(('127.0.0.1', 0)) as other:
        config.hosts.update(coordinator=f'127.0.0.1:{other.getsockname()[1]}', count='2', index='0')
        with pytest.raises(ValueError, match='Address already in use.*; name the host of process 0 and a free port there'):
            with distributed.joined(config.hosts, alone=False):
                pass


def test_without_a_cluster_nothing_is_joined(monkeypatch):
    def initialize(**kwargs):
        assert kwargs['initialization_timeout'] == 300 and 'coordinator_address' not in kwargs
        raise ValueError('coordinator_address should be defined.')
    monkeypatch.setattr('jax.distributed.initialize', initialize)
    with pytest.raises(KeyError):  # an error of a process alone is passed on as it is
        with distributed.joined(base.get_config().hosts, alone=False):
            raise KeyError('x')


def test_the_coordinator_may_be_in_the_environment(monkeypatch):
    given = {}
    monkeypatch.setattr('jax.distributed.initialize', lambda **kwargs: given.update(kwargs))
    for name, value in (('COORDINATOR_ADDRESS', 'localhost:1'), ('NUM_PROCESSES', '4'), ('PROCESS_ID', '3')):
        monkeypatch.setenv(f'JAX_{name}', value)
    with distributed.joined(base.get_config().hosts, alone=False):
        pass
    assert (given['coordinator_address'], given['num_processes'], given['process_id']) == ('localhost:1', 4, 3)


@pytest.mark.parametrize('lost, text', [
    (True, 'UNKNOWN: Gloo AllGather failed: [pair.cc:547] Connection closed by peer [127.0.0.1]:31106'),
    (True, 'FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: Connection reset by peer'),
    (True, 'DEADLINE_EXCEEDED: Barrier timed out. Id: ThreadSaveMultiHostValueHolder:set_value_start::3'),
    (True, 'INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 heartbeat timeout.'),
    (True, 'UNAVAILABLE: Failed to send RPC to coordination service. Either the leader task was preempted or died'),
    (True, 'ABORTED: /job:jax_worker/replica:0/task:1 unexpectedly tried to connect with a different incarnation'),
    (True, 'INTERNAL: NCCL operation ncclAllReduce failed: remote process exited or there was a network error'),
    (False, 'RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm; largest: collective-permute-start'),
    (False, 'INTERNAL: during compilation of %opt-barrier.3: unsupported'),
    (False, 'INVALID_ARGUMENT: peer access is not enabled between these devices'),
])
def test_a_lost_process_is_told_from_errors_of_a_device(lost, text):
    assert distributed.is_lost(jax.errors.JaxRuntimeError(text)) == lost


def test_a_lost_process_is_told_from_errors_of_python():
    assert distributed.is_lost(ValueError('UNKNOWN: Gloo AllGather failed: Connection closed by peer'))
    assert not distributed.is_lost(ValueError('config.mesh.data is 0')) and not distributed.is_lost(OSError('disk full'))


@contextlib.contextmanager
def _joined(hosts: dict) -> Iterator[Any]:
    """The config of a process that start_each started, which has joined the others."""
    config = base.get_config()
    config.hosts.update(hosts)
    with distributed.joined(config.hosts, alone=False):
        yield config


class _NoRecords:
    """An iterator that stays where it is."""

    def get_state(self):
        return {}

    def set_state(self, state):
        assert state == {}


def _state() -> dict:
    """Numbers of which every process holds its part; they cannot be compressed."""
    mesh = partitioning.make_mesh({'data': -1})
    tensor = np.random.default_rng(0).random((jax.device_count(), 100_000), np.float32)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    return {'tensor': jax.make_array_from_callback(tensor.shape, sharding, lambda index: tensor[index])}


def _write_where_one_disk_is_full(folder: str, hosts: dict) -> None:
    with _joined(hosts) as config, checkpoints.Preemption():
        checkpointer = checkpoints.Checkpointer(pathlib.Path(folder), config.train)
        state = _state()
        if hosts['index'] == '1':
            resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.RLIM_INFINITY))
        checkpointer.save(1, state, _NoRecords(), config)
        for _ in range(10_000):
            checkpointer.preempted()
            time.sleep(0.05)


@pytest.mark.slow  # 20 s
def test_a_full_disk_of_one_process_is_said_at_once_and_ends_all(tmp_path):
    (code, waiting), (own_code, failing) = ends(start_each(_write_where_one_disk_is_full, tmp_path), 30 + 2 * LOST_AFTER_S)
    assert own_code == 1
    assert 'error: process 1 of 2: the checkpoint of step 1 could not be written' in failing and 'File too large' in failing
    assert code and re.search('process 0 of 2: the exchange with the other processes broke off|another task died', waiting)


def _read_where_one_disk_fails(folder: str, hosts: dict) -> None:
    with _joined(hosts) as config, checkpoints.Preemption():
        checkpointer = checkpoints.Checkpointer(pathlib.Path(folder), config.train)
        state = _state()
        for step in (1, 2):
            checkpointer.save(step, state, _NoRecords(), config)
        checkpointer.wait()
        restore = ocp.StandardCheckpointHandler.restore

        def fail(self, directory, *args, **kwargs):
            if hosts['index'] == '1' and directory.parent.name == '2':
                raise OSError(5, 'Input/output error')
            return restore(self, directory, *args, **kwargs)
        ocp.StandardCheckpointHandler.restore = fail
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)
        restored, step = checkpointer.restore_latest(abstract, _NoRecords(), config)
        assert step == 1 and jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), restored, state))
        checkpointer.close()


def test_all_go_back_to_the_checkpoint_that_all_can_read(tmp_path):
    (code, told), (other_code, other) = ends(start_each(_read_where_one_disk_fails, tmp_path), 60)
    assert (code, other_code) == (0, 0), told + other
    assert 'checkpoint 2' in told and 'is damaged (OSError: [Errno 5] Input/output error)' in told
    assert 'continuing from step 1' in told and (tmp_path / 'checkpoints' / '2.damaged').exists()


def _hold_a_folder_of_its_own(folder: str, hosts: dict) -> None:
    """As on hosts whose --workdir is not shared."""
    own = pathlib.Path(folder) / hosts['index']
    checkpoints._SEEN_WITHIN_S = 1
    try:
        with _joined(hosts), checkpoints.exclusive(own):
            print('trains')
    except checkpoints.CheckpointError as error:
        sys.exit(f'error: {error}')


def test_a_folder_that_is_not_shared_is_refused_before_training(tmp_path):
    for index, (code, told) in enumerate(ends(start_each(_hold_a_folder_of_its_own, tmp_path), 60)):
        assert code == 1 and 'trains' not in told
        assert f'{tmp_path / str(index)}: is not a folder that all processes of the run see' in told
        assert f'(process {index} does not see .seen-{1 - index} there)' in told


def _work_for_long(folder: str, hosts: dict) -> None:
    """The first process works longer than JAX lets the others wait."""
    jax.distributed.initialize = functools.partial(jax.distributed.initialize, shutdown_timeout_seconds=2)
    with _joined(hosts):
        time.sleep(5 if hosts['index'] == '0' else 0)
        (pathlib.Path(folder) / hosts['index']).write_text(str(time.time()))
    (pathlib.Path(folder) / f'{hosts["index"]}.left').write_text(str(time.time()))


def test_a_process_that_is_done_waits_for_the_others(tmp_path):
    assert [code for code, _ in ends(start_each(_work_for_long, tmp_path), 60)] == [0, 0]
    done = {path.name: float(path.read_text()) for path in tmp_path.iterdir() if path.suffix != '.txt'}
    assert done['1'] + 1 < done['0'] <= done['1.left']


def _do_not_train(folder: str, hosts: dict) -> None:
    with _joined(hosts):
        for _ in range(2):  # the stages of a run
            with checkpoints.Preemption():
                assert not multihost_utils.reached_preemption_sync_point(0)
        (pathlib.Path(folder) / f'{hosts["index"]}.ready').touch()
        time.sleep(60)


def test_sigterm_ends_a_process_that_does_not_train(tmp_path):
    started = start_each(_do_not_train, tmp_path)
    while len(list(tmp_path.glob('*.ready'))) < 2 and all(process.is_alive() for process, _ in started):
        time.sleep(0.05)
    process = started[1][0]
    os.kill(process.pid, signal.SIGTERM)
    process.join(5)
    assert process.exitcode == -signal.SIGTERM, started[1][1].read_text()
    (code, output), _ = ends(started, 2 * LOST_AFTER_S)
    assert code and 'another task died' in output


def _fail_alone(folder: str, hosts: dict) -> None:
    """The second process is stopped by Ctrl-C, or has no device."""
    how = (pathlib.Path(folder) / 'how').read_text()
    if hosts['index'] == '1' and how == 'no device':
        jax.config.update('jax_platforms', 'none_such')
    with _joined(hosts):
        if hosts['index'] == '1' and how == 'Ctrl-C':
            raise KeyboardInterrupt
        jax.devices()
        time.sleep(60)


@pytest.mark.parametrize('how, code, said', [('Ctrl-C', 130, '^stopped$'),
                                             ('no device', 1, 'error: process 1 of 2: .*none_such')])
def test_a_process_that_fails_alone_ends_at_once(tmp_path, how, code, said):
    (tmp_path / 'how').write_text(how)
    other, (process, output) = start_each(_fail_alone, tmp_path)
    try:
        process.join(90)
        assert process.exitcode == code, output.read_text()
        assert re.search(said, output.read_text(), re.MULTILINE)
    finally:
        other[0].kill()


_ALONE = """
import sys
from configs import base
from mmaudio_jax import distributed
config = base.get_config()
config.hosts.update(coordinator=sys.argv[1], count='2', index=sys.argv[2], start_timeout_s=3)
with distributed.joined(config.hosts, alone=False):
    pass
"""


def test_who_waits_for_the_others_says_so_before_jax_aborts():
    wheres = [address(), address()]
    processes = [subprocess.Popen([sys.executable, '-c', _ALONE, where, str(index)], cwd=pathlib.Path(__file__).parents[1],
                                  stderr=subprocess.PIPE, text=True) for index, where in enumerate(wheres)]
    told = [process.communicate(timeout=60)[1] for process in processes]
    for index, where in enumerate(wheres):
        line = f'process {index} of 2 waits for the others at {where}, at most 3 s (config.hosts.start_timeout_s)'
        assert processes[index].returncode == -signal.SIGABRT and told[index].startswith(line), told[index]
