"""Several processes are told to stop, or one fails, where it matters when: during the restore, and during an evaluation."""
import os
import pathlib
import signal
import time

import pytest

from mmaudio_jax import checkpoints
from mmaudio_jax import distributed
from mmaudio_jax import train
from tests import distributed_test
from tests import tiny_run

NOTICED_AFTER_S = 2.5  # JAX looks once a second for a signal, and then tells the others


@pytest.fixture(name='workdir')
def fixture_workdir(tmp_path, monkeypatch):
    tiny_run.write_records(tmp_path)
    monkeypatch.setattr(train.mmaudio, 'build', tiny_run.build_network)
    return tmp_path


def steps_of(folder: pathlib.Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def _train(folder: str, hosts: dict, **train_fields) -> None:
    train.mmaudio.build = tiny_run.build_network
    config = tiny_run.make_config(**train_fields)
    config.hosts.update(hosts)
    with distributed.joined(config.hosts, alone=False):
        train.train(config, pathlib.Path(folder))
        print('the next stage')


def _told_before(function, hosts: dict):
    """The function, before which SIGTERM comes to process 1."""
    def told(*args):
        if hosts['index'] == '1':
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(NOTICED_AFTER_S)
        return function(*args)
    return told


def _told_during_the_restore(folder: str, hosts: dict) -> None:
    checkpoints.Checkpointer.restore_latest = _told_before(checkpoints.Checkpointer.restore_latest, hosts)
    _train(folder, hosts, total_steps=9)


@pytest.mark.slow  # 15 s each
@pytest.mark.parametrize('damaged, step', [(False, 6), (True, 3)])
def test_several_processes_are_told_to_stop_during_the_restore(workdir, damaged, step):
    """They end before their first step, whichever checkpoint they go on from."""
    train.train(tiny_run.make_config(total_steps=6), workdir)
    if damaged:
        for path in (workdir / 'checkpoints' / '6' / 'state').rglob('*'):
            if path.is_file():
                path.write_bytes(path.read_bytes()[:10])
    for code, output in distributed_test.ends(distributed_test.start_each(_told_during_the_restore, workdir), 90):
        assert code == 0 and 'the next stage' not in output, output
    output = (workdir / 'output_0.txt').read_text()
    assert f'continuing from step {step}:' in output and f'told to stop: saved step {step}' in output
    assert steps_of(workdir / 'checkpoints') == [3, 6][:step // 3]
