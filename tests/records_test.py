"""One example's bytes, the folder of a set, and what is said when they do not fit."""
import dataclasses
import json
import os
import pathlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mmaudio_jax import media
from mmaudio_jax import records
from tests import full_disk

ROOT = pathlib.Path(__file__).parents[1]
SCHEMA = records.Schema(rate='16k', duration_s=1.0, feature_dtype='float16', encoder='pixels', codec='pca')


def make_example(seed: int, schema: records.Schema = SCHEMA) -> dict:
    rng = np.random.default_rng(seed)
    example = {name: rng.normal(size=shape).astype(np.float32) for name, shape in schema.shapes.items()}
    example['text_features'][3:] = 0  # ends in zero bytes, which a string dtype would strip
    example.update(video_exists=seed % 3 != 0, text_exists=True)
    return {**example, 'id': f'clip-{seed:03d}', 'caption': f'a bell – {seed}', 'duration_s': schema.duration_s}


def write_set(folder, lengths: dict, schema: records.Schema = SCHEMA, name: str = 'bells') -> None:
    """A set whose examples are numbered through from 0."""
    folder.mkdir(parents=True)
    seed = 0
    for split, shards in lengths.items():
        for i, length in enumerate(shards):
            examples = [make_example(seed + j, schema) for j in range(length)]
            records.write_shard(folder / records.shard_name(name, split, i, len(shards)), map(schema.encode, examples))
            seed += length
    records.write_metadata(folder, name, schema, lengths, {'dataset': name})


@pytest.fixture(name='folder')
def fixture_folder(tmp_path):
    write_set(tmp_path / 'bells', {'train': [3, 2], 'test': [1]})
    return tmp_path / 'bells'


@pytest.mark.parametrize('dtype', ['float16', 'bfloat16'])
def test_round_trip_is_exact_in_the_stored_dtype(dtype):
    schema = dataclasses.replace(SCHEMA, feature_dtype=dtype)
    example = make_example(7, schema)
    data = schema.encode(example)
    parsed = schema.parse(data)
    for name in records.FEATURES:
        assert parsed[name].dtype == records.FEATURE_DTYPES[dtype]
        np.testing.assert_array_equal(parsed[name], example[name].astype(records.FEATURE_DTYPES[dtype]))
    for name in ('id', 'caption', 'video_exists', 'text_exists', 'duration_s'):
        assert parsed[name] == example[name]
    values = sum(np.prod(shape) for shape in schema.shapes.values())
    assert 2 * values < len(data) < 2 * values + 400  # two bytes a value


def test_set_is_read_by_index_and_survives_pickling(folder):
    source = pickle.loads(pickle.dumps(records.load_source(folder, 'train', SCHEMA)))
    assert len(source) == 5
    assert [source[i]['id'] for i in (4, 0, 3, 2, 1)] == [f'clip-{i:03d}' for i in (4, 0, 3, 2, 1)]


def test_tfds_reads_it_without_tensorflow(folder):
    code = ('import sys, tensorflow_datasets as tfds; '
            f'source = tfds.builder_from_directory({str(folder)!r}).as_data_source(split="train"); '
            'print(len(source), source[3]["id"].decode(), source[3]["sync_features"].shape, "tensorflow" in sys.modules)')
    output = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    assert output.split('\n')[0] == '5 clip-003 (16, 768) False'
    source = tfds.builder_from_directory(folder).as_data_source(split='test')
    expected = make_example(5)['text_features'].astype(np.float16)
    np.testing.assert_array_equal(source[0]['text_features'], expected)


@pytest.mark.parametrize('change, field', [({'duration_s': 2.0}, 'duration_s'), ({'rate': '44k'}, 'rate'),
                                           ({'encoder': 'official'}, 'encoder'), ({'codec': 'official'}, 'codec'),
                                           ({'feature_dtype': 'bfloat16'}, 'feature_dtype')])
def test_other_schema_is_refused(folder, change, field):
    with pytest.raises(ValueError, match=f'bells: {field} is '):
        records.load_source(folder, 'train', dataclasses.replace(SCHEMA, **change))


def test_other_version_is_refused(folder):
    path = folder / records.METADATA_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), 'format_version': 0}))
    with pytest.raises(ValueError, match='format_version is 0'):
        records.load_source(folder, 'train', SCHEMA)


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match='drums: no such record set'):
        records.load_source(tmp_path / 'drums', 'train', SCHEMA)
    with pytest.raises(ValueError, match="no split 'dev'; it has test, train"):
        records.load_source(folder, 'dev', SCHEMA)
    (folder / records.shard_name('bells', 'train', 1, 2)).unlink()
    with pytest.raises(FileNotFoundError, match='00001-of-00002: this shard is missing'):
        records.load_source(folder, 'train', SCHEMA)


def test_more_shards_than_files_that_may_be_open_are_refused(folder, monkeypatch):
    monkeypatch.setattr(records.resource, 'getrlimit', lambda _: (65, 65))
    with pytest.raises(ValueError, match='bells: 2 shards are read at once, but a process may have only 65 files open; raise'):
        records.load_source(folder, 'train', SCHEMA)

    def set_limit(_, limits):
        if limits[0] > most:
            raise ValueError('not allowed to raise maximum limit')
        allowed[0] = limits

    monkeypatch.setattr(records.resource, 'getrlimit', lambda _: allowed[0])
    monkeypatch.setattr(records.resource, 'setrlimit', set_limit)
    for hard, most in ((1000, 1000), (records.resource.RLIM_INFINITY, 10_240)):  # what the system says, and what it gives
        allowed = [(65, hard)]
        source = records.load_source(folder, 'train', SCHEMA)
        assert allowed == [(most, hard)]
    monkeypatch.setattr(source._schema.__class__, 'parse', lambda *_: (_ for _ in ()).throw(RuntimeError(os.strerror(24))))
    with pytest.raises(ValueError, match='bells: Too many open files; raise the limit .ulimit -n.$'):
        source[0]


def test_truncated_shard_is_named(folder):
    path = folder / records.shard_name('bells', 'train', 1, 2)
    path.write_bytes(path.read_bytes()[:60_000])
    with pytest.raises(ValueError, match='00001-of-00002: damaged or cut short'):
        records.load_source(folder, 'train', SCHEMA)


def test_a_record_whose_bytes_changed_is_named(folder):
    path = folder / records.shard_name('bells', 'train', 0, 2)
    content = bytearray(path.read_bytes())
    content[len(content) // 4] ^= 255
    path.write_bytes(content)
    source = records.load_source(folder, 'train', SCHEMA)
    with pytest.raises(ValueError, match='00000-of-00002: record [0-2] cannot be read'):
        [source[index] for index in range(3)]


@pytest.mark.parametrize('position, message', [(0, 'record 0 cannot be read'), (1, 'record 1 cannot be read')])
def test_record_that_does_not_fit_is_named(tmp_path, position, message):
    folder = tmp_path / 'bells'
    write_set(folder, {'train': [2]})
    good = SCHEMA.encode(make_example(0))
    other = dataclasses.replace(SCHEMA, duration_s=2.0)
    bad = [other.encode(make_example(0, other)), b'\xff not a record']
    records.write_shard(folder / records.shard_name('bells', 'train', 0, 1),
                        [good if i != position else bad[position] for i in range(2)])
    source = records.load_source(folder, 'train', SCHEMA)
    assert source[1 - position]['id'] == 'clip-000'
    with pytest.raises(ValueError, match=message):
        _ = source[position]


def test_encode_refuses_what_does_not_fit():
    example = make_example(0)
    with pytest.raises(ValueError, match=r'sync_features has shape \[15, 768\], not \[16, 768\]'):
        SCHEMA.encode({**example, 'sync_features': example['sync_features'][:15]})
    with pytest.raises(ValueError, match='latent_mean is not finite as float16'):
        SCHEMA.encode({**example, 'latent_mean': example['latent_mean'] * 1e6})
    with pytest.raises(ValueError, match="fields .'caption'. are missing"):
        SCHEMA.encode({name: value for name, value in example.items() if name != 'caption'})


def test_killed_writer_leaves_no_shard(tmp_path):
    def dies():
        yield SCHEMA.encode(make_example(0))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.write_shard(tmp_path / 'shard', dies())
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_shard(tmp_path):
    with full_disk.after(20_000), pytest.raises(OSError, match='shard: .*is the disk full'):
        records.write_shard(tmp_path / 'shard', [os.urandom(10_000) for _ in range(8)])
    assert not list(tmp_path.iterdir())


def test_a_full_disk_makes_no_set(folder):
    before = sorted(folder.iterdir())
    (folder / records.METADATA_FILE).unlink()
    with full_disk.after(20_000), pytest.raises(media.MediaError, match='bells/metadata.json: File too large'):
        records.write_metadata(folder, 'bells', SCHEMA, {'train': [3, 2], 'test': [1]}, {'dataset': 20_000 * 'x'})
    assert sorted(folder.iterdir()) == [path for path in before if path.name != records.METADATA_FILE]


def test_a_record_is_the_same_bytes_in_every_process():
    code = ('import hashlib; from tests import records_test as t; '
            'print(hashlib.sha256(t.SCHEMA.encode(t.make_example(1))).hexdigest())')
    started = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(4)]
    seen = {process.communicate()[0] for process in started}
    assert len(seen) == 1 and len(seen.pop().strip()) == 64
