"""Embeddings of many clips, kept on disk under everything that they depend on: never stale, and resumed where it stopped.

    DIR/<embedder>-<digest>/<first two letters>/<digest of the clip>.npz

The first digest is of the weights' file, the settings and the code that reads the clip and computes; the second of the clip's
bytes (or of its caption). So a clip that changes, or stands in another system's folder too, is found by what it is.
"""
from collections.abc import Iterator
from collections.abc import Mapping
import concurrent.futures
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import pathlib
import sys
import time
import types
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mmaudio_jax import embedders
from mmaudio_jax import evaluation_media
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import tokenizer_roberta

_PROGRESS_S = 10.0
_WAITING = 4  # batches of arrays that wait for others of their shape: then an unfilled batch goes, so that memory stays flat

Source = pathlib.Path | evaluation_media.Part | str  # a file, a part of one, or a caption


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to embed.

    Attributes:
      weights: folder of the published checkpoints.
      cache: folder of the embeddings.
      duration_s: how much of each clip counts, seconds.
      batch_size: clips at a time, over this host's devices.
      workers: threads that read clips.
    """
    weights: pathlib.Path
    cache: pathlib.Path
    duration_s: float
    batch_size: int
    workers: int


class Stored(Mapping):
    """Clip's name → its embeddings by name, read from disk when asked for: memory holds none of them.

    `failed` says why clips that were asked for are not there.
    """

    def __init__(self, paths: Mapping[str, pathlib.Path], failed: Mapping[str, str]):
        self._paths, self.failed = dict(paths), dict(failed)

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self._paths[name]) as file:
            return dict(file)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


def embed(embedder: embedders.Embedder, clips: Mapping[str, Source], settings: Settings, label: str) -> Stored:
    """Embeds what is not on disk yet. Every host takes its share of the clips; all must see the same `settings.cache`.

    Args:
      embedder: the network.
      clips: name → file, or caption.
      settings: where and how.
      label: of the progress lines.

    Returns:
      The embeddings of all clips that could be read.

    Raises:
      FileNotFoundError, ValueError: no weights, or the wrong ones.
      OSError, media.MediaError: the cache cannot be written.
    """
    folder = settings.cache / f'{embedder.name}-{_identity(embedder, settings)}'
    failed: dict[str, str] = {}
    paths: dict[str, pathlib.Path] = {}
    with concurrent.futures.ThreadPoolExecutor(settings.workers) as pool:
        for name, digest in zip(clips, pool.map(_digest_or_error, clips.values())):
            if isinstance(digest, media.MediaError):
                failed[name] = str(digest)
            else:
                paths[name] = folder / digest[:2] / f'{digest}.npz'
        share = list(clips)[jax.process_index()::jax.process_count()]  # of all: hosts look into the cache at other times
        own = {paths[name]: name for name in share if name in paths and not paths[name].is_file()}  # once for clips alike
        if own:
            _fill(embedder, [(path, name, clips[name]) for path, name in own.items()], settings, label, pool, failed)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'embeddings {label} {embedder.name}')
    for name, path in paths.items():
        if not path.is_file():
            failed.setdefault(name, failed.get(own.get(path, ''), 'failed on another host, whose output says why'))
    return Stored({name: path for name, path in paths.items() if name not in failed}, failed)


def _fill(embedder: embedders.Embedder, wanted: list[tuple[pathlib.Path, str, Source]], settings: Settings, label: str,
          pool: concurrent.futures.Executor, failed: dict[str, str]) -> None:
    """Computes and writes the embeddings of `wanted` (place, name, source); clips that cannot be read go to `failed`."""
    params, apply = embedder.load(settings.weights)
    mesh = partitioning.make_mesh({}, devices=jax.local_devices())
    params = jax.device_put(params, partitioning.replicated(mesh))
    parts = partitioning.batch_shards(mesh)
    size = -(-(min(settings.batch_size, embedder.clips * parts) if embedder.clips else settings.batch_size) // parts) * parts
    started = said = time.monotonic()
    done = 0
    for batch in _batches(embedder, wanted, settings, size, pool, failed):
        stacked = np.stack([array for *_, array in batch] + [batch[-1][-1]] * (size - len(batch)))
        outputs = jax.device_get(apply(params, jax.device_put(stacked, partitioning.batch_sharding(mesh))))
        for row, (path, name, _) in enumerate(batch):
            arrays = {key: np.asarray(value[row], np.float32) for key, value in outputs.items()}
            if not all(np.isfinite(array).all() for array in arrays.values()):
                raise ValueError(f'{embedder.name}: the embeddings of {name} are not finite; are the weights whole?')
            _write(path, arrays)
        done += len(batch)
        if time.monotonic() - said > _PROGRESS_S:
            said = time.monotonic()
            left = (said - started) / done * (len(wanted) - done)
            print(f'score: {label}: {embedder.name} {done} of {len(wanted)} clips, {left:.0f} s left', flush=True)
    print(f'score: {label}: {embedder.name}, {done} clips in {time.monotonic() - started:.1f} s', flush=True)


def _batches(embedder: embedders.Embedder, wanted: list[tuple[pathlib.Path, str, Source]], settings: Settings, size: int,
             pool: concurrent.futures.Executor, failed: dict[str, str]) -> Iterator[list[tuple[pathlib.Path, str, np.ndarray]]]:
    """Clips (place, name, array) of one shape, at most `size` at a time; two batches are read ahead, _WAITING of them kept."""
    prepare = functools.partial(_prepared, embedder, settings.duration_s)
    waiting: dict[tuple[int, ...], list[tuple[pathlib.Path, str, np.ndarray]]] = {}
    sources = iter(wanted)
    pending: list[tuple[pathlib.Path, str, concurrent.futures.Future]] = []
    while True:
        pending += [(path, name, pool.submit(prepare, source))
                    for path, name, source in itertools.islice(sources, 2 * size - len(pending))]
        if not pending:
            break
        path, name, future = pending.pop(0)
        array = future.result()
        if isinstance(array, media.MediaError):
            failed[name] = str(array)
            continue
        ready = waiting.setdefault(array.shape, [])
        ready.append((path, name, array))
        if len(ready) == size:
            yield waiting.pop(array.shape)
        elif sum(map(len, waiting.values())) > _WAITING * size:
            yield waiting.pop(max(waiting, key=lambda shape: len(waiting[shape])))
    yield from waiting.values()


def _prepared(embedder: embedders.Embedder, duration_s: float, source: Source) -> np.ndarray | media.MediaError:
    try:
        return embedder.prepare(source, duration_s)
    except media.MediaError as error:
        return error


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with media.atomic_file(path) as beside, open(beside, 'wb') as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def _identity(embedder: embedders.Embedder, settings: Settings) -> str:
    """Digest of what all embeddings of a folder depend on."""
    weights = embedder.path(settings.weights)
    digest = _weights_digest(weights, weights.stat().st_mtime_ns)
    parts: list[Any] = [embedder.name, settings.duration_s, digest, _code_digest()]
    if embedder.kind == 'text':
        parts += [media.digest(settings.weights / name) for name in tokenizer_roberta.FILES]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


@functools.cache
def _weights_digest(path: pathlib.Path, changed_ns: int) -> str:
    """The digest of a file of gigabytes, read once a process while it does not change."""
    del changed_ns
    return media.digest(path)


@functools.cache
def _code_digest() -> str:
    """Digest of all of this package's code that turns a clip and a file of weights into embeddings."""
    return hashlib.sha256(json.dumps(_sources(embedders, {}), sort_keys=True).encode()).hexdigest()


def _sources(module: types.ModuleType, found: dict[str, str]) -> dict[str, str]:
    """Name → source of the module and of all of this package's that it uses, added to `found`."""
    found[module.__name__] = inspect.getsource(module)
    for value in vars(module).values():
        name = value.__name__ if inspect.ismodule(value) else str(getattr(value, '__module__', ''))
        if name.startswith(f'{__package__}.') and name not in found:
            _sources(sys.modules[name], found)
    return found


def _digest_or_error(source: Source) -> str | media.MediaError:
    if isinstance(source, str):
        return hashlib.sha256(source.encode()).hexdigest()
    try:
        if isinstance(source, evaluation_media.Part):
            whole = media.digest(source.path)
            return hashlib.sha256(f'{whole} {source.start_s!r} {source.duration_s!r}'.encode()).hexdigest()
        return media.digest(source)
    except OSError as error:
        return media.MediaError(source, error.strerror or 'cannot be read')
