"""Which examples a batch holds, in which order, over hosts, workers, epochs and restarts."""
import itertools
import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from configs import base
from mmaudio_jax import input_pipeline
from mmaudio_jax import partitioning
from mmaudio_jax import records
from tests import records_test
from tests.impacts_test import is_running

ROOT = pathlib.Path(__file__).parents[1]
TRAIN, SOUNDS = 21, 6  # examples; records_test numbers them through, and latent_mean[0, 0] below is that number


def write_numbered(folder, first: int, lengths: dict, **made_with) -> None:
    """A set whose example k has latent_mean = k in channel 0."""
    folder.mkdir(parents=True)
    number = itertools.count(first)
    for split, length in lengths.items():
        examples = [records_test.make_example(next(number)) for _ in range(length)]
        for example in examples:
            example['latent_mean'][:, 0] = int(example['id'].split('-')[1])
        path = folder / records.shard_name(folder.name, split, 0, 1)
        records.write_shard(path, map(records_test.SCHEMA.encode, examples))
    lengths = {split: [length] for split, length in lengths.items()}
    records.write_metadata(folder, folder.name, records_test.SCHEMA, lengths, made_with)


@pytest.fixture(name='folder', scope='module')
def fixture_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp('records')
    write_numbered(folder / 'clips', 0, {'train': TRAIN, 'validation': 11})
    write_numbered(folder / 'sounds', 100, {'train': SOUNDS})
    return folder


def make_config(**changes):
    config = base.get_config()
    config.sequence.duration_s = records_test.SCHEMA.duration_s
    config.extract.encoder, config.extract.codec = 'pixels', 'pca'
    config.input.mixture = (('clips', 2), ('sounds', 1))
    config.input.validation = config.input.statistics = 'clips'
    config.input.batch_size = config.input.validation_batch_size = 8
    config.input.workers = 0
    config.input.update(changes)
    return config


def make_mesh():
    return partitioning.make_mesh({'data': -1})


def numbers(batch) -> list[int]:
    return np.asarray(batch['latent_mean'][:, 0, 0]).astype(int).tolist()


def take(iterator, count: int) -> list[list[int]]:
    return [numbers(next(iterator)) for _ in range(count)]


def write_labelled(folder: pathlib.Path) -> None:
    """18 clips of rain, 6 of a bell."""
    write_numbered(folder, 0, {'train': 24, 'validation': 8})
    labels = ['rain'] * 18 + ['bell'] * 6
    lines = [json.dumps({'id': f'clip-{number:03d}', 'split': 'train', 'label': label}) for number, label in enumerate(labels)]
    (folder / 'clips.jsonl').write_text('\n'.join(lines) + '\n')


def test_balanced_sets_are_read_by_their_weights(tmp_path):
    write_labelled(tmp_path / 'clips')
    config = make_config(mixture=(('clips', 1),), balance=(('clips', 1.0),))
    counts = np.bincount(np.concatenate(take(input_pipeline.train_iterator(config, tmp_path, make_mesh()), 3)), minlength=24)
    assert counts.sum() == 24 and counts[:18].sum() == 12 and counts[:18].max() == 1 and (counts[18:] == 2).all()
    config.input.shares = (('clips', 0.5),)
    with pytest.raises(ValueError, match="config.input.balance and config.input.shares both name 'clips'"):
        input_pipeline.train_iterator(config, tmp_path, make_mesh())


def test_an_epoch_holds_the_mixture_and_the_next_is_another_order(folder):
    iterator = input_pipeline.train_iterator(make_config(), folder, make_mesh())
    batches = (2 * TRAIN + SOUNDS) // 8
    first, second = take(iterator, batches), take(iterator, batches)
    counts = np.bincount(np.concatenate(first), minlength=106)
    assert counts.sum() == 48 == 2 * TRAIN + SOUNDS  # this epoch has no remainder
    np.testing.assert_array_equal(counts[:TRAIN], 2)
    np.testing.assert_array_equal(counts[100:], 1)
    assert first != second and sorted(np.concatenate(first)) == sorted(np.concatenate(second))
    assert len({n >= 100 for n in first[0] + first[1] + first[2]}) == 2  # mixed, not one set after the other
    iterator.close()


def test_shares_are_spread_over_the_set_and_captions_can_be_left_out(folder):
    config = make_config(mixture=(('clips', 1), ('sounds', 3)), shares=(('clips', 1 / 3), ), without_text=('sounds', ))
    iterator = input_pipeline.train_iterator(config, folder, make_mesh())
    epoch = [next(iterator) for _ in range(6)]  # two epochs of 25, but for two examples: none is missed in both
    seen = sorted({(number, bool(text)) for batch in epoch for number, text in zip(numbers(batch), batch['text_exists'])})
    with_text = {int(example['id'].split('-')[1]): bool(example['text_exists'])
                 for example in input_pipeline.read_split(make_config(), folder, 'clips', 'train')}
    assert seen == [(n, with_text[n]) for n in range(0, TRAIN, 3)] + [(n, False) for n in range(100, 106)]
    iterator.close()


def test_remainder_is_left_out(folder):
    iterator = input_pipeline.train_iterator(make_config(mixture=(('clips', 1), )), folder, make_mesh())
    for epoch in range(3):
        seen = np.concatenate(take(iterator, TRAIN // 8))
        assert len(set(seen)) == TRAIN // 8 * 8, epoch  # no example twice
    iterator.close()


def test_batches_are_global_arrays_of_the_stored_dtype(folder):
    mesh = make_mesh()
    iterator = input_pipeline.train_iterator(make_config(), folder, mesh)
    batch = next(iterator)
    assert set(batch) == set(input_pipeline.BATCH_FIELDS)
    for name, shape in records_test.SCHEMA.shapes.items():
        assert batch[name].shape == (8, *shape) and batch[name].dtype == np.float16
        assert batch[name].sharding.is_equivalent_to(partitioning.batch_sharding(mesh), batch[name].ndim)
    assert batch['video_exists'].dtype == bool
    expected = [records_test.make_example(n)['video_exists'] for n in numbers(batch)]
    np.testing.assert_array_equal(batch['video_exists'], expected)
    iterator.close()


@pytest.mark.parametrize('consumed', [0, 1, 5, 6, 17])
def test_resume_continues_with_the_very_next_batch(folder, consumed):
    iterator = input_pipeline.train_iterator(make_config(prefetch=3), folder, make_mesh())
    take(iterator, consumed)
    state = json.loads(json.dumps(iterator.get_state()))
    expected = take(iterator, 8)
    resumed = input_pipeline.train_iterator(make_config(prefetch=1), folder, make_mesh())
    next(resumed)
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert take(resumed, 8) == expected
    iterator.close()
    resumed.close()


def test_worker_processes_give_the_same_batches(folder):
    threads = input_pipeline.train_iterator(make_config(), folder, make_mesh())
    next(threads)
    processes = input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())
    processes.set_state(threads.get_state())
    assert take(processes, 6) == take(threads, 6)
    mapped = lambda: '/dev/shm/psm_' in pathlib.Path('/proc/self/maps').read_text()
    assert mapped()
    processes.close()
    threads.close()
    until = time.monotonic() + 5
    while mapped() and time.monotonic() < until:  # Grain's thread unlinks it
        time.sleep(0.01)
    assert not mapped(), 'shared memory that is left at the end is told as leaked'


def test_a_reader_that_was_killed_is_named_with_its_records(folder):
    iterator = input_pipeline.train_iterator(make_config(workers=1, prefetch=0), folder, make_mesh())
    next(iterator)
    before = iterator.get_state()
    (reader,) = [child for child in multiprocessing.active_children() if child.name.startswith('grain')]
    reader.kill()
    with pytest.raises(OSError, match=r'the records of clips, sounds .* exit code -9 \(.*config.input.workers=0'):
        for _ in range(9):
            before = iterator.get_state()
            next(iterator)
    assert iterator.get_state() == before
    iterator.close()


def test_workers_that_shared_memory_has_no_room_for_are_refused(folder, monkeypatch):
    """They would be killed in the middle of the run. The bound is what they hold when the device is slower: four batches of
    each reader, one on its way, and on CPUs those that are read ahead; all this for every process of the host."""
    batch = sum(value.nbytes for value in records_test.SCHEMA.parse(
        records_test.SCHEMA.encode(records_test.make_example(0))).values() if isinstance(value, np.ndarray)) * 8
    room = types.SimpleNamespace(f_frsize=1, f_bavail=(9 + make_config().input.prefetch) * batch)
    monkeypatch.setattr(input_pipeline.os, 'statvfs', lambda path: room)
    input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())
    with monkeypatch.context() as patch:
        patch.setattr(input_pipeline.multihost_utils, 'process_allgather', lambda own: np.array([own, own + 1, own]))
        with pytest.raises(ValueError, match='config.input.workers is 2'):
            input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())
        room.f_bavail *= 2
        input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())
        room.f_bavail //= 2
    room.f_bavail -= 64 * 2**10
    with pytest.raises(ValueError, match=r'config.input.workers is 2: .*docker: --shm-size=1g.*config.input.workers=0'):
        input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())
    input_pipeline.train_iterator(make_config(workers=0), folder, make_mesh())
    monkeypatch.setattr(input_pipeline, '_SHARED_MEMORY', '/not/there')  # as on macOS
    input_pipeline.train_iterator(make_config(workers=2), folder, make_mesh())


@pytest.mark.parametrize('hosts', [2, 4])
def test_hosts_share_every_batch(folder, monkeypatch, hosts):
    """Each host reads only its rows; together they are the batch that one host would read."""
    one = input_pipeline.train_iterator(make_config(), folder, make_mesh())
    expected = take(one, 8)
    one.close()
    share = 8 // hosts
    parts = []
    # One process cannot be several; what differs between hosts is only which rows their devices hold.
    monkeypatch.setattr(input_pipeline, '_to_global', lambda batch, *_: batch)
    for host in range(hosts):
        rows = list(range(host * share, (host + 1) * share))
        monkeypatch.setattr(input_pipeline, '_local_rows', lambda *_, rows=rows: rows)
        iterator = input_pipeline.train_iterator(make_config(), folder, make_mesh())
        parts.append(take(iterator, 8))
        assert iterator.get_state() == {**one.get_state(), 'next_batch': 8}
        iterator.close()
    assert [sum(batches, []) for batches in zip(*parts)] == expected


def test_local_rows_are_those_of_the_devices():
    mesh = make_mesh()
    assert input_pipeline._local_rows(partitioning.batch_sharding(mesh), 16) == list(range(16))
    assert input_pipeline._local_rows(partitioning.replicated(mesh), 16) == list(range(16))
    places = {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(0, 2),)}  # two of these devices hold the same rows
    some = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: places)
    assert input_pipeline._local_rows(some, 16) == [0, 1, 4, 5]


@pytest.mark.parametrize('field, changes', [('seed', {}), ('batch_size', {'batch_size': 16}),
                                            ('mixture', {'mixture': (('clips', 3), )})])
def test_state_of_another_order_is_refused(folder, field, changes):
    state = input_pipeline.train_iterator(make_config(), folder, make_mesh()).get_state()
    config = make_config(**changes)
    config.seed += field == 'seed'
    with pytest.raises(ValueError, match=f'made with {field} ='):
        input_pipeline.train_iterator(config, folder, make_mesh()).set_state(state)


def test_the_seed_of_the_config_decides_the_order(folder):
    orders = []
    for seed in (3, 3, 4):
        config = make_config()
        config.seed = seed
        orders.append(numbers(next(input_pipeline.train_iterator(config, folder, make_mesh()))))
    assert orders[0] == orders[1] != orders[2]


def test_state_of_a_balanced_run_fits_no_other(tmp_path):
    write_labelled(tmp_path / 'clips')
    configs = (make_config(mixture=(('clips', 1),), balance=balance) for balance in ((('clips', 1.0),), ()))
    balanced, plain = (input_pipeline.train_iterator(config, tmp_path, make_mesh()) for config in configs)
    for iterator, other in ((plain, balanced), (balanced, plain)):
        with pytest.raises(ValueError, match='made with balance ='):
            iterator.set_state(other.get_state())
        iterator.set_state(iterator.get_state())


def test_validation_is_the_same_in_every_pass(folder):
    batches = input_pipeline.validation_batches(make_config(), folder, make_mesh())
    assert len(batches) == 2 and batches.count == 11
    expected = list(range(TRAIN, TRAIN + 11)) + 5 * [TRAIN + 10]
    assert [numbers(b) for b in batches] == [numbers(b) for b in batches] == [expected[:8], expected[8:]]


@pytest.mark.parametrize('asked, size', [(1, 8), (9, 16), (64, 16)])
def test_validation_batches_are_rounded_up_and_hold_every_example(folder, asked, size):
    """Eight devices and eleven examples: no more rows than are needed."""
    batches = input_pipeline.validation_batches(make_config(validation_batch_size=asked), folder, make_mesh())
    rows = [number for batch in batches for number in numbers(batch)]
    assert batches.batch_size == size and len(rows) == 16 and rows[:11] == list(range(TRAIN, TRAIN + 11))


def test_read_split_keeps_ids_and_order(folder):
    examples = list(input_pipeline.read_split(make_config(), folder, 'clips', 'validation'))
    assert [example['id'] for example in examples] == [f'clip-{n:03d}' for n in range(TRAIN, TRAIN + 11)]


def test_latent_statistics_match_numpy(folder):
    mean, std = input_pipeline.latent_statistics(make_config(), folder)
    source = records.load_source(folder / 'clips', 'train', records_test.SCHEMA)
    latents = np.concatenate([source[i]['latent_mean'] for i in range(len(source))]).astype(np.float64)
    np.testing.assert_allclose(mean, latents.mean(axis=0), atol=1e-6)  # measured: 4e-9
    np.testing.assert_allclose(std, latents.std(axis=0), rtol=1e-6)  # measured: 6e-8
    assert mean.dtype == std.dtype == np.float32 and mean.shape == (20, )


@pytest.mark.parametrize('changes, message', [
    ({'mixture': (('drums', 1), )}, 'drums: no such record set'),
    ({'mixture': ()}, 'mixture is empty'),
    ({'mixture': (('clips', 0), )}, '0 repeats'),
    ({'shares': (('clips', 1.5), )}, "'clips' has the share 1.5"),
    ({'without_text': ('drums', )}, 'without_text names drums'),
    ({'batch_size': 64}, 'has only 48 examples'),
    ({'batch_size': 12}, 'config.input.batch_size is 12'),
])
def test_what_cannot_train_is_refused(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        input_pipeline.train_iterator(make_config(**changes), folder, make_mesh())


@pytest.mark.parametrize('changes, message', [
    ({'validation_batch_size': 0}, 'config.input.validation_batch_size is 0; it must be at least 1'),
    ({'validation_examples': 0}, 'nothing to validate on.* has 11 examples .* config.input.validation_examples is 0'),
])
def test_validation_without_rows_is_refused(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        input_pipeline.validation_batches(make_config(**changes), folder, make_mesh())


def test_sets_of_two_codecs_do_not_mix(tmp_path):
    for i, name in enumerate(('clips', 'sounds')):
        write_numbered(tmp_path / name, 100 * i, {'train': TRAIN}, codec_fitted_to={'dataset': name, 'table': 'abc'})
    with pytest.raises(ValueError, match="mixture: .* of 'clips' .* fitted to .*'clips'.* of 'sounds' .* fitted to .*'sounds'"):
        input_pipeline.train_iterator(make_config(), tmp_path, make_mesh())


@pytest.mark.parametrize('field', ['statistics', 'validation'])
def test_sets_beside_the_mixture_are_of_its_codec(tmp_path, field):
    for i, (name, dataset) in enumerate({'clips': 'clips', 'sounds': 'clips', 'others': 'others'}.items()):
        write_numbered(tmp_path / name, 100 * i, {'train': TRAIN, 'validation': 8}, codec_fitted_to={'dataset': dataset})
    for harmless in ('sounds', 'nowhere', ''):  # those that are missing are said by who reads them
        input_pipeline.train_iterator(make_config(**{field: harmless}), tmp_path, make_mesh())
    with pytest.raises(ValueError, match=f"input.{field}: .* of 'clips' .* fitted to .*'clips'.* of 'others' .* fitted to"):
        input_pipeline.train_iterator(make_config(**{field: 'others'}), tmp_path, make_mesh())


def test_a_constant_channel_is_refused(tmp_path):
    records_test.write_set(tmp_path / 'clips', {'train': [1]})
    folder = tmp_path / 'flat'
    folder.mkdir()
    example = records_test.make_example(0)
    example['latent_mean'][:, 3] = 0.5
    records.write_shard(folder / records.shard_name('flat', 'train', 0, 1), [records_test.SCHEMA.encode(example)])
    records.write_metadata(folder, 'flat', records_test.SCHEMA, {'train': [1]}, {})
    with pytest.raises(ValueError, match=r'latent channels \[3\] never change'):
        input_pipeline.latent_statistics(make_config(statistics='flat'), tmp_path)


READ = '''
import multiprocessing, pathlib, sys, time
from mmaudio_jax import input_pipeline, partitioning
from tests import input_pipeline_test
if __name__ == '__main__':
    config = input_pipeline_test.make_config(workers=2, prefetch=0)
    iterator = input_pipeline.train_iterator(config, pathlib.Path(sys.argv[1]), partitioning.make_mesh({'data': -1}))
    for _ in range(2):  # of each reader
        next(iterator)
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    sys.stdin.readline()
    for _ in range(20):
        next(iterator)
    print('read on', flush=True)
    if sys.argv[2] == 'close':
        iterator.close()
    elif sys.argv[2] == 'kill':
        time.sleep(600)
    elif sys.argv[2] == 'raise':
        raise ValueError('the end')
    sys.exit(3)
'''


@pytest.mark.slow  # 8 s each
@pytest.mark.parametrize('end, code', [('close', 3), ('exit', 3), ('raise', 1), ('kill', -signal.SIGKILL)])
def test_readers_outlive_signals_but_not_the_run(folder, tmp_path, end, code):
    """However it ends; those that ended by signals of their own left no batch for the save that the signals ask for."""
    script = tmp_path / 'read.py'
    script.write_text(READ)
    with subprocess.Popen([sys.executable, str(script), str(folder), end], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          text=True, cwd=ROOT, env={**os.environ, 'PYTHONPATH': str(ROOT)}) as run:
        readers = [int(pid) for pid in run.stdout.readline().split()]
        for pid, number in itertools.product(readers, (signal.SIGINT, signal.SIGTERM)):
            os.kill(pid, number)
        run.stdin.write('\n')
        run.stdin.flush()
        assert len(readers) == 2 and run.stdout.readline() == 'read on\n'
        if end == 'kill':
            run.kill()
        assert run.wait(30) == code
    until = time.monotonic() + 5
    while any(map(is_running, readers)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(map(is_running, readers))


HALF_A_MILLION = 1954 * 256


def write_many(folder, shards: int) -> None:
    """A set of `shards` files of 256 examples each, all of them the same file of zeros."""
    folder.mkdir(parents=True)
    example = {name: np.zeros(shape, np.float32) for name, shape in records_test.SCHEMA.shapes.items()}
    example.update(id='zero', caption='', duration_s=records_test.SCHEMA.duration_s, video_exists=True, text_exists=False)
    first = folder / records.shard_name(folder.name, 'train', 0, shards)
    records.write_shard(first, [records_test.SCHEMA.encode(example)] * 256)
    for shard in range(1, shards):
        (folder / records.shard_name(folder.name, 'train', shard, shards)).hardlink_to(first)
    records.write_metadata(folder, folder.name, records_test.SCHEMA, {'train': [256] * shards}, {})


START = '''
import pathlib, resource, sys, time
import jax
from mmaudio_jax import input_pipeline, partitioning
from tests import input_pipeline_test
config = input_pipeline_test.make_config(mixture=((sys.argv[2], 1),), prefetch=1)
mesh = partitioning.make_mesh({'data': -1})
started = time.monotonic()
iterator = input_pipeline.train_iterator(config, pathlib.Path(sys.argv[1]), mesh)
next(iterator)
seconds = time.monotonic() - started
for _ in range(100):
    next(iterator)
iterator.close()
print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
'''


@pytest.mark.slow  # 20 s
def test_half_a_million_records_start_at_once_and_cost_no_memory(tmp_path):
    """Only indices are shuffled, and files are opened when they are read."""
    write_many(tmp_path / 'few', 4)
    write_many(tmp_path / 'many', HALF_A_MILLION // 256)
    printed = [subprocess.run([sys.executable, '-c', START, str(tmp_path), name], capture_output=True, text=True, check=True,
                              cwd=ROOT).stdout for name in ('few', 'many')]
    (few_s, few_mib), (many_s, many_mib) = (map(float, text.split()) for text in printed)
    print(f'first batch after {few_s:.2f} s and {many_s:.2f} s; peak {few_mib:.0f} MiB and {many_mib:.0f} MiB')
    assert many_s < 5
    assert many_mib - few_mib < 100


def test_records_that_were_extracted_again_are_not_those_of_the_checkpoint(tmp_path):
    for name, tables in (('before', 'of these clips'), ('after', 'of others')):
        write_numbered(tmp_path / name / 'clips', 0, {'train': TRAIN}, tables=tables)
    before, after = (input_pipeline.train_iterator(make_config(mixture=(('clips', 1),)), tmp_path / name, make_mesh())
                     for name in ('before', 'after'))
    with pytest.raises(ValueError, match='the records of clips are others than those of the checkpoint'):
        after.set_state(before.get_state())
    state = before.get_state()
    del state['made_with']  # of a checkpoint before this was noted
    after.set_state(state)
