"""Record sets → mixture → shuffled batches → global device arrays, with an iterator that resumes exactly (Grain).

Row r of batch k is a function of (seed, k, r) alone: not of the number of hosts, worker processes or prefetched batches.
A host reads the rows that its devices hold. So the whole state of the iterator is the number of batches handed out.
"""
import collections
import gc
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pathlib
import signal
import socket
import sys
import threading
from typing import Any, Iterator, Protocol
from typing import Sequence as Sequence_
import zlib

from absl import flags
import grain.python as grain
import jax
from jax.experimental import multihost_utils
import numpy as np

from mmaudio_jax import balance
from mmaudio_jax import hosts
from mmaudio_jax import partitioning
from mmaudio_jax import records

BATCH_FIELDS = records.FEATURES + records.FLAGS
_STATISTICS_THREADS = 8  # reads in flight: the files may be on a network
_STATISTICS_BUFFER = 64  # examples
_SHARED_MEMORY = '/dev/shm'  # where readers leave their batches; a write beyond its end kills them (SIGBUS)
# Of each reader: the one it wants to hand over, the one on its way, and two in the thread of this process that takes them.
_BATCHES_OF_A_READER = 4


class _Batches:
    """Random access to this host's part of every batch of an endless dataset; what Grain's threads and workers read.

    Element k holds the rows `rows` of batch first + k. Epochs follow each other without end; the examples that do not fill
    the last batch of an epoch are left out of that epoch.
    """

    def __init__(self, examples: grain.MapDataset, batch_size: int, rows: Sequence_[int], first: int):
        self._examples = examples
        self._batch_size = batch_size
        self._rows = rows
        self._first = first

    def __len__(self) -> int:
        return sys.maxsize - self._first

    def __getitem__(self, index) -> dict[str, np.ndarray]:
        epoch, batch = divmod(self._first + int(index), len(self._examples) // self._batch_size)
        start = epoch * len(self._examples) + batch * self._batch_size
        examples = [self._examples[start + row] for row in self._rows]
        return {name: np.stack([example[name] for example in examples]) for name in BATCH_FIELDS}


def _local_rows(sharding: jax.sharding.Sharding, batch_size: int) -> list[int]:
    """The rows of a global batch that the devices of this process hold, ascending."""
    places = sharding.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in places if index for row in range(*index[0].indices(batch_size))})


def _to_global(batch: dict[str, np.ndarray], sharding: jax.sharding.Sharding, batch_size: int) -> dict[str, jax.Array]:
    """Host rows → global arrays [batch_size, ...]."""
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (batch_size, *value.shape[1:]))
        for name, value in batch.items()
    }


def start_reader(index: int, count: int) -> None:
    """What a worker process does first; Grain gives its index and the number of them.

    Slurm, systemd and Ctrl-C send their signals to readers, too, but the steps until the save that answers them need batches.
    So a reader ignores them, and ends with the process that reads from it, however that ends.
    """
    del index, count
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


class TrainIterator:
    """Endless iterator over global batches; see `train_iterator`."""

    def __init__(self, examples: grain.MapDataset, input_config, sharding: jax.sharding.Sharding, identity: dict[str, Any]):
        self._examples = examples
        self._config = input_config
        self._sharding = sharding
        self._identity = identity
        self._rows = _local_rows(sharding, input_config.batch_size)
        self._next = 0
        self._on_device: collections.deque[dict[str, jax.Array]] = collections.deque()
        self._host_batches: grain.DatasetIterator | None = None

    def _read(self) -> grain.DatasetIterator:
        """Starts the threads or worker processes that read, from the next batch on."""
        source = _Batches(self._examples, self._config.batch_size, self._rows, self._next)
        dataset = grain.MapDataset.source(source)
        if self._config.workers:
            if not flags.FLAGS.is_parsed():  # Grain reads a flag of its own, also where no program parsed any
                flags.FLAGS.mark_as_parsed()
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)  # the processes are the parallelism
            workers = grain.MultiprocessingOptions(num_workers=self._config.workers, per_worker_buffer_size=1)
            return iter(dataset.to_iter_dataset(options).mp_prefetch(workers, start_reader))
        ahead = max(1, self._config.prefetch)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=ahead, prefetch_buffer_size=ahead)))

    def __iter__(self) -> 'TrainIterator':
        return self

    def __next__(self) -> dict[str, jax.Array]:
        """The next batch; the transfer of the `prefetch` batches after it has been started.

        Raises ValueError or OSError for records that cannot be read; the state stays that of the batch before.
        """
        if self._host_batches is None:  # only now, so that set_state before the first batch starts no workers in vain
            self._host_batches = self._read()
        while len(self._on_device) <= self._config.prefetch:
            self._on_device.append(_to_global(self._next_on_host(self._host_batches), self._sharding, self._config.batch_size))
        self._next += 1
        return self._on_device.popleft()

    def _next_on_host(self, batches: grain.DatasetIterator) -> dict[str, np.ndarray]:
        try:
            return next(batches)
        except RuntimeError as error:  # as Grain says that a worker process ended
            names = ', '.join(name for name, *_ in self._identity['mixture'])
            reason = str(error).split('. ')[0]
            raise OSError(f'the records of {names} cannot be read on: {reason} (-9: mostly too little memory, -7: '
                          f'{_SHARED_MEMORY} is full); lower config.input.workers, or read with threads '
                          '(config.input.workers=0), and run the same command again') from error

    def get_state(self) -> dict[str, Any]:
        """JSON-able, and the same on every host: the next batch's number, and what the order of the batches depends on."""
        return {'next_batch': self._next, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues at `state`; hosts and workers may be other in number.

        Raises:
          ValueError: the state belongs to another order of batches; names the field.
        """
        for field in dict.fromkeys((*self._identity, *state)):  # balance stands only in states of runs that have it
            value = self._identity.get(field)
            if field not in ('made_with', 'next_batch') and state.get(field) != value:
                raise ValueError(f'the checkpoint was made with {field} = {state.get(field)!r}, this run has {value!r}: its '
                                 'place in the data has no meaning here; restore the field or use another --workdir')
        stored = state.get('made_with', {})  # not in checkpoints that are older than this check
        changed = [name for name, digest in self._identity['made_with'].items() if stored.get(name, digest) != digest]
        if changed:
            raise ValueError(f'the records of {", ".join(changed)} are others than those of the checkpoint: they were '
                             'extracted again, from other tables or with a codec that was fitted again; restore them, or '
                             'train in another --workdir')
        self.close()
        self._next = int(state['next_batch'])

    def close(self) -> None:
        """Ends the reading threads and worker processes; batches that were read ahead are read again if needed."""
        self._on_device.clear()
        if self._host_batches is not None:
            self._host_batches.close()
        self._host_batches = None
        gc.collect()  # JAX frees only then what its arrays on CPUs are made of: readers' shared memory, else told as leaked


class _Examples(Protocol):
    """Random access to examples."""

    def __len__(self) -> int:
        ...

    def __getitem__(self, index) -> dict[str, Any]:
        ...


class _WithoutText:
    """The examples of a source, none of which has a caption."""

    def __init__(self, source: _Examples):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index) -> dict[str, Any]:
        return {**self._source[index], 'text_exists': np.bool_(False)}


class _Chosen:
    """The examples of a source at the given places."""

    def __init__(self, source: _Examples, places: np.ndarray):
        self._source, self._places = source, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index) -> dict[str, Any]:
        return self._source[self._places[index]]


def _load(config, records_dir: pathlib.Path, dataset: str, split: str) -> _Examples:
    """All examples of a split; those of config.input.without_text have no caption."""
    source = records.load_source(records_dir / dataset, split, records.schema_of(config))
    return _WithoutText(source) if dataset in config.input.without_text else source


def _load_share(config, records_dir: pathlib.Path, dataset: str) -> _Examples:
    """The share of the split 'train' that config.input.shares asks for, evenly spread, at least one example."""
    source, share = _load(config, records_dir, dataset, 'train'), dict(config.input.shares).get(dataset, 1.0)
    if not 0 < share <= 1:
        raise ValueError(f'config.input.shares: {dataset!r} has the share {share}; it must be above 0 and at most 1')
    length = max(1, round(share * len(source)))
    return source if length == len(source) else _Chosen(source, np.arange(length) * len(source) // length)


def _epoch_of(config, records_dir: pathlib.Path, dataset: str, repeats: int) -> grain.MapDataset:
    """What one epoch of the mixture holds of a set: all of it `repeats` times, or as many examples balanced by label."""
    part = _load_share(config, records_dir, dataset)
    exponent = dict(config.input.balance).get(dataset, 0.0)
    if not exponent:
        return grain.MapDataset.source(part).repeat(repeats)
    if dataset in dict(config.input.shares):
        raise ValueError(f'config.input.balance and config.input.shares both name {dataset!r}; take one of them')
    labels = balance.read_labels(records_dir / dataset, 'train')
    places = balance.spread(balance.weights(labels, exponent), repeats * len(part))
    counts = np.bincount(places, minlength=len(part))
    hosts.say(f'{dataset}: balanced by label with exponent {exponent:g}: of {len(part)} examples '
              f'{int((counts == 0).sum())} do not come up in an epoch, the others up to {counts.max()} times')
    return grain.MapDataset.source(_Chosen(part, places))


def _check_codecs(records_dir: pathlib.Path, input_config) -> None:
    """Raises ValueError for sets, of whichever field, whose latents are those of codecs that were fitted to different clips.

    A set of statistics or validation that is not there is left to its reader: not every run reads it.
    """
    names, places = [name for name, _ in input_config.mixture], dict[str, str]()
    for field in ('statistics', 'validation'):
        if (records_dir / input_config[field] / records.METADATA_FILE).is_file():
            places[input_config[field]] = field
    places |= dict.fromkeys(names, 'mixture')
    fitted = {name: records.read_metadata(records_dir / name)['made_with'].get('codec_fitted_to') for name in places}
    for name, source in fitted.items():
        if source != fitted[names[0]]:
            raise ValueError(f'config.input.{places[name]}: the latents of {names[0]!r} are those of a codec that was fitted '
                             f'to {fitted[names[0]]}, those of {name!r} of one fitted to {source}; delete one of the sets and '
                             'extract it again with the codec of the other (config.extract.codec_fit_dataset)')


def _digest(folder: pathlib.Path) -> str:
    """Of what decided the contents of a record set: its tables, and the clips that its codec was fitted to."""
    made_with = records.read_metadata(folder)['made_with']
    return hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()[:16]


def _check_mixture(input_config) -> None:
    """Raises ValueError for no sets, repeats that are no number of times, or a field that names sets beside the mixture's."""
    for _, repeats in input_config.mixture:
        if not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f'config.input.mixture: {repeats!r} repeats; they are integers of at least 1')
    if not input_config.mixture:
        raise ValueError('config.input.mixture is empty; name at least one record set')
    named = {'shares': dict(input_config.shares), 'balance': dict(input_config.balance),
             'without_text': input_config.without_text}
    for field, names in named.items():
        unknown = sorted(set(names) - set(dict(input_config.mixture)))
        if unknown:
            raise ValueError(f'config.input.{field} names {", ".join(unknown)}, which config.input.mixture does not have')


def _check_shared_memory(config, rows: int) -> None:
    """Raises ValueError when readers that wait for the steps, as they should, have more in /dev/shm than there is room for.

    rows: of every batch that this process reads. Every process must call.
    """
    schema, workers = records.schema_of(config), config.input.workers
    if not workers or not os.path.isdir(_SHARED_MEMORY):
        return
    example = sum(map(math.prod, schema.shapes.values())) * records.FEATURE_DTYPES[schema.feature_dtype].itemsize
    held = _BATCHES_OF_A_READER * workers + 1  # and the one that goes to the devices
    if jax.default_backend() == 'cpu':
        held += config.input.prefetch  # whose arrays are the readers' memory
    needed = held * rows * example * _processes_of_this_host()
    status = os.statvfs(_SHARED_MEMORY)
    free = status.f_bavail * status.f_frsize
    if free < needed:
        raise ValueError(f'config.input.workers is {workers}: their batches take {needed / 2**20:.0f} MiB of {_SHARED_MEMORY}, '
                         f'where {free / 2**20:.0f} MiB are free; enlarge it (docker: --shm-size={-(-needed // 2**30)}g), '
                         'or read with threads (config.input.workers=0)')


def _processes_of_this_host() -> int:
    own = np.uint32(zlib.crc32(socket.gethostname().encode()))
    return int(np.sum(multihost_utils.process_allgather(own) == own))


def train_iterator(config, records_dir: pathlib.Path, mesh: jax.sharding.Mesh) -> TrainIterator:
    """The mixture config.input.mixture, shuffled as a whole in every epoch.

    Args:
      config: its fields seed, sequence, extract and input.
      records_dir: holds one folder per record set.
      mesh: the batch is split over it by partitioning.batch_sharding.

    Returns:
      An endless iterator over dicts of global arrays: latent_mean, latent_std `[B, N, C]`, clip_features `[B, V, 1024]`,
      sync_features `[B, S, 768]`, text_features `[B, 77, 1024]` in the stored dtype, video_exists, text_exists `[B]` bool;
      with get_state, set_state and close.

    Raises:
      FileNotFoundError: a set that is not there.
      ValueError: a set of another schema or codec (also one of statistics or validation), a bad mixture, fewer examples in an
        epoch than one batch, or more workers than shared memory has room for.
    """
    _check_mixture(config.input)
    mixture = config.input.mixture
    parts = [_epoch_of(config, records_dir, name, repeats) for name, repeats in mixture]
    _check_codecs(records_dir, config.input)
    examples = grain.MapDataset.concatenate(parts)
    if len(examples) < config.input.batch_size:
        raise ValueError(f'config.input.batch_size is {config.input.batch_size}, but an epoch of config.input.mixture has only '
                         f'{len(examples)} examples')
    partitioning.check_batch_size(mesh, config.input.batch_size, 'config.input.batch_size')
    sharding = partitioning.batch_sharding(mesh)
    _check_shared_memory(config, len(_local_rows(sharding, config.input.batch_size)))
    identity = {
        'seed': config.seed,
        'batch_size': config.input.batch_size,
        'mixture': [[name, repeats, len(part) // repeats] for (name, repeats), part in zip(mixture, parts)],
        'made_with': {name: _digest(records_dir / name) for name, _ in mixture},
    }
    if config.input.balance:
        identity['balance'] = [list(pair) for pair in config.input.balance]
    seed = int.from_bytes(hashlib.sha256(f'{config.seed} order of the examples'.encode()).digest()[:4], 'big')
    return TrainIterator(examples.shuffle(seed=seed), config.input, sharding, identity)


class ValidationBatches:
    """The same batches in every pass; see `validation_batches`.

    Attributes:
      count: of the examples. batch_size: rows of a batch; those of the last one after all examples repeat the last example.
    """

    def __init__(self, source: _Examples, count: int, batch_size: int, prefetch: int, sharding: jax.sharding.Sharding):
        self.count = count
        self.batch_size = batch_size
        places = np.arange(-(-count // batch_size) * batch_size)
        self._examples = grain.MapDataset.source(_Chosen(source, np.minimum(places, count - 1)))
        self._prefetch = max(1, prefetch)
        self._sharding = sharding

    def __len__(self) -> int:
        return len(self._examples) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, jax.Array]]:
        source = _Batches(self._examples, self.batch_size, _local_rows(self._sharding, self.batch_size), 0)
        options = grain.ReadOptions(num_threads=self._prefetch, prefetch_buffer_size=self._prefetch)
        for batch in grain.MapDataset.source(source)[:len(self)].to_iter_dataset(options):
            yield _to_global(batch, self._sharding, self.batch_size)


def validation_batches(config, records_dir: pathlib.Path, mesh: jax.sharding.Mesh) -> ValidationBatches:
    """The first config.input.validation_examples of the split 'validation', in the order of the records.

    Batches have config.input.validation_batch_size rows, rounded up so that all devices have as many; the last is filled up.

    Returns:
      Iterable any number of times, with len(); batches as of `train_iterator`.

    Raises:
      FileNotFoundError, ValueError: as `train_iterator`; also no examples, or a batch size below 1.
    """
    source = _load(config, records_dir, config.input.validation, 'validation')
    count, size = min(len(source), config.input.validation_examples), config.input.validation_batch_size
    if count < 1:
        raise ValueError(f'there is nothing to validate on: {config.input.validation!r} (config.input.validation) has '
                         f'{len(source)} examples in its split validation, and config.input.validation_examples is '
                         f'{config.input.validation_examples}')
    size = partitioning.rounded_up(mesh, min(size, count), 'config.input.validation_batch_size')
    return ValidationBatches(source, count, size, config.input.prefetch, partitioning.batch_sharding(mesh))


def read_split(config, records_dir: pathlib.Path, dataset: str, split: str) -> Iterator[dict[str, Any]]:
    """Examples of one split in the order of the records, numpy, with id, caption and duration_s; for evaluation.

    Raises:
      FileNotFoundError, ValueError: as records.load_source, at the call.
    """
    source = _load(config, records_dir, dataset, split)
    return (source[index] for index in range(len(source)))


def latent_statistics(config, records_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of latent_mean over examples and time, of config.input.statistics' split 'train'.

    Streams; every host reads its share. Sums are float64.

    Returns:
      (mean [C], std [C]), float32, the population's deviation.

    Raises:
      ValueError: a channel that never changes.
    """
    source = _load(config, records_dir, config.input.statistics, 'train')
    share = grain.MapDataset.source(source)[jax.process_index()::jax.process_count()]
    options = grain.ReadOptions(num_threads=_STATISTICS_THREADS, prefetch_buffer_size=_STATISTICS_BUFFER)
    count, shift = 0, source[0]['latent_mean'].astype(np.float64).mean(axis=0)  # shifted: no cancellation in the squares
    sums = np.zeros((2, len(shift)))
    for example in share.to_iter_dataset(options):
        latents = example['latent_mean'].astype(np.float64) - shift
        count += len(latents)
        sums += latents.sum(axis=0), np.square(latents).sum(axis=0)
    if jax.process_count() > 1:
        # Bytes, because the gather would round float64 to float32.
        mine = np.concatenate([[count], sums.ravel()]).view(np.uint8)
        everyone = np.ascontiguousarray(multihost_utils.process_allgather(mine)).view(np.float64).sum(axis=0)
        count, sums = everyone[0], everyone[1:].reshape(2, -1)
    mean = sums[0] / count
    std = np.sqrt(np.maximum(sums[1] / count - np.square(mean), 0))
    constant = list(itertools.compress(range(len(std)), std < 1e-8))
    if constant:
        raise ValueError(f'{records_dir / config.input.statistics}: latent channels {constant} never change, so '
                         'that they cannot be normalised; is config.input.statistics the right set?')
    return (mean + shift).astype(np.float32), std.astype(np.float32)
