"""The shard function: the clips of one shard → its records, whole or not at all. The same for every executor.

A shard is finished when its note is there: a JSON file with its counts, written after its array records.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Callable, Iterable, Iterator, Mapping, NamedTuple

import jax
import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines import near_duplicates
from data_pipelines import reading
from mmaudio_jax import codec as codec_lib
from mmaudio_jax import encoders
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

CAPTIONS_KEPT = 1024  # features of the last captions: a caption that recurs among so many is encoded once
BATCHES_AHEAD = 1  # encoded while the next one is collected and the one before is written

Batch = list[tuple[clips_lib.Clip, reading.Loaded]]
Report = Callable[[int, list[str]], None]  # told how many more clips are done, and the reasons of those that were rejected


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of a split: its number, of how many, and its clips."""
    split: str
    number: int
    count: int
    clips: tuple[clips_lib.Clip, ...]


@dataclasses.dataclass(frozen=True)
class Target:
    """Records of one rate: their schema, the folder of the set in work, and the fitted codec if it has one."""
    schema: records.Schema
    folder: pathlib.Path
    codec_path: pathlib.Path

    @property
    def progress(self) -> pathlib.Path:
        """Folder of the notes."""
        return self.folder / 'progress'

    def note(self, shard: Shard) -> pathlib.Path:
        """The file that says that a shard is finished."""
        return self.progress / f'{shard.split}-{shard.number:05d}.json'


class Encoded(NamedTuple):
    """A record, and its latent_mean `[N, C]` as stored, float64."""
    latents: np.ndarray
    record: bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything that the extraction of one set needs, on any machine.

    Attributes:
      name: of the set.
      root: paths in reports are relative to it.
      targets: one a rate.
      batch_size: clips that are encoded together.
      workers: processes that decode.
      weights: arguments of weights.store.load, for official encoders and codecs.
    """
    name: str
    root: pathlib.Path
    targets: tuple[Target, ...]
    batch_size: int
    workers: int
    weights: Mapping[str, Any]

    def shown(self, path: pathlib.Path) -> str:
        """The path as reports name it."""
        return str(path.relative_to(self.root) if path.is_relative_to(self.root) else path)


def write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all, also when the power fails: an empty note would stop every later run."""
    with media.atomic_file(path, synced=True) as beside:
        beside.write_text(clips_lib.to_line(value), encoding='utf-8')


class Extractor:
    """The frozen encoders and codecs, jitted once, with the features of the captions that they have met."""

    def __init__(self, plan: Plan):
        """Raises ValueError or FileNotFoundError for an encoder or codec that cannot be had."""
        self._plan = plan
        schemas = [target.schema for target in plan.targets]
        sequences = [Sequence(schema.rate, schema.duration_s) for schema in schemas]
        load = functools.partial(store.load, **plan.weights)
        mesh = partitioning.make_mesh({}, devices=jax.local_devices())  # processes share nothing
        self._encoder = encoders.make(schemas[0].encoder, sequences[0], load, mesh)
        load = functools.partial(store.load, **{**plan.weights, 'dtype': 'float32'})
        self._codecs = [codec_lib.make(target.schema.codec, sequence, target.codec_path, load, mesh)
                        for target, sequence in zip(plan.targets, sequences)]
        self._texts: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        sounds = tuple((sequence.sample_rate_hz, sequence.waveform_length) for sequence in sequences)
        self.request = reading.Request(self._encoder.frame_requests, schemas[0].duration_s, sounds)

    def encode(self, batch: Batch) -> list[list[Encoded]]:
        """The records of a batch, for each target; every clip's features are those it would have alone.

        The codecs' calls follow the batch: it is filled up to one size, so that they are compiled once.
        """
        first = self._plan.targets[0].schema
        dtype = records.FEATURE_DTYPES[first.feature_dtype]
        texts = self._text_features([clip.caption for clip, _ in batch])
        with_video = [i for i, (_, loaded) in enumerate(batch) if loaded.frames is not None]
        features = {}
        if with_video:
            streams = zip(*(batch[i][1].frames for i in with_video))
            clip_features, sync_features = self._encoder.encode_video(*map(np.stack, streams))
            features = {i: (clip_features[k], sync_features[k]) for k, i in enumerate(with_video)}
        empty = np.zeros(first.shapes['clip_features'], np.float32), np.zeros(first.shapes['sync_features'], np.float32)
        encoded = []
        for place, (target, codec) in enumerate(zip(self._plan.targets, self._codecs)):
            mean, std = codec.encode(_padded([loaded.waveforms[place] for _, loaded in batch], self._plan.batch_size))
            encoded.append([Encoded(mean[i].astype(dtype).astype(np.float64), target.schema.encode({
                'id': clip.id,
                'caption': clip.caption,
                'duration_s': first.duration_s,
                'latent_mean': mean[i],
                'latent_std': std[i],
                'clip_features': features.get(i, empty)[0],
                'sync_features': features.get(i, empty)[1],
                'text_features': texts[i],
                'video_exists': i in features,
                'text_exists': bool(clip.caption.strip()),
            })) for i, (clip, _) in enumerate(batch)])
        return encoded

    def _text_features(self, captions: list[str]) -> list[np.ndarray]:
        """Features `[77, 1024]` of every caption, in the stored dtype."""
        missing = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        dtype = records.FEATURE_DTYPES[self._plan.targets[0].schema.feature_dtype]
        if missing:
            with np.errstate(over='ignore'):  # Schema.encode refuses what does not fit
                new = self._encoder.encode_text(missing).astype(dtype)
            self._texts.update(zip(missing, new))
        for caption in captions:
            self._texts.move_to_end(caption)
        features = [self._texts[caption] for caption in captions]
        while len(self._texts) > CAPTIONS_KEPT:
            self._texts.popitem(last=False)
        return features


def _padded(waveforms: list[np.ndarray], size: int) -> np.ndarray:
    """Stacked and filled up with silence to `size`."""
    stacked = np.stack(waveforms)
    return np.concatenate([stacked, np.zeros((size - len(stacked), *stacked.shape[1:]), stacked.dtype)])


def loaded_clips(workers, request: reading.Request, clips: Iterable[clips_lib.Clip],
                 ahead: int) -> Iterator[tuple[clips_lib.Clip, reading.Loaded]]:
    """Every clip as read by the worker processes, in order; about `ahead` of them wait in memory."""
    load = functools.partial(reading.load, request=request)
    for group, results in workers.in_order(load, reading.groups(clips), ahead, reading.crashed):
        yield from zip(group, results)


def extract_shard(plan: Plan, extractor: Extractor, shard: Shard, loaded: Iterator[tuple[clips_lib.Clip, reading.Loaded]],
                  device: concurrent.futures.Executor, report: Report) -> None:
    """Makes the records of a shard and then its note.

    Args:
      plan: of the set.
      extractor: made of the plan.
      shard: what to extract.
      loaded: its clips, in order, and possibly those of following shards.
      device: the thread that encodes, so that this one collects the next batch and writes the one before meanwhile.
      report: told how many more clips are done, and the reasons of those among them that were rejected.

    Raises:
      OSError: disk full.
      ValueError: a feature that is not finite.
    """
    rejected: list[dict[str, Any]] = []
    write_shard(plan, shard, _encoded(plan, extractor, shard, loaded, device, rejected, report), rejected, report)


def write_shard(plan: Plan, shard: Shard, batches: Iterable[tuple[Batch, list[list[Encoded]]]], rejected: list[dict[str, Any]],
                report: Report) -> None:
    """Writes a shard, whole or not at all.

    Args:
      plan, shard: see extract_shard.
      batches: clips with their records for each target.
      rejected: what could not be used, complete when `batches` ends.
      report: told how many clips of `batches` are written.
    """
    with contextlib.ExitStack() as stack:
        parts = [stack.enter_context(_Part(plan, target, shard)) for target in plan.targets]
        for batch, encoded in batches:
            for part, examples in zip(parts, encoded):
                part.write(batch, examples)
            report(len(batch), [])
        for part in parts:
            part.commit()
    for part in parts:
        write_json(part.target.note(shard), {'clips': part.lines, 'latents': part.sums, 'rejected': rejected})


class _Part:
    """A shard of one target while it is written; a context manager that removes what was not committed."""

    def __init__(self, plan: Plan, target: Target, shard: Shard):
        self._plan, self.target = plan, target
        name = records.shard_name(plan.name, shard.split, shard.number, shard.count)
        self._writer = records.ShardWriter(target.folder / name)
        self.lines: list[dict[str, Any]] = []
        self._sums = np.zeros((3, target.schema.shapes['latent_mean'][1]))

    def __enter__(self) -> '_Part':
        return self

    def __exit__(self, *_) -> None:
        self._writer.__exit__(*_)

    @property
    def sums(self) -> list[list[float]]:
        """Of the latents of every channel: how many, their sum and the sum of their squares."""
        return self._sums.tolist()

    def write(self, batch: Batch, examples: list[Encoded]) -> None:
        """Appends the records of a batch."""
        for (clip, loaded), example in zip(batch, examples):
            self._writer.write(example.record)
            self._sums += np.stack([np.full(example.latents.shape[1], len(example.latents)), example.latents.sum(axis=0),
                                    np.square(example.latents).sum(axis=0)])
            self.lines.append({'id': clip.id, 'split': clip.split, 'caption': clip.caption, 'label': clip.label,
                               'file': self._plan.shown(clip.sound), 'video': clip.video is not None, **loaded.measures,
                               'signature': near_duplicates.signature(example.latents)})

    def commit(self) -> None:
        """Makes the shard's file appear."""
        self._writer.commit()


def _encoded(plan: Plan, extractor: Extractor, shard: Shard, loaded: Iterator[tuple[clips_lib.Clip, reading.Loaded]],
             device: concurrent.futures.Executor, rejected: list[dict[str, Any]],
             report: Report) -> Iterator[tuple[Batch, list[list[Encoded]]]]:
    """Batches with their records; clips that cannot be used are added to `rejected`."""
    under_way: collections.deque = collections.deque()
    batch: Batch = []

    for clip, result in itertools.islice(loaded, len(shard.clips)):
        if result.rejected is not None:
            rejected.append({'id': clip.id, 'split': clip.split, 'file': plan.shown(clip.video or clip.sound),
                             'reason': result.rejected})
            report(1, [result.rejected])
            continue
        batch.append((clip, result))
        if len(batch) == plan.batch_size:
            under_way.append((batch, device.submit(extractor.encode, batch)))
            batch = []
        while len(under_way) > BATCHES_AHEAD or under_way and under_way[0][1].done():
            done, future = under_way.popleft()
            yield done, future.result()
    if batch:
        under_way.append((batch, device.submit(extractor.encode, batch)))
    for done, future in under_way:
        yield done, future.result()
