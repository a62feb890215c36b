"""What the loop writes, says and refuses. That a run resumes exactly is held by resume_test."""
import contextlib
import itertools
import json
import os
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

from mmaudio_jax import checkpoints
from mmaudio_jax import codec
from mmaudio_jax import ema
from mmaudio_jax import flops
from mmaudio_jax import input_pipeline
from mmaudio_jax import partitioning
from mmaudio_jax import record_sampler
from mmaudio_jax import snapshots
from mmaudio_jax import train
from mmaudio_jax import train_log
from mmaudio_jax import train_step
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store
from tests import tiny_run
from tests import trained_run

pytestmark = pytest.mark.usefixtures('compiled')


@pytest.fixture(name='workdir')
def fixture_workdir(tmp_path, monkeypatch):
    tiny_run.write_records(tmp_path)
    monkeypatch.setattr(train.mmaudio, 'build', tiny_run.build_network)
    return tmp_path


def lines(workdir):
    return [json.loads(line) for line in (workdir / 'logs' / 'metrics.jsonl').read_text().splitlines()]


def steps_of(folder):
    return sorted(int(entry.name) for entry in folder.iterdir() if entry.name.isdigit())


def test_run_writes_everything_and_a_second_one_does_nothing(workdir, capfd):
    config = tiny_run.make_config(total_steps=6, sample_every=6)
    config.sharding.activations = (('/hidden$', (('data', 'fsdp'), None, None)),)  # which two sampled clips alone do not fill
    sequence = Sequence(**config.sequence)
    sounds = np.random.default_rng(0).normal(size=(4, sequence.waveform_length)).astype(np.float32) / 10
    codec.fit_pca([sounds], sequence, workdir / 'records' / 'codec.npz')
    train.train(config, workdir)
    printed = capfd.readouterr()
    assert printed.err == ''
    text = printed.out.splitlines()
    assert text[0] == 'training tiny from the beginning: 0.26 M parameters, batches of 8 on 8 cpu devices'
    assert [line.split('  loss')[0] for line in text if '  loss' in line] == ['step 2/6', 'step 3/6', 'step 4/6', 'step 6/6']
    assert text[-1] == f'trained 6 steps; checkpoints in {workdir / "checkpoints"}' and len(text) == 8
    assert steps_of(workdir / 'checkpoints') == [3, 6] and steps_of(workdir / 'ema') == [4, 6]
    assert [(line['step'], line['steps']) for line in lines(workdir) if 'loss' in line] == [(2, 2), (3, 1), (4, 1), (6, 2)]
    assert any((workdir / 'logs').glob('events.*'))
    params, saved = snapshots.load_params(workdir)
    assert saved['name'] == 'tiny' and params['latent_mean'].shape == (1, 1, 20)
    sample, rate = soundfile.read(workdir / 'samples' / '6' / '00_clip-024.flac')
    assert rate == 16_000 and len(sample) == 16_000 and np.abs(sample).max() > 0
    assert len(list((workdir / 'samples' / '6').iterdir())) == 4
    examples = list(itertools.islice(input_pipeline.read_split(config, workdir / 'records', 'bells', 'validation'), 2))
    mesh = partitioning.make_mesh({'data': 1}, devices=jax.devices()[:1])
    network = partitioning.on_mesh(tiny_run.build_network(None, sequence), mesh, tiny_run.make_config())
    latents = record_sampler.make(config, network, mesh, sequence, 2)(params, examples)
    decoder = codec.make('pca', sequence, workdir / 'records' / 'codec.npz', store.load)
    np.testing.assert_allclose(sample, decoder.decode(np.asarray(latents))[0, :len(sample)], atol=1e-3)
    train.train(config, workdir)
    assert capfd.readouterr().out.splitlines() == [
        f'training: all 6 steps are done (config.train.total_steps), in {workdir / "checkpoints"}']


def test_every_average_is_stored_under_its_own_width(tmp_path):
    config = tiny_run.make_config(validate_every=0)
    averages = tuple({'kernel': jnp.full(3, value)} for value in (5.0, 10.0))
    state = types.SimpleNamespace(ema=ema.EMAState(count=jnp.int32(4), averages=averages, sigma_rels=(0.05, 0.1)))
    train._evaluate(types.SimpleNamespace(config=config, workdir=tmp_path), state, step=4, last=False)
    stored = {round(snapshot.gamma, 3): float(np.asarray(snapshot.params['kernel'])[0])
              for snapshot in snapshots.load_all(tmp_path)}
    assert stored == {round(ema.sigma_rel_to_gamma(width), 3): 100 * width for width in (0.05, 0.1)}


def break_at(monkeypatch, at: int, what: str):
    """The step number `at` gives a loss or parameters that are not a number."""
    make = train_step.make_train_step

    def broken(*args):
        step = make(*args)

        def run(state, batch):
            state, metrics = step(state, batch)
            spoil = jnp.where(state.step == at, jnp.nan, 0.0)
            if what == 'loss':
                return state, {**metrics, 'loss': metrics['loss'] + spoil}
            return state.replace(params=jax.tree.map(lambda leaf: leaf + spoil, state.params)), metrics
        return run
    monkeypatch.setattr(train_step, 'make_train_step', broken)


@pytest.mark.parametrize('at, what, message', [
    (6, 'loss', 'loss is nan at step 6 .*; the checkpoint of step 3 is untouched'),  # when step 6 would have been saved
    (6, 'params', 'a parameter or an average is not finite after step 6; the checkpoint of step 3 is untouched'),
    (2, 'params', 'loss is nan at step 3 .*; there is no checkpoint yet'),
])
def test_run_stops_when_it_is_no_longer_finite(workdir, monkeypatch, at, what, message):
    break_at(monkeypatch, at, what)
    with pytest.raises(train_log.NonFiniteError, match=message):
        train.train(tiny_run.make_config(total_steps=9, max_skipped=0), workdir)
    expected = [] if at == 2 else [3]
    assert steps_of(workdir / 'checkpoints') == expected
    assert all(np.isfinite(value) for line in lines(workdir) for value in line.values())


def test_single_bad_steps_are_left_out_and_counted(workdir, monkeypatch, capfd):
    """A record whose latents are not finite spoils its batches, and nothing else."""
    to_global = train.input_pipeline._to_global
    bad = {2, 3, 6}
    monkeypatch.setattr(train.input_pipeline, '_to_global', lambda batch, *args: to_global(
        {**batch, 'latent_mean': batch['latent_mean'] * np.float16(np.nan if next(numbers) in bad else 1)}, *args))
    numbers = itertools.count(1)
    train.train(tiny_run.make_config(total_steps=8, validate_every=0, max_skipped=2, log_every=1), workdir)
    assert 'loss is nan at step 3' in capfd.readouterr().out
    found = {line['step']: line for line in lines(workdir) if 'steps' in line}
    assert {step for step, line in found.items() if line['skipped']} == bad
    assert all(('loss' in line) == (step not in bad) for step, line in found.items()) and len(found) == 8
    params, _ = snapshots.load_params(workdir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_too_many_bad_steps_in_a_row_stop_the_run(workdir, monkeypatch):
    to_global = train.input_pipeline._to_global
    monkeypatch.setattr(train.input_pipeline, '_to_global', lambda batch, *args: to_global(
        {**batch, 'latent_mean': batch['latent_mean'] * np.float16(np.nan if next(numbers) > 4 else 1)}, *args))
    numbers = itertools.count(1)
    with pytest.raises(train_log.NonFiniteError, match='at step 7 .*, 3 steps in a row; the checkpoint of step 6 is unt'):
        train.train(tiny_run.make_config(total_steps=9, validate_every=0, max_skipped=2), workdir)


def test_log_says_where_the_time_went_and_the_steps_asked_for_are_profiled(workdir, monkeypatch):
    calls = []  # the real profiler crashed once in a process that had done many other things
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append(folder))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
    train.train(tiny_run.make_config(total_steps=8, validate_every=0, checkpoint_every=0, log_every=4, profile_steps=(3, 4)),
                workdir)
    line = [line for line in lines(workdir) if 'loss' in line][-1]
    assert line['step'] == 8 and line['host_peak_gib'] > 0.1
    parts = line['data_s'] + line['dispatch_s'] + line['device_s']
    assert 0 < parts <= 1 / line['steps_per_s'] and line['data_wait_longest_s'] >= line['data_wait_s'] >= 0
    assert line['data_wait_s'] <= line['data_s']
    model = tiny_run.build_network(None, Sequence(**tiny_run.make_config().sequence))
    operations = 8 * flops.training(model, Sequence(**tiny_run.make_config().sequence))
    np.testing.assert_allclose(line['model_tflops_per_s'], operations * line['steps_per_s'] / 1e12, rtol=1e-5)
    assert calls == [str(workdir / 'profile'), 'stop']
    with pytest.raises(ValueError, match='config.train.profile_steps'):
        train_log.Profile(workdir, (4, 3))
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    train_log.Profile(workdir, (3, 4)).before(3)
    assert calls[2:] == [str(workdir / 'profile' / 'process_0')]


def test_a_profile_begins_with_the_first_of_its_steps_that_is_run(tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(jax.profiler, 'start_trace', lambda folder: calls.append('start'))
    monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: calls.append('stop'))
    resumed, behind = train_log.Profile(tmp_path, (3, 5)), train_log.Profile(tmp_path, (3, 5))
    for step in (4, 5, 6):
        resumed.before(step)
        resumed.after(step, None)
    behind.before(6)
    resumed.close()
    behind.close()
    assert calls == ['start', 'stop']
    assert capsys.readouterr().err.count('no profile: none of the steps 3 to 5 (config.train.profile_steps) was run') == 1


def test_waiting_for_data_is_told(workdir, monkeypatch):
    to_global = train.input_pipeline._to_global
    monkeypatch.setattr(train.input_pipeline, '_to_global', lambda *args: time.sleep(0.2) or to_global(*args))
    train.train(tiny_run.make_config(total_steps=6, validate_every=0, checkpoint_every=0, log_every=5), workdir)
    line = next(line for line in lines(workdir) if 'loss' in line)
    assert 0.1 < line['data_wait_s'] <= line['data_wait_longest_s'] < 1 and line['data_wait_s'] <= line['data_s']


@pytest.mark.parametrize('section, name, value, message', [
    ('train', 'total_steps', 0, 'config.train.total_steps is 0; it must be at least 1'),
    ('train', 'keep_last', 0, 'config.train.keep_last is 0; it must be at least 1'),
    ('train', 'checkpoint_every', -3, 'config.train.checkpoint_every is -3; it must be at least 0'),
    ('input', 'prefetch', -1, 'config.input.prefetch is -1; it must be at least 0'),
    ('flow', 'video_dropout', 1.5, 'config.flow.video_dropout is 1.5; it must be from 0 to 1'),
    ('optimizer', 'learning_rate', float('nan'), 'config.optimizer.learning_rate is nan; it must be at least 0'),
    ('optimizer', 'clip_norm', 0.0, 'config.optimizer.clip_norm is 0.0; it must be at least 1e-12'),
    ('ema', 'sigma_rels', (), 'config.ema.sigma_rels is empty'),
    ('ema', 'synthesis_sigma_rel', 0.9, 'EMA width sigma_rel 0.9 is not between 0 and'),
])
def test_what_would_leave_nothing_is_refused_before_the_first_step(workdir, section, name, value, message):
    config = tiny_run.make_config()
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        train.train(config, workdir)
    assert not (workdir / 'checkpoints').exists()


def test_microbatches_must_divide_the_batch(workdir):
    with pytest.raises(ValueError, match='config.train.microbatches is 3'):
        train.train(tiny_run.make_config(microbatches=3), workdir)


def test_the_empty_string_is_encoded_with_the_official_weights_of_the_config(workdir, monkeypatch):
    config = tiny_run.make_config(total_steps=1)
    config.weights.folder, config.weights.dtype = 'official', 'bfloat16'

    def stop(name, sequence, load):
        raise RuntimeError(f'{load.func.__name__} {load.keywords}')

    monkeypatch.setattr(train.encoders, 'make', stop)
    with pytest.raises(RuntimeError, match="load {'dtype': 'bfloat16', 'cache': None, 'folder': 'official', 'offline': False"):
        train.train(config, workdir)


def test_resuming_with_another_config_names_the_field(workdir):
    train.train(tiny_run.make_config(total_steps=3), workdir)
    config = tiny_run.make_config(total_steps=6)
    config.optimizer.weight_decay = 0.1
    with pytest.raises(checkpoints.CheckpointError, match='config.optimizer.weight_decay is 0.1, but .* made with 1e-06'):
        train.train(config, workdir)


def test_rules_that_do_not_fit_the_sampler_are_refused_before_training(workdir):
    config = tiny_run.make_config(total_steps=4, sample_every=4)
    sounds = np.random.default_rng(0).normal(size=(4, Sequence(**config.sequence).waveform_length)).astype(np.float32) / 10
    codec.fit_pca([sounds], Sequence(**config.sequence), workdir / 'records' / 'codec.npz')
    config.sharding.activations = (('/hidden$', (('data', 'fsdp'), None, None)),)
    config.sampling.solver = 'dopri5'  # whose batch is the two versions of a clip
    with pytest.raises(ValueError, match='does not divide the dimension 2 of the result of hidden'):
        train.train(config, workdir)
    assert not (workdir / 'logs').exists()


def test_told_to_stop_at_the_last_step_it_says_that_something_is_left(workdir, monkeypatch, capfd):
    config = tiny_run.make_config(total_steps=2)
    with monkeypatch.context() as told:
        asked = itertools.count()
        told.setattr(checkpoints.Checkpointer, 'preempted', lambda self: next(asked) == 2)
        with pytest.raises(SystemExit):
            train.train(config, workdir)
    assert 'told to stop: saved step 2' in capfd.readouterr().out and not (workdir / 'ema').exists()
    train.train(config, workdir)
    assert steps_of(workdir / 'ema') == [2]


@pytest.mark.parametrize('during, kept', [('the preparation', []), ('the pass', [0])])
def test_told_to_stop_before_the_first_step(workdir, monkeypatch, capfd, during, kept):
    """The pass over all records is not begun, or not done again."""
    where, name = (train, '_validation') if during == 'the preparation' else (input_pipeline, 'latent_statistics')
    before = getattr(where, name)
    with monkeypatch.context() as told:
        told.setattr(where, name, lambda *args: os.kill(os.getpid(), signal.SIGTERM) or before(*args))
        if not kept:
            told.setattr(input_pipeline, 'latent_statistics', lambda *_: pytest.fail('read every record'))
        with pytest.raises(SystemExit) as stopped:
            train.train(tiny_run.make_config(total_steps=1), workdir)
    assert stopped.value.code == 0 and steps_of(workdir / 'checkpoints') == kept
    assert ('told to stop before there was anything to save' in capfd.readouterr().out) == (not kept)
    if kept:
        monkeypatch.setattr(input_pipeline, 'latent_statistics', lambda *_: pytest.fail('read every record again'))
    train.train(tiny_run.make_config(total_steps=1), workdir)
    assert steps_of(workdir / 'checkpoints')[-1] == 1


@pytest.mark.parametrize('field, value, message', [
    ('input.validation_batch_size', 0, 'config.input.validation_batch_size is 0'),
    ('input.validation_examples', 0, 'config.input.validation_examples is 0'),
    ('input.validation', 'nowhere', 'nowhere: no such record set'),
    ('train.profile_steps', (5,), 'config.train.profile_steps'),
    ('optimizer.schedule', 'none', 'schedule'),
    ('train.microbatches', 0, 'config.train.microbatches is 0'),
])
def test_mistakes_are_found_before_all_records_are_read(workdir, monkeypatch, field, value, message):
    monkeypatch.setattr(train.input_pipeline, 'latent_statistics', lambda *args: pytest.fail('read every record'))
    config = tiny_run.make_config(total_steps=4)
    config.update_from_flattened_dict({field: value})
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, workdir)
    assert not (workdir / 'logs').exists()


@pytest.mark.parametrize('devices', [1, 3, 8])
@pytest.mark.parametrize('size', [2, 8])
def test_validation_loss_depends_neither_on_batches_nor_on_the_mesh(workdir, devices, size):
    """Seven examples; the rows that fill a batch up do not count."""
    config = tiny_run.make_config()
    config.input.update(validation_batch_size=size, validation_examples=7)
    sequence = Sequence(**config.sequence)
    model = tiny_run.build_network(None, sequence)
    mesh = partitioning.make_mesh({'data': -1}, devices=jax.devices()[:devices])
    inputs = (np.zeros((1, length, width), np.float32) for length, width in (
        (sequence.latent_length, 20), (sequence.clip_length, 1024), (sequence.sync_length, 768), (77, 1024)))
    params = model.init(jax.random.key(0), next(inputs), np.zeros(1), *inputs)['params']
    params = {**params, 'latent_std': jnp.ones((1, 1, 20))}
    loss = train._validation(config, model, workdir / 'records', mesh)(params)
    examples = list(input_pipeline.read_split(config, workdir / 'records', 'bells', 'validation'))[:7]
    batch = {name: np.stack([example[name] for example in examples]) for name in input_pipeline.BATCH_FIELDS}
    expected = train_step.make_validation_step(config, model)(params, batch, np.arange(7, dtype=np.int32)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-6)


def test_when_the_next_batch_cannot_be_read_the_step_is_kept(workdir, tmp_path_factory, monkeypatch, capfd):
    """And the run that goes on after it ends as if nothing had been."""
    config = tiny_run.make_config(total_steps=5, checkpoint_every=0, validate_every=0)
    read = input_pipeline._Batches.__getitem__

    def broken(self, index):
        if self._first + index == 3 + config.input.prefetch:
            raise ValueError('bells: record 3 cannot be read')
        return read(self, index)

    with monkeypatch.context() as damaged:
        damaged.setattr(input_pipeline._Batches, '__getitem__', broken)
        for _ in range(2):  # the second time there is nothing to save
            with pytest.raises(ValueError, match='bells: record 3 cannot be read'):
                train.train(config, workdir)
            assert steps_of(workdir / 'checkpoints') == [3]
    assert capfd.readouterr().out.count('the batch after step 3 cannot be read: saved this step in') == 1
    undisturbed = tmp_path_factory.mktemp('undisturbed')
    config.data_dir = str(workdir)
    for folder in (workdir, undisturbed):
        train.train(config, folder)
    jax.tree.map(np.testing.assert_array_equal, *(snapshots.load_params(folder)[0] for folder in (workdir, undisturbed)))
    for folder in (workdir, undisturbed):
        assert sum(line['steps'] for line in lines(folder) if 'loss' in line) == 5


def test_log_after_a_resume_has_every_step_once(tmp_path):
    config = tiny_run.make_config(log_every=2, max_skipped=1)
    metrics = lambda step: {'loss': jnp.float32(np.nan if step == 3 else step), 'grad_norm': jnp.float32(2),
                            'learning_rate': jnp.float32(3)}
    log = train_log.TrainLog(tmp_path, config, 0, 1e9)
    for step in range(1, 8):
        log.add(step, metrics(step))
    log.write(6, {'validation_loss': 0.5})
    log.close()
    with (tmp_path / 'logs' / 'metrics.jsonl').open('a') as file:
        file.write('{"step": 8, "lo')  # killed while it wrote
    log = train_log.TrainLog(tmp_path, config, 5, 1e9)
    assert not log.has(6, 'validation_loss') and log.has(4, 'loss')
    for step in range(6, 9):
        log.add(step, metrics(step))
    log.close()
    found = [(line['step'], line['steps'], line['loss'], line['skipped']) for line in lines(tmp_path)]
    assert found == [(2, 2, 1.5, 0), (4, 2, 4.0, 1), (6, 1, 6.0, 0), (8, 2, 7.5, 0)]  # means of the steps that count


def test_a_step_is_sent_before_the_metrics_of_the_last_one_are_read(tmp_path):
    done = []
    config = tiny_run.make_config(total_steps=3, validate_every=0)
    config.ema.snapshot_every = 0

    def step(state, batch):
        done.append(f'step {batch}')
        return state, {'loss': types.SimpleNamespace(is_ready=lambda: False)}

    nothing = lambda *_, **__: None
    log = types.SimpleNamespace(add=lambda number, _: done.append(f'add {number}'), pause=contextlib.nullcontext, say=nothing,
                                spent=nothing, close_interval=nothing, settle=nothing)
    asked = itertools.count()
    checkpointer = types.SimpleNamespace(preempted=lambda: next(asked) == 3, should_save=lambda number: number == 3,
                                         save=lambda number, *_: done.append(f'save {number}'), wait=nothing, directory='')
    profile = types.SimpleNamespace(before=nothing, after=nothing)
    job = types.SimpleNamespace(config=config, workdir=tmp_path, iterator=iter(range(1, 4)), checkpointer=checkpointer, log=log,
                                step=step, profile=profile)
    assert train._loop(job, {'param': jnp.zeros(1)}, 0)
    assert done == ['step 1', 'step 2', 'add 1', 'step 3', 'add 2', 'add 3', 'save 3']


@pytest.mark.parametrize('seconds, text', [(0.2, '1 s'), (59, '59 s'), (250, '4 min 10 s'), (11_100, '3 h 05 min'),
                                           (200_000, '2 d 7 h')])
def test_durations_read_well(seconds, text):
    assert train_log.duration(seconds) == text


def test_progress_line():
    values = {'loss': 0.81234, 'steps_per_s': 6.7, 'examples_per_s': 53.6}
    assert train_log.progress_line(1325, 3000, values) == (
        'step 1 325/3 000  loss 0.8123  6.7 steps/s  53.6 examples/s  4 min 10 s left')


def test_training_begins_with_given_weights(workdir, tmp_path_factory, monkeypatch):
    """The averages of another run, with their statistics; they change no more once there is a checkpoint."""
    train.train(tiny_run.make_config(total_steps=4), workdir)
    config, second = tiny_run.make_config(total_steps=2, checkpoint_every=1), tmp_path_factory.mktemp('second')
    config.weights.start_from, config.data_dir = str(workdir), str(workdir)
    config.optimizer.learning_rate = 0.0
    monkeypatch.setattr(input_pipeline, 'latent_statistics', lambda *_: pytest.fail('the statistics are the network\'s own'))
    train.train(config, second)
    given, found = (snapshots.load_params(folder)[0] for folder in (workdir, second))
    jax.tree.map(np.testing.assert_array_equal, given, found)
    assert np.any(given['latent_mean'])
    config.train.total_steps = 3
    monkeypatch.setattr(train.pretrained, 'to_train_on', lambda *_: pytest.fail('there is a checkpoint'))
    train.train(config, second)
    config.weights.start_from = ''
    with pytest.raises(checkpoints.CheckpointError, match='weights.start_from'):
        train.train(config, second)


@pytest.mark.parametrize('changes, message', [
    ({'sequence.rate': '44k', 'model.variant': 'small_44k'}, "with sequence.rate '16k', and config.sequence.rate is '44k'"),
    ({'extract.codec': 'official'}, "with extract.codec 'pca', and config.extract.codec is 'official'"),
    ({'weights.start_from': 'nowhere'}, "'nowhere' is neither an official network .* nor a folder"),
])
def test_weights_of_another_network_are_refused_by_field(tmp_path, monkeypatch, changes, message):
    trained_run.use_network(monkeypatch)
    config = trained_run.make(tmp_path)
    config.weights.start_from = str(tmp_path)
    for field, value in changes.items():
        section, name = field.split('.')
        config[section][name] = value
    with pytest.raises(ValueError, match=message):
        train.pretrained.to_train_on(config, tiny_run.Network(20), tmp_path)
