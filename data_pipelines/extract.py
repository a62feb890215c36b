"""Clip tables → features by the frozen encoders → record sets; batched, in shards over the hosts, resumable.

    DATA_DIR/records/<name>/         a finished set (TFDS layout), with rejected.jsonl: the clips that could not be used
    DATA_DIR/records/.<name>.partial finished shards of a set in work; a killed run continues there
    DATA_DIR/records/codec.npz       the fitted pca codec, with codec.json: what it was fitted to
"""
import dataclasses
import functools
import json
import pathlib
import shutil
import sys
import time
from typing import Any, Iterator

import jax
from jax.experimental import multihost_utils
import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines import processes
from mmaudio_jax import codec as codec_lib
from mmaudio_jax import encoders
from mmaudio_jax import media
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence

CODEC_FIT_CLIPS = 512  # evenly spread over the table; more do not move the components
PROGRESS_FOLDER = 'progress'  # of a set in work: one JSON file a finished shard
PROGRESS_S = 5.0  # between two lines when the output is no terminal


@dataclasses.dataclass(frozen=True)
class Shard:
    """Part of a split: its number, of how many, and its clips."""
    split: str
    number: int
    count: int
    clips: tuple[clips_lib.Clip, ...]


class Progress:
    """One line that tells how far and how long still; rewritten in place on a terminal."""

    def __init__(self, name: str, total: int):
        self._name, self._total, self._done = name, total, 0
        self._started = self._shown = time.monotonic()

    def add(self, clips: int) -> None:
        """Counts clips that are done and shows the line now and then."""
        self._done += clips
        terminal, now = sys.stdout.isatty(), time.monotonic()
        last = self._done == self._total
        if not last and now - self._shown < (0.2 if terminal else PROGRESS_S):
            return
        self._shown = now
        rate = self._done / max(now - self._started, 1e-9)
        line = (f'extract {self._name}: {self._done} of {self._total} clips, {rate:.1f} clips/s, '
                f'{(self._total - self._done) / rate:.0f} s left')
        print(f'\r{line}   ' if terminal else line, end='' if terminal and not last else '\n', flush=True)


def extract(config, workdir: pathlib.Path) -> None:
    """Makes every set of config.extract.datasets that is not there.

    Args:
      config: its fields data_dir, sequence and extract are used.
      workdir: where media/ is read and records/ is made when config.data_dir is ''.

    Raises:
      FileNotFoundError: a dataset without tables.
      ValueError: a set that was made with other settings (names the field), a bad table, a split without any usable clip.
      OSError: disk full.
    """
    settings, root = config.extract, pathlib.Path(config.data_dir or workdir)
    if not settings.datasets:
        raise ValueError("config.extract.datasets is empty; name (record set, folder of clip tables) pairs")
    schema = records.schema_of(config)
    sequence = Sequence(schema.rate, schema.duration_s)
    encoder = encoders.make(settings.encoder, sequence)
    folders = {name: root / folder for name, folder in settings.datasets}
    fitted_to = _fit_source(settings, folders)
    made_with = {name: {'tables': clips_lib.digests(folder), 'codec_fitted_to': fitted_to} for name, folder in folders.items()}
    missing = [name for name in folders if not _is_done(root / 'records' / name, schema, made_with[name])]
    if not missing:
        print(f'extract: {", ".join(folders)} are in {root / "records"}, nothing to extract', flush=True)
        return
    with processes.start(settings.workers) as pool:
        try:
            _fit_codec(pool, config, folders, sequence, root / 'records')
            codec = codec_lib.make(settings.codec, sequence, root / 'records' / 'codec.npz')
            for name in missing:
                job = _Extraction(pool, settings, schema, encoder, codec, name, root / 'records', made_with[name])
                job.run(clips_lib.read_splits(folders[name]))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fit_source(settings, folders: dict[str, pathlib.Path]) -> dict[str, str] | None:
    """What the codec is fitted to: the dataset and the digest of its training table; None for a codec with weights."""
    if settings.codec != 'pca':
        return None
    name = settings.codec_fit_dataset
    if name not in folders:
        raise ValueError(f'config.extract.codec_fit_dataset is {name!r}, which is not one of config.extract.datasets: '
                         f'{", ".join(folders)}')
    table = clips_lib.digests(folders[name]).get('train')
    if table is None:
        raise FileNotFoundError(f'{folders[name] / "train.jsonl"}: missing; the pca codec is fitted to it')
    return {'dataset': name, 'table': table}


def _is_done(folder: pathlib.Path, schema: records.Schema, made_with: dict[str, Any]) -> bool:
    """Whether the set is there; ValueError when it is, but was made with other settings or clips."""
    if not folder.is_dir():
        return False
    records.check_metadata(folder, schema)
    stored = records.read_metadata(folder)['made_with']
    for field, value in made_with.items():
        if stored.get(field) != value:
            what = 'other clip tables' if field == 'tables' else 'a codec that was fitted to other clips (codec_fit_dataset)'
            raise ValueError(f'{folder}: was made with {what}; delete it to extract the set again, or choose another workdir')
    return True


def _write_json(path: pathlib.Path, value: Any) -> None:
    """Writes a JSON file, whole or not at all."""
    with media.atomic_file(path) as beside:
        beside.write_text(json.dumps(value, ensure_ascii=False) + '\n', encoding='utf-8')


def _fit_codec(pool, config, folders: dict[str, pathlib.Path], sequence: Sequence, records_dir: pathlib.Path) -> None:
    """Fits the pca codec, unless codec.npz is there and fitted to the same clips; by the first host, the others wait."""
    source = _fit_source(config.extract, folders)
    if source is None:
        return
    fitted_to = {**source, 'rate': sequence.rate, 'duration_s': sequence.duration_s}
    path, note = records_dir / 'codec.npz', records_dir / 'codec.json'
    same = path.is_file() and note.is_file() and json.loads(note.read_text()) == fitted_to
    if not same and jax.process_index() == 0:
        records_dir.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        table = clips_lib.read_table(folders[source['dataset']] / 'train.jsonl')
        count = min(len(table), CODEC_FIT_CLIPS)
        chosen = [table[i * len(table) // count] for i in range(count)]
        request = clips_lib.Request((), sequence.duration_s, sequence.sample_rate_hz, sequence.waveform_length)
        codec_lib.fit_pca(_waveforms(pool, chosen, request, config.extract.batch_size), sequence, path)
        _write_json(note, fitted_to)
        print(f'extract: pca codec fitted to {count} clips of {source["dataset"]}', flush=True)
    _wait_for_all_hosts('codec')


def _waveforms(pool, chosen: list[clips_lib.Clip], request: clips_lib.Request, batch_size: int) -> Iterator[np.ndarray]:
    """The sound of the clips that can be read, in batches `[B, samples]`."""
    batch = []
    for _, loaded in processes.in_order(pool, functools.partial(clips_lib.load, request=request), chosen, 2 * batch_size):
        if loaded.waveform is not None:
            batch.append(loaded.waveform)
        if len(batch) == batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _wait_for_all_hosts(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'extract {name}')


class _Extraction:
    """Makes one set."""

    def __init__(self, pool, settings, schema: records.Schema, encoder: encoders.Encoder, codec: codec_lib.Codec, name: str,
                 records_dir: pathlib.Path, made_with: dict[str, Any]):
        self._pool, self._settings, self._schema = pool, settings, schema
        self._encoder, self._codec, self._name = encoder, codec, name
        self._folder = records_dir / name
        self._partial = records_dir / f'.{name}.partial'
        self._progress_folder = self._partial / PROGRESS_FOLDER
        self._made_with = made_with
        sequence = Sequence(schema.rate, schema.duration_s)
        self._request = clips_lib.Request(encoder.frame_requests, schema.duration_s, sequence.sample_rate_hz,
                                          sequence.waveform_length)

    def run(self, splits: dict[str, list[clips_lib.Clip]]) -> None:
        """Extracts the shards that are missing, then makes the folder a set."""
        started = time.monotonic()
        shards = [shard for split, table in splits.items() for shard in self._shards(split, table)]
        if jax.process_index() == 0:
            self._prepare()
        _wait_for_all_hosts(f'{self._name} prepared')
        if not (self._partial / records.METADATA_FILE).is_file():  # else all but the last rename was done
            self._extract_missing(shards)
        _wait_for_all_hosts(f'{self._name} extracted')
        if jax.process_index() == 0:
            kept, rejected = self._finish(shards)
            note = f'{rejected} clips rejected, see {self._folder / "rejected.jsonl"}' if rejected else 'no clip rejected'
            took = time.monotonic() - started
            print(f'extract {self._name}: {kept} records in {self._folder}, {took:.0f} s; {note}', flush=True)
        _wait_for_all_hosts(f'{self._name} finished')

    def _shards(self, split: str, table: list[clips_lib.Clip]) -> list[Shard]:
        size = self._settings.clips_per_shard
        count = -(-len(table) // size)
        return [Shard(split, i, count, tuple(table[i * size:(i + 1) * size])) for i in range(count)]

    def _prepare(self) -> None:
        """Keeps the work of a killed run, unless it was made with other settings or clips."""
        settings = {**self._schema.metadata(), 'made_with': self._made_with, 'clips_per_shard': self._settings.clips_per_shard}
        path = self._progress_folder / 'made_with.json'
        if self._partial.is_dir():
            whole = self._partial / records.METADATA_FILE
            stored: dict[str, Any] = next((json.loads(file.read_text()) for file in (whole, path) if file.is_file()), {})
            if {**settings, **stored} == settings and stored:
                return
            print(f'extract {self._name}: unfinished shards of other settings or clips are deleted', flush=True)
            shutil.rmtree(self._partial)
        self._progress_folder.mkdir(parents=True)
        _write_json(path, settings)

    def _note(self, shard: Shard) -> pathlib.Path:
        """The file that says that a shard is finished."""
        return self._progress_folder / f'{shard.split}-{shard.number:05d}.json'

    def _extract_missing(self, shards: list[Shard]) -> None:
        mine = shards[jax.process_index()::jax.process_count()]
        missing = [shard for shard in mine if not self._note(shard).is_file()]
        if len(missing) < len(mine):
            print(f'extract {self._name}: {len(mine) - len(missing)} of {len(mine)} shards are there', flush=True)
        jobs = [clip for shard in missing for clip in shard.clips]
        progress = Progress(self._name, len(jobs))
        load = functools.partial(clips_lib.load, request=self._request)
        loaded = processes.in_order(self._pool, load, jobs, 2 * self._settings.batch_size + self._settings.workers)
        for shard in missing:
            rejected: list[dict[str, str]] = []
            encoded = list(self._encode(shard, loaded, rejected, progress))
            path = self._partial / records.shard_name(self._name, shard.split, shard.number, shard.count)
            records.write_shard(path, encoded)
            _write_json(self._note(shard), {'records': len(encoded), 'rejected': rejected})

    def _encode(self, shard: Shard, loaded, rejected: list[dict[str, str]], progress: Progress) -> Iterator[bytes]:
        """The records of one shard; takes its clips from `loaded` and adds those that cannot be used to `rejected`."""
        batch = []
        for place in range(len(shard.clips)):
            clip, result = next(loaded)
            if result.rejected is None:
                batch.append((clip, result))
            else:
                rejected.append({'id': clip.id, 'split': clip.split, 'reason': result.rejected})
                progress.add(1)
            if batch and (len(batch) == self._settings.batch_size or place == len(shard.clips) - 1):
                yield from self._encode_batch(batch)
                progress.add(len(batch))
                batch = []

    def _encode_batch(self, batch: list[tuple[clips_lib.Clip, clips_lib.Loaded]]) -> Iterator[bytes]:
        """Records of a batch; every clip's features are those it would have alone."""
        size = self._settings.batch_size
        mean, std = self._codec.encode(_padded([loaded.waveform for _, loaded in batch], size))
        text = self._encoder.encode_text([clip.caption for clip, _ in batch])
        with_video = [i for i, (_, loaded) in enumerate(batch) if loaded.frames is not None]
        features = {}
        if with_video:
            streams = zip(*(batch[i][1].frames for i in with_video))
            clip_features, sync_features = self._encoder.encode_video(*(_padded(stream, size) for stream in streams))
            features = {i: (clip_features[k], sync_features[k]) for k, i in enumerate(with_video)}
        shapes = self._schema.shapes
        empty = np.zeros(shapes['clip_features'], np.float32), np.zeros(shapes['sync_features'], np.float32)
        for i, (clip, _) in enumerate(batch):
            clip_feature, sync_feature = features.get(i, empty)
            yield self._schema.encode({
                'id': clip.id,
                'caption': clip.caption,
                'duration_s': self._schema.duration_s,
                'latent_mean': mean[i],
                'latent_std': std[i],
                'clip_features': clip_feature,
                'sync_features': sync_feature,
                'text_features': text[i],
                'video_exists': i in features,
                'text_exists': bool(clip.caption.strip()),
            })

    def _finish(self, shards: list[Shard]) -> tuple[int, int]:
        """Turns the finished shards into a set; returns the numbers of records and of rejected clips."""
        if not (self._partial / records.METADATA_FILE).is_file():
            notes = [(shard, json.loads(self._note(shard).read_text())) for shard in shards]
            lengths: dict[str, list[int]] = {}
            for shard, note in notes:
                lengths.setdefault(shard.split, []).append(note['records'])
            for split, counts in lengths.items():
                if not sum(counts):
                    reason = next(note['rejected'][0]['reason'] for shard, note in notes if shard.split == split)
                    shutil.rmtree(self._partial)  # so that the next run reads the corrected files
                    raise ValueError(f'no clip of {self._name}, split {split}, can be used; the first: {reason}')
            rejected = [json.dumps(entry, ensure_ascii=False) + '\n' for _, note in notes for entry in note['rejected']]
            (self._partial / 'rejected.jsonl').write_text(''.join(rejected), encoding='utf-8')
            for leftover in self._partial.glob('.*'):
                leftover.unlink()  # half shards of a run that was killed
            records.write_metadata(self._partial, self._name, self._schema, lengths, self._made_with)
        shutil.rmtree(self._progress_folder, ignore_errors=True)
        self._partial.rename(self._folder)
        info = json.loads((self._folder / 'dataset_info.json').read_text())
        kept = sum(int(length) for split in info['splits'] for length in split['shardLengths'])
        return kept, len((self._folder / 'rejected.jsonl').read_text().splitlines())


def _padded(arrays, size: int) -> np.ndarray:
    """Stacked and filled up with zeros to `size`, so that one compiled function serves every batch."""
    stacked = np.stack(arrays)
    return np.concatenate([stacked, np.zeros((size - len(stacked), *stacked.shape[1:]), stacked.dtype)])
