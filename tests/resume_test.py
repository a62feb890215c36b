"""A run that was stopped, killed or preempted and goes on ends bit for bit where an undisturbed run ends."""
import json
import os
import pathlib
import random
import re
import signal
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests import tiny_run

STEPS = 12
KILLS = int(os.environ.get('MMAUDIO_JAX_KILLS', '4'))  # more by hand: 4 take about 15 s
pytestmark = pytest.mark.filterwarnings('ignore:Sharding info not provided')


@pytest.fixture(name='records', scope='module')
def fixture_records(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    tiny_run.write_records(folder)
    return folder


@pytest.fixture(name='cache', scope='module')
def fixture_cache(tmp_path_factory):
    return tmp_path_factory.mktemp('compiled')


def new_workdir(parent: pathlib.Path, records: pathlib.Path, name: str) -> pathlib.Path:
    (parent / name).mkdir()
    (parent / name / 'records').symlink_to(records / 'records')
    return parent / name


def saved(workdir: pathlib.Path, step: int) -> dict:
    """Every tensor of a checkpoint as numpy, and the state of its iterator."""
    handlers = {'state': ocp.PyTreeCheckpointHandler(), 'iterator': ocp.JsonCheckpointHandler()}
    with ocp.CheckpointManager(workdir / 'checkpoints', item_handlers=handlers) as manager:
        metadata = manager.item_metadata(step)['state'].tree
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])  # whatever mesh it was saved on
        whole = jax.tree.map(lambda _: ocp.ArrayRestoreArgs(sharding=here), metadata)
        restored = manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(restore_args=whole),
                                                                 iterator=ocp.args.JsonRestore()))
    tensors = {jax.tree_util.keystr(path): np.asarray(leaf)
               for path, leaf in jax.tree_util.tree_leaves_with_path(restored.state)}
    assert any('params' in name for name in tensors) and any('ema' in name for name in tensors)
    return {**tensors, 'iterator': restored.iterator}


def assert_equal_ends(one: pathlib.Path, other: pathlib.Path, steps: int = STEPS) -> None:
    """The last checkpoints, the stored averages and the logged steps agree bit for bit."""
    first, second = saved(one, steps), saved(other, steps)
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)
    for path in sorted((one / 'ema').glob('*/*.npz')):
        with np.load(path) as a, np.load(other / path.relative_to(one)) as b:
            assert a.files == b.files and all(np.array_equal(a[name], b[name]) for name in a.files)
    for folder in (one, other):
        lines = [json.loads(line) for line in (folder / 'logs' / 'metrics.jsonl').read_text().splitlines()]
        counted = [(line['step'], line['steps']) for line in lines if 'loss' in line]
        assert sum(count for _, count in counted) == steps  # every step is in exactly one line
        assert [step for step, _ in counted] == np.cumsum([count for _, count in counted]).tolist()
        validated = [line['step'] for line in lines if 'validation_loss' in line]
        assert validated == sorted(set(validated)) and set(range(4, steps + 1, 4)) <= set(validated)


@pytest.fixture(name='undisturbed', scope='module')
def fixture_undisturbed(tmp_path_factory, records, cache):
    workdir = new_workdir(tmp_path_factory.mktemp('undisturbed'), records, 'run')
    tiny_run.Run(workdir, cache).finish()
    return workdir


def test_stop_and_go_on_equals_one_run(tmp_path, records, cache, undisturbed):
    workdir = new_workdir(tmp_path, records, 'run')
    tiny_run.Run(workdir, cache, total_steps=STEPS // 2).finish()
    assert f'from step {STEPS // 2}:' in tiny_run.Run(workdir, cache).finish()
    assert_equal_ends(undisturbed, workdir)


def losses(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """(step, name) → value, of training and of validation."""
    lines = [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text().splitlines()]
    return {(line['step'], name): line[name] for line in lines for name in ('loss', 'validation_loss') if name in line}


@pytest.mark.parametrize('first, then', [(0, 4), (2, 0)])
def test_a_run_goes_on_on_another_mesh(tmp_path, records, cache, undisturbed, first, then):
    """Six steps on one mesh, six on another: data 8 (0), data 2 x fsdp 2 (4), fsdp 2 (2). All agrees but for rounding."""
    workdir = new_workdir(tmp_path, records, 'run')
    tiny_run.Run(workdir, cache, devices=first, total_steps=STEPS // 2).finish()
    assert f'from step {STEPS // 2}:' in tiny_run.Run(workdir, cache, devices=then).finish()
    ours, expected = losses(workdir), losses(undisturbed)
    shared = sorted(ours.keys() & expected.keys())
    assert {step for step, _ in shared} >= {4, 8, STEPS}
    assert max(abs(ours[key] / expected[key] - 1) for key in shared) < 1e-5  # measured below 1e-6
    one, other = saved(undisturbed, STEPS), saved(workdir, STEPS)
    assert one.pop('iterator') == other.pop('iterator')
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-6, err_msg=name)  # measured 5e-8


def test_profiled_steps_leave_a_profile(tmp_path, records, cache, undisturbed):
    workdir = new_workdir(tmp_path, records, 'run')
    tiny_run.Run(workdir, cache, profile_steps=(3, 4)).finish()
    (profile,) = (workdir / 'profile').rglob('*.xplane.pb')
    lines = [line for plane in jax.profiler.ProfileData.from_file(str(profile)).planes for line in plane.lines]
    assert any('train_step' in event.name for line in lines for event in line.events)
    assert_equal_ends(undisturbed, workdir)


def run_with_kills(workdir: pathlib.Path, cache: pathlib.Path, kills: int, **train_fields) -> list[int | None]:
    """Kills the run that often: in the preparation, while it steps, or while it writes; then lets it end. Where each began."""
    rng, began = random.Random(kills), []
    for _ in range(kills):
        run = tiny_run.Run(workdir, cache, pause_s=0.1, **train_fields)
        run.wait_for('training')
        run.wait_for('\nstep', count=rng.randrange(8))
        time.sleep(rng.random() * rng.choice([0.02, 0.5]))
        run.kill()
        began.append(first_step(run.output()))
    began.append(first_step(tiny_run.Run(workdir, cache, **train_fields).finish()))
    return began


def first_step(output: str) -> int | None:
    """Where a run went on; None when there was nothing left to do."""
    found = re.search(r'from (step (\d+)|the beginning):', output)
    return int(found[2] or 0) if found else None


def test_killed_run_ends_like_an_undisturbed_one(tmp_path, records, cache, undisturbed):
    workdir = new_workdir(tmp_path, records, 'run')
    began = run_with_kills(workdir, cache, KILLS)
    print('began at', began)
    assert any(0 < (step or 0) < STEPS for step in began)  # a run was killed on its way
    assert_equal_ends(undisturbed, workdir)


@pytest.mark.parametrize('number, code', [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_told_to_stop_it_saves(tmp_path, records, cache, undisturbed, number, code):
    workdir = new_workdir(tmp_path, records, 'run')
    run = tiny_run.Run(workdir, cache, pause_s=0.1)
    run.wait_for('step 2/')
    os.kill(run.process.pid, number)
    assert 'told to stop: saved step' in run.finish(code)
    step = max(int(folder.name) for folder in (workdir / 'checkpoints').iterdir())
    assert step < STEPS and first_step(tiny_run.Run(workdir, cache).finish()) == step
    assert_equal_ends(undisturbed, workdir)
