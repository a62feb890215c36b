"""Clip tables → features by the frozen encoders → record sets; batched, in shards over processes and hosts, resumable.

    DATA_DIR/records/<name>/         a finished set (TFDS layout), with clips.jsonl: loudness, silence, label and file of every
                                     record; rejected.jsonl: the clips that could not be used; card.json and card.png
    DATA_DIR/records/.<name>.partial finished shards of a set in work; a killed run continues there
    DATA_DIR/records/codec.npz       the fitted pca codec, with codec.json: what it was fitted to
    DATA_DIR/<rate>/records/         the same for the other rates of config.extract.rates: the data_dir of runs at that rate
"""
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import json
import pathlib
from typing import Any, Iterator

import jax
from jax.experimental import multihost_utils
import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines import dataset_card
from data_pipelines import listing
from data_pipelines import memmaps
from data_pipelines import processes
from data_pipelines import reading
from data_pipelines import shards as shards_lib
from data_pipelines.set_in_work import in_use
from data_pipelines.set_in_work import is_done
from data_pipelines.set_in_work import SetInWork
from mmaudio_jax import codec as codec_lib
from mmaudio_jax import config_checks
from mmaudio_jax import encoders
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

CODEC_FIT_CLIPS = 512  # evenly spread over the table; more do not move the components
EXECUTORS = ('local', 'ray')


def extract(config, workdir: pathlib.Path) -> None:
    """Makes the tables of config.clips.datasets and the sets of config.extract.datasets that are not there.

    Args:
      config: its fields data_dir, sequence, clips, extract and weights are used.
      workdir: where media/ is read and records/ is made when config.data_dir is ''.

    Raises:
      FileNotFoundError: a dataset without tables.
      ValueError: a value that cannot be used, or a set that was made with other settings (names the field), a bad table, a
        split without any usable clip, more rejected clips than config.extract.max_rejected allows.
      OSError: disk full.
    """
    settings, root = config.extract, pathlib.Path(config.data_dir or workdir).absolute()
    config_checks.check(config)
    for field, names in (('executor', EXECUTORS), ('encoder', encoders.ENCODERS), ('codec', codec_lib.CODECS),
                         ('feature_dtype', records.FEATURE_DTYPES)):
        if settings[field] not in names:
            raise ValueError(f'config.extract.{field} is {settings[field]!r}; it must be one of {", ".join(names)}')
    if config.clips.datasets:
        listing.make_tables(config, root)
    if settings.memmaps:
        _write_cards('import', [root / 'records' / name for name in memmaps.import_sets(config, root, *_place(settings))])
    if not settings.datasets and (config.clips.datasets or settings.memmaps):
        return
    if not settings.datasets:
        raise ValueError("config.extract.datasets is empty; name (record set, folder of clip tables) pairs")
    places = _records_folders(config, root)
    folders = {name: root / folder for name, folder in settings.datasets}
    fitted_to = _fit_source(config, folders, places)
    made_with = {name: {'tables': clips_lib.digests(folder), 'codec_fitted_to': fitted_to,
                        **_frame_rule(settings.encoder, folder)} for name, folder in folders.items()}
    jobs: dict[str, dict[str, pathlib.Path]] = {}  # set → folder by rate
    for name in folders:
        for rate, place in places.items():
            if not is_done(place / name, _schema(config, rate), made_with[name]):
                jobs.setdefault(name, {})[rate] = place
    if not jobs:
        print(f'extract: {", ".join(folders)} are in {root / "records"}, nothing to extract', flush=True)
    with processes.Workers(settings.workers) as workers:
        for rate, place in places.items():
            if jobs and fitted_to:
                _fit_codec(workers, config, folders, {**fitted_to, **_clip_form(config, rate)}, place)
        for name, missing in jobs.items():
            targets = tuple(shards_lib.Target(_schema(config, rate), place / f'.{name}.partial', place / 'codec.npz')
                            for rate, place in missing.items())
            plan = shards_lib.Plan(name, root, targets, settings.batch_size, settings.workers,
                                   {'dtype': config.weights.dtype, **store.places(config.weights)})
            with SetInWork(plan, clips_lib.read_splits(folders[name]), made_with[name], settings.clips_per_shard,
                           settings.max_rejected) as work:
                work.make(*_place(settings), functools.partial(_make_shards, plan, settings, workers))
    for rate, place in places.items():
        if rate != config.sequence.rate:
            _link_tables(root, place)
    _write_cards('extract', [place / name for place in places.values() for name in folders])


def _records_folders(config, root: pathlib.Path) -> dict[str, pathlib.Path]:
    """Where the records of every rate go."""
    own = config.sequence.rate
    rates = tuple(config.extract.rates) or (own,)
    return {rate: root / 'records' if rate == own else root / rate / 'records' for rate in rates}


def _schema(config, rate: str) -> records.Schema:
    return dataclasses.replace(records.schema_of(config), rate=rate)


def _link_tables(root: pathlib.Path, place: pathlib.Path) -> None:
    """The clip tables beside the records of another rate, where evaluation looks for them."""
    link = place.parent / 'media'
    if not link.exists() and (root / 'media').is_dir():
        with contextlib.suppress(OSError):  # a file system without links: evaluation says which table it lacks
            link.symlink_to('../media')


def _frame_rule(encoder: str, tables: pathlib.Path) -> dict[str, str]:
    """What sets with videos of the official encoder say of their frames, because early ones hold others."""
    if encoder != 'official':
        return {}
    clips = itertools.chain.from_iterable(clips_lib.read_splits(tables).values())
    return {'frames': 'nearest'} if any(clip.video is not None for clip in clips) else {}


def _place(settings) -> tuple[int, int]:
    """This process's index and the number of processes that share the shards."""
    if not settings.process_count:
        if settings.process_index and jax.process_count() == 1:  # else every task of an array would make all shards
            raise ValueError(f'config.extract.process_index is {settings.process_index}, but config.extract.process_count is '
                             '0; set it to the number of processes that share the work')
        return jax.process_index(), jax.process_count()
    if not 0 <= settings.process_index < settings.process_count:
        raise ValueError(f'config.extract.process_index is {settings.process_index}; of {settings.process_count} processes it '
                         f'must be one of 0 to {settings.process_count - 1}')
    return settings.process_index, settings.process_count


def _make_shards(plan: shards_lib.Plan, settings, workers: processes.Workers, missing: list[shards_lib.Shard],
                 report: shards_lib.Report) -> None:
    """By config.extract.executor."""
    if settings.executor == 'ray':
        _ray_executor().run(plan, missing, settings, report)
    else:
        _extract_here(plan, missing, workers, report)


def _ray_executor():
    """The module, which needs an optional package."""
    try:
        from data_pipelines import ray_executor
    except ModuleNotFoundError as error:
        raise ValueError(f"config.extract.executor is 'ray', but {error.name} is not installed; pip install "
                         "-e '.[ray]', or take 'local'") from error
    return ray_executor


def _extract_here(plan: shards_lib.Plan, missing: list[shards_lib.Shard], workers: processes.Workers,
                  report: shards_lib.Report) -> None:
    """Extracts shards on this machine: worker processes decode, this one encodes and writes."""
    extractor = shards_lib.Extractor(plan)
    clips = (clip for shard in missing for clip in shard.clips)
    loaded = shards_lib.loaded_clips(workers, extractor.request, clips, plan.batch_size + 2 * plan.workers)
    with concurrent.futures.ThreadPoolExecutor(1) as device:
        for shard in missing:
            shards_lib.extract_shard(plan, extractor, shard, loaded, device, report)


def _fit_source(config, folders: dict[str, pathlib.Path], places: dict[str, pathlib.Path]) -> dict[str, str] | None:
    """What the codec is fitted to: the dataset and the digest of its training table; None for a codec with weights.

    A dataset that is not one of `folders` is taken at the word of the codecs that are there already."""
    if config.extract.codec != 'pca':
        return None
    name = config.extract.codec_fit_dataset
    if name in folders:
        table = clips_lib.digests(folders[name]).get('train')
        if table is None:
            raise FileNotFoundError(f'{folders[name] / "train.jsonl"}: missing; the pca codec is fitted to it')
        return {'dataset': name, 'table': table}
    table = _fitted(next(iter(places.values()))).get('table')
    for rate, place in places.items():
        if _fitted(place) != {'dataset': name, 'table': table, **_clip_form(config, rate)}:
            raise ValueError(f'config.extract.codec_fit_dataset is {name!r}, which is not one of config.extract.datasets: '
                             f'{", ".join(folders)}; nor was {place / "codec.npz"} fitted to it at {rate} and '
                             f'{config.sequence.duration_s:g} s, which could serve again')
    return {'dataset': name, 'table': table}


def _clip_form(config, rate: str) -> dict[str, Any]:
    """The form of the clips that a codec is fitted to."""
    return {'rate': rate, 'duration_s': config.sequence.duration_s}


def _fitted(place: pathlib.Path) -> dict[str, Any]:
    """What the codec of a records folder was fitted to; empty when there is none."""
    note = place / 'codec.json'
    return json.loads(note.read_text(encoding='utf-8')) if note.is_file() and (place / 'codec.npz').is_file() else {}


def _check_refit(place: pathlib.Path, fitted_to: dict[str, Any]) -> None:
    """Raises ValueError for a finished set whose latents only another codec decodes: there is one for the folder."""
    for file in sorted(place.glob(f'[!.]*/{records.METADATA_FILE}')):
        stored = records.read_metadata(file.parent)
        source = stored['made_with'].get('codec_fitted_to')
        if source and {**source, 'rate': stored['rate'], 'duration_s': stored['duration_s']} != fitted_to:
            raise ValueError(f'{file.parent}: its latents are those of a codec that was fitted to {source["dataset"]!r} '
                             f'({stored["duration_s"]:g} s, table {source["table"][:8]}); fitting {place / "codec.npz"} to '
                             f'{fitted_to["dataset"]!r} ({fitted_to["duration_s"]:g} s, table {fitted_to["table"][:8]}) would '
                             'make them sound wrong; correct config.extract.codec_fit_dataset, choose another workdir, or '
                             'delete the set')


def _fit_codec(workers: processes.Workers, config, folders: dict[str, pathlib.Path], fitted_to: dict[str, Any],
               place: pathlib.Path) -> None:
    """Fits the pca codec, unless codec.npz is there and fitted to the same clips. Every process that finds none fits it: the
    result is the same, and none has to wait for another."""
    others = in_use(place)  # asked first: those who work had a codec before
    if _fitted(place) == fitted_to:
        return
    if others:
        raise ValueError(f'{place}: another process is extracting {", ".join(others)} there, with a codec that was fitted to '
                         'something else; wait for its end, or choose another workdir')
    _check_refit(place, fitted_to)
    sequence = Sequence(fitted_to['rate'], fitted_to['duration_s'])
    path, note = place / 'codec.npz', place / 'codec.json'
    place.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)
    table = clips_lib.read_table(folders[fitted_to['dataset']] / 'train.jsonl')
    count = min(len(table), CODEC_FIT_CLIPS)
    chosen = [table[i * len(table) // count] for i in range(count)]
    request = reading.Request((), sequence.duration_s, ((sequence.sample_rate_hz, sequence.waveform_length),))
    rejected: list[str] = []
    waveforms = _waveforms(workers, chosen, request, config.extract.batch_size, rejected)
    told = lambda: (f'{len(rejected)} of the {count} clips of {fitted_to["dataset"]} that the pca codec is fitted to were '
                    f'rejected; the first: {rejected[0]}')
    try:
        codec_lib.fit_pca(waveforms, sequence, path)
    except ValueError as error:
        raise ValueError(f'{told()}. {error}' if rejected else str(error)) from error
    if rejected:
        print(f'extract: {told()}', flush=True)
    shards_lib.write_json(note, fitted_to)
    print(f'extract: pca codec fitted to {count} clips of {fitted_to["dataset"]} at {sequence.rate}', flush=True)


def _waveforms(workers: processes.Workers, chosen: list[clips_lib.Clip], request: reading.Request,
               batch_size: int, rejected: list[str]) -> Iterator[np.ndarray]:
    """The sound of the clips that can be read, in batches `[B, samples]`; file and reason of the others go to `rejected`."""
    batch: list[Any] = []
    for clip, loaded in shards_lib.loaded_clips(workers, request, chosen, 2 * batch_size):
        if loaded.rejected is None:
            batch.append(loaded.waveforms[0])
        else:
            rejected.append(f'{clip.sound}: {loaded.rejected}')
        if len(batch) == batch_size:
            yield np.stack(batch)
            batch = []
    if batch:
        yield np.stack(batch)


def _write_cards(job: str, sets: list[pathlib.Path]) -> None:
    """Writes the cards that are missing when the sets are whole, which what follows needs, too: under jax.distributed all hosts
    wait for each other, and the first one writes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(job)
    if jax.process_index() == 0:
        dataset_card.write_missing(sets)
