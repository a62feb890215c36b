"""Feature records: the schema of one example, its bytes, and the folder that holds a set of them.

A set is a folder in the layout of TensorFlow Datasets (features.json, dataset_info.json, one array_record file a shard),
so that `tfds.builder_from_directory(folder).as_data_source()` reads it without TensorFlow. Beside them metadata.json says
with which rate, duration, encoder and codec the features were made. Features are stored in two bytes a value.
"""
import bisect
import concurrent.futures
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import os
import pathlib
import resource
from typing import Any, Iterable, Mapping
from typing import Sequence as Sequence_
import uuid

from array_record.python import array_record_data_source
from array_record.python import array_record_module
import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer

from mmaudio_jax import media
from mmaudio_jax.sequence import CLIP_WIDTH
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.sequence import SYNC_WIDTH
from mmaudio_jax.sequence import TEXT_LENGTH

FORMAT_VERSION = 1  # raised whenever old records can no longer be read as new ones
FEATURE_DTYPES = {'float16': np.dtype(np.float16), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
FEATURES = ('latent_mean', 'latent_std', 'clip_features', 'sync_features', 'text_features')
FLAGS = ('video_exists', 'text_exists')
METADATA_FILE = 'metadata.json'
# One record a group, so that a random read decompresses one example; zstd mostly squeezes the text's padding.
_WRITER_OPTIONS = 'group_size:1,zstd:1'
_COUNTED_AT_ONCE = 16  # shards, when a set is opened
_OTHER_FILES = 64  # that a process has open
_MOST_FILES = 2**20  # that are asked for
_MACOS_FILES = 10_240  # the most that macOS gives, whatever it says
_TOO_MANY_FILES = os.strerror(errno.EMFILE)
# Which field of the config says what a set must be.
_ASKED = {'rate': 'config.sequence.rate', 'duration_s': 'config.sequence.duration_s', 'encoder': 'config.extract.encoder',
          'codec': 'config.extract.codec', 'feature_dtype': 'config.extract.feature_dtype'}


@dataclasses.dataclass(frozen=True)
class Schema:
    """Names, shapes and dtypes of one example, and what made its features.

    Attributes:
      rate: '16k' or '44k'.
      duration_s: length of every clip, seconds.
      feature_dtype: 'float16' or 'bfloat16', as stored.
      encoder: name of the condition encoders ('official', 'pixels').
      codec: name of the audio codec ('official', 'pca').

    An example is a dict of latent_mean and latent_std `[N, C]`, clip_features `[V, 1024]`, sync_features `[S, 768]`,
    text_features `[77, 1024]` (feature_dtype), video_exists and text_exists (bool), id and caption (str) and duration_s
    (float, seconds).
    """
    rate: str
    duration_s: float
    feature_dtype: str
    encoder: str
    codec: str

    def __post_init__(self):
        if self.feature_dtype not in FEATURE_DTYPES:
            raise ValueError(f'feature_dtype {self.feature_dtype!r} is not one of {", ".join(FEATURE_DTYPES)}')
        Sequence(self.rate, self.duration_s)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Shape of every feature, by name."""
        sequence = Sequence(self.rate, self.duration_s)
        latents = (sequence.latent_length, sequence.latent_channels)
        return {
            'latent_mean': latents,
            'latent_std': latents,
            'clip_features': (sequence.clip_length, CLIP_WIDTH),
            'sync_features': (sequence.sync_length, SYNC_WIDTH),
            'text_features': (TEXT_LENGTH, CLIP_WIDTH),
        }

    @functools.cached_property
    def tfds_features(self) -> tfds.features.FeaturesDict:
        """The same for TensorFlow Datasets. Raw bytes, because its default widens every value to float32."""
        dtype = FEATURE_DTYPES[self.feature_dtype]
        features: dict[str, Any] = {
            name: tfds.features.Tensor(shape=shape, dtype=dtype, encoding='bytes') for name, shape in self.shapes.items()
        }
        features.update({name: tfds.features.Scalar(np.bool_) for name in FLAGS})
        features.update(id=tfds.features.Text(), caption=tfds.features.Text(), duration_s=tfds.features.Scalar(np.float32))
        return tfds.features.FeaturesDict(features)

    @functools.cached_property
    def _serializer(self) -> example_serializer.ExampleSerializer:
        return example_serializer.ExampleSerializer(self.tfds_features.get_serialized_info())

    def metadata(self) -> dict[str, Any]:
        """What metadata.json records about the features; two sets mix when these are equal."""
        shapes = {name: list(shape) for name, shape in self.shapes.items()}
        return {'format_version': FORMAT_VERSION, **dataclasses.asdict(self), 'shapes': shapes}

    def encode(self, example: Mapping[str, Any]) -> bytes:
        """One example as bytes; features are rounded to feature_dtype.

        Raises:
          ValueError: a field that is missing, unknown, of another shape, or not finite once rounded.
        """
        expected = set(self.tfds_features)
        if set(example) != expected:
            raise ValueError(f'record {example.get("id")!r}: fields {sorted(set(example) ^ expected)} are missing or unknown')
        values = dict(example)
        for name, shape in self.shapes.items():
            value = np.asarray(example[name])
            if value.shape != shape:
                raise ValueError(f'record {example["id"]!r}: {name} has shape {list(value.shape)}, not {list(shape)}')
            with np.errstate(over='ignore'):
                values[name] = value.astype(FEATURE_DTYPES[self.feature_dtype])
            if not np.isfinite(values[name].astype(np.float32)).all():
                raise ValueError(f'record {example["id"]!r}: {name} is not finite as {self.feature_dtype}')
        example_proto = self._serializer.get_tf_example(self.tfds_features.encode_example(values))
        # Else the order of the fields differs from process to process, and with it the bytes of the same record.
        return example_proto.SerializeToString(deterministic=True)

    def parse(self, record: bytes) -> dict[str, Any]:
        """The example of `record`: arrays in feature_dtype, bool flags, str id and caption, float duration_s.

        Raises:
          ValueError: bytes that are not a record of this schema.
        """
        try:
            example = self.tfds_features.deserialize_example_np(record)
        except Exception as error:  # protobuf, reshape and lookup errors of three libraries: all mean the same here
            raise ValueError(f'does not fit the schema ({" ".join(str(error).split())[:200]})') from error
        if set(example) != set(self.tfds_features):
            raise ValueError(f'has no {sorted(set(self.tfds_features) - set(example))}')
        for name in ('id', 'caption'):
            example[name] = example[name].decode()
        return example


def schema_of(config) -> Schema:
    """The schema that `config` asks for (its fields sequence and extract)."""
    return Schema(config.sequence.rate, config.sequence.duration_s, config.extract.feature_dtype, config.extract.encoder,
                  config.extract.codec)


def shard_name(name: str, split: str, shard: int, num_shards: int) -> str:
    """File name of one shard of the set `name`, as TensorFlow Datasets spells it."""
    return f'{name}-{split}.array_record-{shard:05d}-of-{num_shards:05d}'


class ShardWriter:
    """Writes one array_record file beside its place; `commit` puts it there when it is whole and on the disk.

    A context manager: what was not committed is removed. Several writers of the same shard do not disturb each other.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._partial = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:12]}')
        with self._errors():
            self._writer = array_record_module.ArrayRecordWriter(str(self._partial), _WRITER_OPTIONS)

    @contextlib.contextmanager
    def _errors(self):
        try:
            yield
        except RuntimeError as error:
            raise OSError(f'{self._path}: cannot be written ({error}); is the disk full?') from error

    def __enter__(self) -> 'ShardWriter':
        return self

    def __exit__(self, *_) -> None:
        try:
            if self._writer.is_open():
                self._writer.close()
        except RuntimeError:
            pass  # of a file that is removed: the first error is the one to see
        self._partial.unlink(missing_ok=True)

    def write(self, record: bytes) -> None:
        """Appends a record; OSError when the disk is full."""
        with self._errors():
            self._writer.write(record)

    def commit(self) -> None:
        """Makes the file appear; OSError when the disk is full."""
        try:
            with self._errors():
                self._writer.close()
            _count(self._partial)
        except ValueError as error:  # closing does not report every failure
            raise OSError(f'{self._path}: was not written whole; is the disk full?') from error
        with open(self._partial, 'rb') as file:
            os.fsync(file.fileno())
        self._partial.rename(self._path)


def write_shard(path: pathlib.Path, records: Iterable[bytes]) -> None:
    """Writes one array_record file, whole or not at all; OSError when the disk is full."""
    with ShardWriter(path) as writer:
        for record in records:
            writer.write(record)
        writer.commit()


def write_metadata(folder: pathlib.Path, name: str, schema: Schema, shard_lengths: Mapping[str, Sequence_[int]],
                   made_with: Mapping[str, Any]) -> None:
    """Makes a folder of finished shards a set: features.json, dataset_info.json and metadata.json.

    Args:
      folder: holds the files `shard_name(name, split, i, n)`.
      name: of the set.
      schema: of its examples.
      shard_lengths: examples of every shard, by split.
      made_with: whatever else decided its contents, kept in metadata.json under 'made_with'.
    """
    splits = []
    for split, lengths in shard_lengths.items():
        files = [folder / shard_name(name, split, i, len(lengths)) for i in range(len(lengths))]
        template = tfds.core.ShardedFileTemplate(data_dir=folder,
                                                 dataset_name=name,
                                                 split=split,
                                                 filetype_suffix='array_record')
        splits.append(
            tfds.core.SplitInfo(name=split,
                                shard_lengths=list(lengths),
                                num_bytes=sum(file.stat().st_size for file in files),
                                filename_template=template))
    tfds.folder_dataset.write_metadata(data_dir=folder,
                                       features=schema.tfds_features,
                                       split_infos=splits,
                                       version='1.0.0',
                                       description=f'Audio-visual features for MMAudio ({schema.encoder}, {schema.codec}).',
                                       check_data=False)  # its check needs TensorFlow
    text = json.dumps({**schema.metadata(), 'made_with': dict(made_with)}, indent=1)
    with media.atomic_file(folder / METADATA_FILE) as beside:  # last: a folder with this file is whole
        beside.write_text(text + '\n')


def read_metadata(folder: pathlib.Path) -> dict[str, Any]:
    """metadata.json of the set in `folder`.

    Raises:
      FileNotFoundError: no such folder, or a folder that is not a set.
      ValueError: the file is not JSON.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder}: no such record set; make it with --mode=extract, or correct '
                                'the field that names it (config.input mixture, validation and statistics, '
                                'config.evaluate.dataset, config.score.sample)')
    path = folder / METADATA_FILE
    if not path.is_file():
        raise FileNotFoundError(f'{folder}: not a record set, {METADATA_FILE} is missing; delete it and run --mode=extract')
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f'{path}: not JSON ({error}); delete {folder} and run --mode=extract') from error


def check_metadata(folder: pathlib.Path, schema: Schema) -> None:
    """Raises ValueError naming the first field in which the set in `folder` is not of `schema`."""
    stored = read_metadata(folder)
    for field, value in schema.metadata().items():
        if stored.get(field) != value:
            raise ValueError(f'{folder}: {field} is {stored.get(field)!r}, {_ASKED.get(field, "this version")} has {value!r}; '
                             'extract the set again in another folder, or change the configuration')


class Source:
    """Random access to the examples of one split; see `load_source`. Picklable: workers open the files themselves."""

    def __init__(self, paths: Sequence_[pathlib.Path], lengths: Sequence_[int], schema: Schema):
        self._paths = list(paths)
        self._ends = list(itertools.accumulate(lengths))
        self._schema = schema
        _allow_files(paths)
        with concurrent.futures.ThreadPoolExecutor(_COUNTED_AT_ONCE) as pool:
            counts = list(pool.map(_count, paths))
        for path, length, found in zip(paths, lengths, counts):
            if found != length:
                raise ValueError(f'{path}: holds {found} records, dataset_info.json says {length}; delete the folder and '
                                 'run --mode=extract')
        self._records = array_record_data_source.ArrayRecordDataSource([
            f'{path}[0:{length}]' for path, length in zip(paths, lengths)
        ])

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index) -> dict[str, Any]:
        """The example at `index`; ValueError names the file when its bytes are damaged."""
        index = int(index)
        try:
            return self._schema.parse(self._records[index])
        except (ValueError, RuntimeError) as error:
            if _TOO_MANY_FILES in str(error):
                raise ValueError(f'{self._paths[0].parent}: {_TOO_MANY_FILES}; raise the limit (ulimit -n)') from error
            shard = bisect.bisect_right(self._ends, index)
            position = index - (self._ends[shard - 1] if shard else 0)
            raise ValueError(f'{self._paths[shard]}: record {position} cannot be read: {error or "damaged or cut short"}; '
                             'delete the folder and run --mode=extract') from error


def _allow_files(paths: Sequence_[pathlib.Path]) -> None:
    """Lets this process, and those that it starts, have as many files open as the system allows: every shard stays open.

    Raises ValueError when these are too few.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        for number in (wanted, min(wanted, _MACOS_FILES)):
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(number, soft), hard))
                break
        soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if soft != resource.RLIM_INFINITY and soft < len(paths) + _OTHER_FILES:
        raise ValueError(f'{paths[0].parent}: {len(paths)} shards are read at once, but a process may have only {soft} files '
                         'open; raise the limit (ulimit -n), or extract with a larger config.extract.clips_per_shard')


def _count(path: pathlib.Path) -> int:
    """Records of one shard."""
    if not path.is_file():
        raise FileNotFoundError(f'{path}: this shard is missing; delete the folder and run --mode=extract')
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        count = reader.num_records()
        reader.close()
    except RuntimeError as error:
        raise ValueError(f'{path}: damaged or cut short; delete the folder and run --mode=extract') from error
    return count


def load_source(folder: pathlib.Path, split: str, schema: Schema) -> Source:
    """The examples of `split` of the set in `folder`, by index.

    Raises:
      FileNotFoundError: no such set or shard.
      ValueError: made with another schema (names the field), no such split, or a damaged shard (names the file).
    """
    folder = pathlib.Path(folder)
    check_metadata(folder, schema)
    info = json.loads((folder / 'dataset_info.json').read_text())
    splits = {entry['name']: [int(length) for length in entry['shardLengths']] for entry in info['splits']}
    if split not in splits:
        raise ValueError(f'{folder}: has no split {split!r}; it has {", ".join(sorted(splits)) or "none"}')
    lengths = splits[split]
    paths = [folder / shard_name(info['name'], split, i, len(lengths)) for i in range(len(lengths))]
    return Source(paths, lengths, schema)
