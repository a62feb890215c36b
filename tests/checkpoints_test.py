import copy
import itertools
import os
import pathlib
import signal

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from configs import base
from mmaudio_jax import checkpoints
from mmaudio_jax import ema
from mmaudio_jax import partitioning
from mmaudio_jax import snapshots


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple


class Counter:
    """An iterator whose state is how far it came."""

    def __init__(self):
        self.position = 0

    def __next__(self):
        self.position += 1
        return self.position

    def get_state(self):
        return {'position': self.position}

    def set_state(self, state):
        self.position = state['position']


def _config(**train):
    fields = dict(total_steps=100, checkpoint_every=10, keep_last=2, keep_every=0, log_every=1)
    return ml_collections.ConfigDict({'seed': 1, 'optimizer': {'learning_rate': 1e-3, 'betas': (0.9, 0.95)},
                                      'ema': {'synthesis_sigma_rel': 0.1}, 'train': {**fields, **train}})


def _state(value, size=64):
    params = {'dense': {'kernel': jnp.full((size, 4), value, jnp.float32)}, 'bias': jnp.full(4, value, jnp.float32)}
    return State(jnp.int32(value), params, optax.adamw(1e-3).init(params))


def _abstract(state):
    mesh = partitioning.make_mesh({'data': -1})
    return partitioning.abstract(jax.eval_shape(lambda: state), partitioning.tensor_shardings(mesh, state, (('.*', ()),)))


def _saved(folder, steps, **train):
    """A workdir with checkpoints of the given steps, step in every value and in the iterator."""
    config, iterator = _config(**train), Counter()
    checkpointer = checkpoints.Checkpointer(folder, config.train)
    for step in steps:
        iterator.position = step
        checkpointer.save(step, _state(step), iterator, config)
    checkpointer.close()
    return config


def _restore(folder, config, size=64):
    iterator = Counter()
    checkpointer = checkpoints.Checkpointer(folder, config.train)
    try:
        return checkpointer.restore_latest(_abstract(_state(0, size)), iterator, config), iterator
    finally:
        checkpointer.close()


def test_state_and_iterator_come_back(tmp_path):
    config = _saved(tmp_path, [10])
    (state, step), iterator = _restore(tmp_path, config)
    assert step == 10 and next(iterator) == 11
    jax.tree.map(np.testing.assert_array_equal, state, _state(10))
    assert jax.tree.structure(state) == jax.tree.structure(_state(10))
    assert state.params['dense']['kernel'].sharding.is_fully_replicated


def test_a_checkpoint_of_one_mesh_is_restored_on_another(tmp_path):
    rules, state = (('kernel$', ('fsdp', None)), ('.*', ())), _state(10)
    for number, (old, new) in enumerate(itertools.permutations([{'data': -1}, {'data': 2, 'fsdp': 4}], 2)):
        folder, config = tmp_path / str(number), _config()
        mesh = partitioning.make_mesh(old)
        checkpointer = checkpoints.Checkpointer(folder, config.train)
        placed = jax.device_put(state, partitioning.tensor_shardings(mesh, state, rules))
        checkpointer.save(10, placed, Counter(), config)
        wanted = partitioning.tensor_shardings(partitioning.make_mesh(new), state, rules)
        restored, step = checkpointer.restore_latest(partitioning.abstract(state, wanted), Counter(), config)
        checkpointer.close()
        assert step == 10
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        assert jax.tree.map(lambda leaf: leaf.sharding, restored) == wanted


def test_nothing_saved_is_none(tmp_path):
    assert _restore(tmp_path, _config())[0] is None


def test_the_state_may_be_donated_while_it_is_written(tmp_path):
    config = _config()
    state = _state(3, 300_000)
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    checkpointer = checkpoints.Checkpointer(tmp_path, config.train)
    checkpointer.save(3, state, Counter(), config)
    for _ in range(3):
        state = overwrite(state)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, _restore(tmp_path, config, 300_000)[0][0], _state(3, 300_000))


def test_keeps_the_last_k_and_every_nth(tmp_path):
    _saved(tmp_path, range(10, 80, 10), keep_last=2, keep_every=30)
    assert sorted(int(p.name) for p in (tmp_path / 'checkpoints').iterdir()) == [30, 60, 70]


def test_orbax_decides_by_interval_last_step_and_preemption(tmp_path):
    told = []
    checkpointer = checkpoints.Checkpointer(tmp_path, _config(total_steps=25).train, lambda: bool(told))
    assert [step for step in range(26) if checkpointer.should_save(step)] == [10, 20, 25]
    told.append(True)
    assert checkpointer.should_save(7) and checkpointer.preempted()
    checkpointer.close()


def test_a_process_that_sees_no_checkpoint_yet_takes_part_in_the_agreement(tmp_path, monkeypatch):
    checkpointer = checkpoints.Checkpointer(tmp_path, _config().train)
    given = []
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    of_process_0 = iter([2, np.array([20, 10])])
    monkeypatch.setattr(checkpoints.multihost_utils, 'broadcast_one_to_all', lambda x: given.append(x) or next(of_process_0))
    assert checkpointer._agreed_steps() == [20, 10]
    assert given[0] == 0 and (given[1].shape, given[1].dtype) == ((2,), np.int64)
    monkeypatch.undo()
    checkpointer.close()


def test_sigterm_becomes_a_flag_and_the_handler_is_put_back():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoints.Preemption() as preemption:
        assert not preemption.noticed
        signal.raise_signal(signal.SIGTERM)
        assert preemption.noticed
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_first_ctrl_c_is_a_notice_and_the_second_ends_at_once(capsys):
    before = signal.getsignal(signal.SIGINT)
    with checkpoints.Preemption() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.noticed and preemption.exit_code == 130 and 'Ctrl-C again ends at once' in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def _truncate(folder: pathlib.Path):
    largest = max((p for p in folder.rglob('*') if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:100])


@pytest.mark.parametrize('damage', [
    _truncate,
    lambda folder: [p.unlink() for p in (folder / 'state').rglob('*') if p.is_file()],
    lambda folder: (folder / 'config' / 'metadata').write_text('{"seed": '),
    lambda folder: (folder / 'iterator' / 'metadata').write_text(''),
], ids=['truncated', 'no state', 'half a config', 'empty iterator'])
def test_damaged_checkpoint_is_passed_over_with_a_message(tmp_path, capsys, damage):
    config = _saved(tmp_path, [10, 20])
    damage(tmp_path / 'checkpoints' / '20')
    (state, step), iterator = _restore(tmp_path, config)
    assert step == 10 and iterator.position == 10 and int(state.step) == 10
    assert 'checkpoint 20' in (message := capsys.readouterr().out) and 'continuing from step 10' in message
    assert (tmp_path / 'checkpoints' / '20.damaged').exists()
    _saved(tmp_path, [20])
    assert _restore(tmp_path, config)[0][1] == 20


def test_numbers_that_are_not_finite_are_damage(tmp_path, capsys):
    """Overwritten bytes of a tensor can be read."""
    config = _saved(tmp_path, [10])
    checkpointer = checkpoints.Checkpointer(tmp_path, config.train)
    checkpointer.save(20, _state(20).replace(params={**_state(20).params, 'bias': jnp.full(4, jnp.nan)}), Counter(), config)
    checkpointer.close()
    assert _restore(tmp_path, config)[0][1] == 10
    assert 'checkpoint 20' in (message := capsys.readouterr().out) and '(its numbers are not finite)' in message


def test_the_reason_is_that_of_the_first_cause(tmp_path, monkeypatch):
    config = _saved(tmp_path, [10])

    def fail(*args, **kwargs):
        raise SystemError('<bound method x> returned a result with an exception set') from OSError(5, 'Input/output error')
    monkeypatch.setattr('orbax.checkpoint.StandardCheckpointHandler.restore', fail)
    with pytest.raises(checkpoints.CheckpointError, match=r'step 10: OSError: \[Errno 5\] Input/output error'):
        _restore(tmp_path, config)


def test_unfinished_checkpoint_is_skipped_with_a_message(tmp_path, capsys):
    config = _saved(tmp_path, [10, 20])
    folder = tmp_path / 'checkpoints'
    (folder / '20').rename(folder / '20.orbax-checkpoint-tmp')
    assert _restore(tmp_path, config)[0][1] == 10
    assert 'checkpoint 20' in (message := capsys.readouterr().out) and 'not finished' in message


def test_disk_full_is_said_and_the_earlier_checkpoint_stays(tmp_path, monkeypatch):
    config = _saved(tmp_path, [10])
    checkpointer = checkpoints.Checkpointer(tmp_path, config.train)

    async def no_space(directory, *args, **kwargs):
        raise ValueError('RESOURCE_EXHAUSTED: Error writing\n"x": No space left on device')
    monkeypatch.setattr('orbax.checkpoint.StandardCheckpointHandler.async_save', no_space)
    message = r'of step 20 .* \(No space left on device\); the checkpoint of step 10 is intact'
    with pytest.raises(checkpoints.CheckpointError, match=message):
        checkpointer.save(20, _state(20), Counter(), config)
        checkpointer.wait()
    monkeypatch.undo()
    assert _restore(tmp_path, config)[0][1] == 10


def test_no_readable_checkpoint_is_an_error_not_a_fresh_start(tmp_path):
    config = _saved(tmp_path, [10])
    _truncate(tmp_path / 'checkpoints' / '10')
    with pytest.raises(checkpoints.CheckpointError, match='none of the checkpoints in .* can be read'):
        _restore(tmp_path, config)
    assert (tmp_path / 'checkpoints' / '10').exists()


def test_another_config_is_an_error_that_names_the_field(tmp_path):
    config = _saved(tmp_path, [10])
    config.train.total_steps, config.train.log_every = 200, 5
    assert _restore(tmp_path, config)[0][1] == 10
    config.optimizer.learning_rate = 2e-3
    with pytest.raises(checkpoints.CheckpointError, match='config.optimizer.learning_rate is 0.002, but .* made with 0.001'):
        _restore(tmp_path, config)


CHANGES = {
    'refused': ('seed', 'impacts.seed', 'sequence.duration_s', 'extract.encoder', 'extract.feature_dtype', 'input.mixture',
                'input.shares', 'input.balance', 'input.without_text', 'input.batch_size', 'weights.dtype', 'model.hidden_size',
                'model.rope', 'model.dtype', 'flow.video_dropout', 'optimizer.learning_rate', 'optimizer.betas',
                'ema.sigma_rels'),
    'free': ('name', 'data_dir', 'input.workers', 'input.prefetch', 'weights.folder', 'weights.cache', 'weights.offline',
             'weights.export', 'model.remat', 'mesh.fsdp', 'hosts.count', 'train.total_steps', 'sampling.guidance',
             'evaluate.split', 'ema.snapshot_every'),
}


@pytest.mark.parametrize('kind, field', [(kind, field) for kind, fields in CHANGES.items() for field in fields])
def test_what_may_change_when_a_run_goes_on(tmp_path, kind, field):
    """Free is what changes no number that training computes: another machine has other folders."""
    saved = checkpoints.to_json(base.get_config())
    current = copy.deepcopy(saved)
    section, _, name = field.rpartition('.')
    (current[section] if section else current)[name] = 'another'
    if kind == 'free':
        checkpoints.check_config(saved, current, tmp_path)
    else:
        with pytest.raises(checkpoints.CheckpointError, match=f'config.{field} is another, but {tmp_path} was made with'):
            checkpoints.check_config(saved, current, tmp_path)


def _averages(step):
    full = lambda shape, value: np.full(shape, value, np.float32)
    tree = lambda value: {'dense': {'kernel': full((3, 2), value)}, 'latent_mean': full((1, 1, 2), 7)}
    return {0.05: tree(step), 0.1: tree(step / 2)}


def test_weights_are_synthesised_from_the_snapshots(tmp_path):
    config = _config()
    for step in (10, 20, 30):
        snapshots.save(tmp_path, step, _averages(step), config)
    for sigma_rel, step, value in ((0.05, None, 30), (0.1, 20, 10)):  # a stored average comes back as it is
        params, saved = snapshots.load_params(tmp_path, sigma_rel, step)
        np.testing.assert_allclose(params['dense']['kernel'], np.full((3, 2), value), rtol=1e-6)
        np.testing.assert_array_equal(params['latent_mean'], np.full((1, 1, 2), 7))
        assert saved == checkpoints.to_json(config)
    assert snapshots.latest(tmp_path) == snapshots.latest_agreed(tmp_path) == 30
    handles = len(os.listdir('/proc/self/fd')) if os.path.isdir('/proc/self/fd') else None
    stored = snapshots.load_all(tmp_path)
    assert len(stored) == 6 and (handles is None or len(os.listdir('/proc/self/fd')) == handles)
    own_width = snapshots.load_params(tmp_path, config.ema.synthesis_sigma_rel)[0]
    np.testing.assert_array_equal(snapshots.load_params(tmp_path)[0]['dense']['kernel'], own_width['dense']['kernel'])
    earlier = [ema.Snapshot(ema.sigma_rel_to_gamma(width), step, _averages(step)[width])
               for step in (10, 20) for width in (0.05, 0.1)]
    jax.tree.map(lambda ours, wanted: np.testing.assert_allclose(ours, wanted, rtol=1e-5),
                 snapshots.load_params(tmp_path, 0.08, 20)[0], ema.synthesize(earlier, 0.08, 20))  # none of step 30
    with pytest.raises(ValueError, match='no EMA snapshot of step 25'):
        snapshots.load_params(tmp_path, 0.05, 25)


def test_a_stored_average_is_read_alone(tmp_path):
    config = _config()
    for step in (10, 20):
        snapshots.save(tmp_path, step, _averages(step), config)
    path = tmp_path / 'ema' / '10' / 'sigma_rel_0.05.npz'
    path.write_bytes(path.read_bytes()[:100])  # cut off
    for width in (0.05, 0.1):
        found = snapshots.load_params(tmp_path, width, 20)[0]
        jax.tree.map(np.testing.assert_array_equal, found, _averages(20)[width])
    with pytest.raises(checkpoints.CheckpointError, match='10/sigma_rel_0.05.npz: damaged'):
        snapshots.load_params(tmp_path, 0.08, 20)


def test_what_an_abandoned_run_left_of_later_steps_is_set_aside(tmp_path, capsys):
    for name in ('ema/10', 'ema/20', 'ema/30', 'samples/20', 'samples/30'):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / 'ema' / '30.stale').mkdir()
    snapshots.set_aside_later(tmp_path, 20)
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob('*/*'))
    assert found == ['ema/10', 'ema/20', 'ema/30.stale', 'ema/30.stale2', 'samples/20', 'samples/30.stale']
    assert 'ema/30 is of a later step than 20: renamed to 30.stale2, and made again' in capsys.readouterr().out


def test_snapshot_is_whole_or_absent(tmp_path, monkeypatch):
    config = _config()
    snapshots.save(tmp_path, 10, _averages(10), config)
    snapshots.save(tmp_path, 10, _averages(99), config)  # there already: not written again
    np.testing.assert_allclose(snapshots.load_params(tmp_path, 0.05)[0]['dense']['kernel'], np.full((3, 2), 10))
    monkeypatch.setattr(np, 'savez', lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, 'No space left on device')))
    with pytest.raises(checkpoints.CheckpointError, match='No space left'):
        snapshots.save(tmp_path, 20, _averages(20), config)
    assert [p.name for p in (tmp_path / 'ema').iterdir()] == ['10']


def test_snapshots_of_another_config_are_refused(tmp_path):
    config = _config()
    snapshots.save(tmp_path, 10, _averages(10), config)
    snapshots.check(tmp_path, config)
    config.seed = 2
    with pytest.raises(checkpoints.CheckpointError, match='config.seed is 2'):
        snapshots.check(tmp_path, config)


@pytest.mark.parametrize('damage, message', [
    (lambda path: path.write_bytes(path.read_bytes()[:100]), 'sigma_rel_0.1.npz: damaged .*sample from another step'),
    (lambda path: path.write_bytes(path.read_bytes().replace(np.float32(5).tobytes(), np.float32(4).tobytes())),
     'sigma_rel_0.1.npz: damaged .*CRC'),
    (lambda path: [file.unlink() for file in path.parent.glob('*.npz')], 'ema/10: holds no sigma_rel_'),
])
def test_damaged_snapshots_are_named(tmp_path, damage, message):
    snapshots.save(tmp_path, 10, _averages(10), _config())
    damage(tmp_path / 'ema' / '10' / 'sigma_rel_0.1.npz')
    with pytest.raises(checkpoints.CheckpointError, match=message):
        jax.tree.map(np.asarray, snapshots.load_params(tmp_path, 0.1)[0])


def test_a_relative_folder_of_data_is_saved_as_an_absolute_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = base.get_config()
    config.data_dir = 'data'
    snapshots.save(tmp_path / 'run', 10, _averages(10), config)
    assert snapshots.load_params(tmp_path / 'run', 0.05)[1]['data_dir'] == str(tmp_path / 'data')


def test_fields_of_another_version_are_said_and_continued_with(tmp_path):
    saved = {'flow': {'min_sigma': 0.0, 'old': 1}, 'seed': 3}
    with pytest.warns(UserWarning) as warned:
        checkpoints.check_config(saved, {'flow': {'min_sigma': 0.0, 'new': False}, 'seed': 3}, tmp_path)
    assert [str(w.message).split(' is not')[0] for w in warned] == ['config.flow.new', 'config.flow.old']
    with pytest.warns(UserWarning), pytest.raises(checkpoints.CheckpointError, match='config.seed is 4'):
        checkpoints.check_config(saved, {'flow': {'min_sigma': 0.0}, 'seed': 4}, tmp_path)


def test_no_weights_says_train_first(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match='train first'):
        snapshots.load_params(tmp_path, 0.05)
    with pytest.raises(checkpoints.CheckpointError, match='train first'):
        snapshots.latest_agreed(tmp_path)


def test_a_second_process_is_refused(tmp_path):
    with checkpoints.exclusive(tmp_path):
        with pytest.raises(checkpoints.CheckpointError, match='another process is training there'):
            with checkpoints.exclusive(tmp_path):
                pass
    with checkpoints.exclusive(tmp_path):  # free again
        assert list(tmp_path.iterdir())
