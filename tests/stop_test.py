"""Runs that are told to stop, or fail, at a moment that matters: during the restore, an evaluation, or the last step."""
import json
import os
import pathlib
import signal
import time

import jax
import numpy as np
import pytest

from mmaudio_jax import checkpoints
from mmaudio_jax import codec
from mmaudio_jax import distributed
from mmaudio_jax import snapshots
from mmaudio_jax import train
from mmaudio_jax import train_log
from mmaudio_jax.sequence import Sequence
from tests import distributed_test
from tests import tiny_run

pytestmark = pytest.mark.usefixtures('compiled')
NOTICED_AFTER_S = 2.5  # JAX looks once a second for a signal, and then tells the others


@pytest.fixture(name='workdir')
def fixture_workdir(tmp_path, monkeypatch):
    tiny_run.write_records(tmp_path)
    monkeypatch.setattr(train.mmaudio, 'build', tiny_run.build_network)
    return tmp_path


def steps_of(folder: pathlib.Path) -> list[int]:
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text().splitlines()]


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


def _out_of_memory(*_):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 1 byte')


def _unreadable(*_):
    raise ValueError('bells: record 3 cannot be read')


def _full_disk(*_):
    raise checkpoints.CheckpointError('the EMA snapshot could not be written')


def break_evaluation(monkeypatch, what: str) -> tuple[type[Exception], str]:
    """One part of every evaluation fails; with which error."""
    if what == 'validation loss':
        monkeypatch.setattr(train, '_validation', lambda *_: _unreadable)
        return ValueError, 'record 3 cannot be read'
    if what == 'samples':
        monkeypatch.setattr(train.train_samples, 'make_sample', lambda *_: _out_of_memory)
        return jax.errors.JaxRuntimeError, 'Out of memory'
    monkeypatch.setattr(snapshots, 'save', _full_disk)
    return checkpoints.CheckpointError, 'snapshot could not be written'


def _sampled_run(workdir: pathlib.Path, checkpoint_every: int):
    """A config whose evaluations, after steps 4 and 6, have all three parts."""
    config = tiny_run.make_config(total_steps=6, sample_every=4, checkpoint_every=checkpoint_every)
    config.data_dir = str(workdir)
    sequence = Sequence(**config.sequence)
    sounds = np.random.default_rng(0).normal(size=(4, sequence.waveform_length)).astype(np.float32) / 10
    codec.fit_pca([sounds], sequence, workdir / 'records' / 'codec.npz')
    return config


@pytest.mark.parametrize('what, checkpoint_every', [('validation loss', 3), ('samples', 4), ('snapshot', 3)])
def test_a_failed_evaluation_costs_no_step(workdir, monkeypatch, capfd, what, checkpoint_every):
    """Whether or not its step is one to be saved; and the run that goes on does it, and ends as if nothing had been."""
    config, undisturbed = _sampled_run(workdir, checkpoint_every), workdir / 'undisturbed'
    with monkeypatch.context() as broken:
        error, message = break_evaluation(broken, what)
        for _ in range(2):  # the second time there is nothing to save
            with pytest.raises(error, match=message):
                train.train(config, workdir)
            assert steps_of(workdir / 'checkpoints')[-1] == 4
            assert not (workdir / 'ema').exists() or not steps_of(workdir / 'ema')
    said = capfd.readouterr().out.count('the evaluation of step 4 failed: saved this step in')
    assert said == (0 if checkpoint_every == 4 else 1)
    for folder in (workdir, undisturbed):
        train.train(config, folder)
        assert steps_of(folder / 'ema') == steps_of(folder / 'samples') == [4, 6]
    assert [line['step'] for line in lines(workdir) if 'validation_loss' in line] == [4, 6]
    assert sum(line['steps'] for line in lines(workdir) if 'loss' in line) == 6
    for step in (4, 6):
        jax.tree.map(np.testing.assert_array_equal,
                     *(snapshots.load_params(folder, step=step)[0] for folder in (workdir, undisturbed)))


@pytest.mark.parametrize('checkpoint_every', [3, 4])
def test_when_the_step_cannot_be_saved_either_the_error_stays_that_of_evaluation(workdir, monkeypatch, capfd, checkpoint_every):
    """The disk is full at both, or in the background at the one and then at the other."""
    error, message = break_evaluation(monkeypatch, 'snapshot')
    write = checkpoints.ocp.StandardCheckpointHandler.async_save

    async def fail(self, directory, *args, **kwargs):
        futures = await write(self, directory, *args, **kwargs)
        return [*futures, Failing()] if directory.parent.name.startswith('4') else futures
    monkeypatch.setattr(checkpoints.ocp.StandardCheckpointHandler, 'async_save', fail)
    with pytest.raises(error, match=message):
        train.train(tiny_run.make_config(total_steps=6, checkpoint_every=checkpoint_every), workdir)
    told = capfd.readouterr()
    assert ('this step was not saved: ' in told.out) == (checkpoint_every == 3)
    assert (told.out + told.err).count('the checkpoint of step 4 could not be written') == 1
    assert steps_of(workdir / 'checkpoints') == ([3] if checkpoint_every == 3 else [])


class Failing:
    """What Orbax waits for in the background."""

    def result(self, timeout=None):
        raise OSError(28, 'No space left on device')


def _out_of_memory_while_a_checkpoint_is_written(folder: str, hosts: dict) -> None:
    meet = checkpoints.Checkpointer._meet
    checkpoints.Checkpointer._meet = lambda self, **fields: time.sleep(1) or meet(self, **fields)
    train._validation = lambda *_: _out_of_memory
    _train(folder, hosts, total_steps=6, checkpoint_every=4)


@pytest.mark.slow  # 15 s
def test_several_processes_finish_a_checkpoint_when_the_evaluation_of_its_step_fails(workdir):
    """An error of a device is not always a process that was lost."""
    for code, output in distributed_test.ends(
            distributed_test.start_each(_out_of_memory_while_a_checkpoint_is_written, workdir), 90):
        assert code == 1 and 'Out of memory allocating' in output, output
    assert steps_of(workdir / 'checkpoints') == [4]


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
@pytest.mark.parametrize('during', ['evaluation', 'the end', 'no training'])
def test_told_to_stop_at_the_end_no_other_stage_begins(workdir, monkeypatch, capfd, number, code, during):
    """During the last evaluation, after the loop asked for the last time, or when all was done before."""
    config = tiny_run.make_config(total_steps=4)
    if during == 'no training':
        train.train(config, workdir)
    where, name = {'evaluation': (snapshots, 'save'), 'the end': (train_log.TrainLog, 'close'),
                   'no training': (checkpoints.Checkpointer, 'check')}[during]
    function = getattr(where, name)
    with monkeypatch.context() as told:
        told.setattr(where, name, lambda *args: signal.raise_signal(number) or function(*args))
        with pytest.raises(SystemExit) as stopped:
            train.train(config, workdir)
    assert stopped.value.code == code
    last = capfd.readouterr().out.splitlines()[-1]
    if during == 'evaluation':
        assert last == (f'told to stop: trained all 4 steps, checkpoints in {workdir / "checkpoints"}; the same command goes '
                        'on with what comes after training')
    train.train(config, workdir)
    assert capfd.readouterr().out.startswith('training: all 4 steps are done')


def _told_during_the_last_evaluation(folder: str, hosts: dict) -> None:
    snapshots.save = _told_before(snapshots.save, hosts)
    _train(folder, hosts, total_steps=4)


@pytest.mark.slow  # 15 s
def test_several_processes_are_told_to_stop_during_the_last_evaluation(workdir):
    for code, output in distributed_test.ends(distributed_test.start_each(_told_during_the_last_evaluation, workdir), 90):
        assert code == 0 and 'the next stage' not in output, output
    assert 'told to stop: trained all 4 steps' in (workdir / 'output_0.txt').read_text()
    assert steps_of(workdir / 'ema') == steps_of(workdir / 'checkpoints')[-1:] == [4]


def test_the_last_line_says_how_far_a_stopped_run_came(workdir, monkeypatch, capfd):
    asked = iter([False, False, True])
    monkeypatch.setattr(checkpoints.Checkpointer, 'preempted', lambda self: next(asked))
    with pytest.raises(SystemExit) as stopped:
        train.train(tiny_run.make_config(), workdir)
    assert stopped.value.code == 0 and capfd.readouterr().out.splitlines()[-1] == (
        f'told to stop: saved step 2 of 12 in {workdir / "checkpoints"}; training is not finished, the same command goes on '
        'from there')
