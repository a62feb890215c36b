"""Sounds of a whole split, made from its records by the run's network or an official one.

    WORKDIR/generated/<dataset>_<split>_<digest>/<id>.flac    and settings.json, which the digest is of; an id may hold slashes

So what is there is never of other weights, records, guidance or seed, and an interrupted job goes on where it stopped.
"""
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
import concurrent.futures
import functools
import hashlib
import itertools
import json
import pathlib
import time
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np

from mmaudio_jax import checkpoints
from mmaudio_jax import codec
from mmaudio_jax import encoders
from mmaudio_jax import fingerprints
from mmaudio_jax import hosts
from mmaudio_jax import input_pipeline
from mmaudio_jax import media
from mmaudio_jax import partitioning
from mmaudio_jax import pretrained
from mmaudio_jax import record_sampler
from mmaudio_jax import records
from mmaudio_jax import snapshots
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import synchformer_offset
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

Sampler = Callable[[Sequence_[record_sampler.Example], int], jax.Array]


def examples(config, data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The records of config.evaluate.dataset's split, at most config.evaluate.max_clips of them, one at a time."""
    split = input_pipeline.read_split(config, data / 'records', config.evaluate.dataset, config.evaluate.split)
    return itertools.islice(split, config.evaluate.max_clips or None)


class SyncFeatures(Mapping):
    """Id → {'segments': float32 [S, 8, 768]} of the records of a split: the picture features that DeSync compares with.

    They are of the same network and the same frames as those of the published scores, rounded to the records' dtype.
    """

    def __init__(self, config, data: pathlib.Path):
        """Opens config.evaluate.dataset's split; at most config.evaluate.max_clips of it, those with pictures.

        Raises:
          ValueError: records of another encoder. FileNotFoundError: no records.
        """
        if config.extract.encoder != 'official':
            raise ValueError(f"config.score.record_features needs records of the 'official' encoder, not of "
                             f'{config.extract.encoder!r} (config.extract.encoder)')
        self._source = records.load_source(data / 'records' / config.evaluate.dataset, config.evaluate.split,
                                           records.schema_of(config))
        self._places = {example['id']: place for place, example in enumerate(examples(config, data)) if example['video_exists']}

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        tokens = np.asarray(self._source[self._places[name]]['sync_features'], np.float32)
        return {'segments': tokens.reshape(-1, synchformer_offset.PICTURE_TOKENS, tokens.shape[-1])}

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def make_sampler(config, model: mmaudio.MMAudio, params: Any, sequence: Sequence, mesh: jax.sharding.Mesh, size: int,
                 decoder: codec.Codec) -> Sampler:
    """(a batch, the number of its first example) → its waveforms `[size, samples]`.

    As record_sampler.make has it, with the parameters on `mesh` and config.sampling.negative_prompt.
    """
    placed = partitioning.on_mesh(model, mesh, config)
    params = partitioning.spread(params, partitioning.state_shardings(mesh, params, config))
    weights, decode = decoder.program()
    weights = partitioning.spread(weights, partitioning.replicated(mesh))
    negative = None
    if config.sampling.negative_prompt:
        encoder = encoders.make(config.extract.encoder, sequence, store.loader(config.weights, config.weights.dtype))
        negative, = encoder.encode_text([config.sampling.negative_prompt])
    run = record_sampler.make(config, placed, mesh, sequence, size, decode)

    def sample_batch(batch: Sequence_[record_sampler.Example], first: int) -> jax.Array:
        _, waveforms = run(params, batch, first, negative, weights)
        return waveforms
    return sample_batch


def mesh_and_size(config) -> tuple[jax.sharding.Mesh, int]:
    """config.mesh, and config.sampling.batch_size, rounded up so that all devices have as many examples.

    For an official network, which may be scored on fewer devices than config.mesh is for, what fits of it."""
    axes = partitioning.fitted(config.mesh, jax.device_count()) if config.generate.pretrained else config.mesh
    mesh = partitioning.make_mesh(axes, config.sharding.slice_axis)
    return mesh, partitioning.rounded_up(mesh, config.sampling.batch_size, 'config.sampling.batch_size')


def sample(config, model: mmaudio.MMAudio, params: Any, split: Sequence_[record_sampler.Example], sequence: Sequence,
           decoder: codec.Codec) -> np.ndarray:
    """Waveforms of all examples, float32 `[len(split), …]` on every process, by `make_sampler`."""
    mesh, size = mesh_and_size(config)
    run, done = make_sampler(config, model, params, sequence, mesh, size, decoder), []
    for start in range(0, len(split), size):
        batch = split[start:start + size]
        done.append(hosts.to_host(run(batch, start))[:len(batch)])
        hosts.say(f'evaluate: sampled {min(start + size, len(split))} of {len(split)} clips')
    return np.concatenate(done)


def write(config, workdir: pathlib.Path) -> dict[str, pathlib.Path]:
    """Makes what is missing of the sounds of config.evaluate.dataset's split.

    The network is config.generate.pretrained, or that of workdir. Batches are split over all devices; every process writes
    what its devices make, and all must see the same workdir. Memory does not grow with the split.

    Returns:
      Id → sound, in the order of the records. The folder may hold others, of a larger config.evaluate.max_clips.

    Raises:
      ValueError: no network, one of another config, two records of one id, an id that is no place in a folder.
      FileNotFoundError: records or codec are missing.
    """
    started, data = time.monotonic(), pathlib.Path(config.data_dir or workdir)
    mesh, size = mesh_and_size(config)
    sequence = Sequence(**config.sequence)
    parts = _network(config, workdir, sequence)
    folder = _folder(config, workdir, data, parts)
    split = examples(config, data)

    @functools.cache
    def sampler() -> Sampler:  # made when the first missing sound is
        decoder = codec.make(parts.config['extract']['codec'], sequence, parts.codec_path, parts.load)
        return make_sampler(config, parts.model, parts.params, sequence, mesh, size, decoder)

    found: dict[str, pathlib.Path] = {}
    count = made = 0
    writing: list[concurrent.futures.Future] = []
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # writes a batch while the next is made
        while batch := list(itertools.islice(split, size)):
            paths = [place_of(folder, example['id'], '.flac') for example in batch]
            found |= {example['id']: path for example, path in zip(batch, paths)}
            first, count = count, count + len(batch)
            if not _anywhere(not all(path.is_file() for path in paths)):
                continue
            waveforms = sampler()(batch, first)
            _wait_for(writing)
            writing = [pool.submit(_write_sound, paths[row], waveform, sequence)
                       for row, waveform in hosts.own_rows(waveforms).items() if row < len(batch)]
            made += len(batch)
            hosts.say(f'score: made the sounds of {count} clips, {time.monotonic() - started:.0f} s')
        _wait_for(writing)
    _anywhere(False)  # nobody reads before all have written
    if len(found) < count:
        raise ValueError(f'{data / "records" / config.evaluate.dataset}: two records of its split {config.evaluate.split} have '
                         'one id; extract it again (--mode=extract)')
    hosts.say(f'score: {folder}: {count} sounds, {made} of them new')
    return found


def place_of(folder: pathlib.Path, name: str, suffix: str) -> pathlib.Path:
    """The file of the clip `name` in the folder, in folders of its own where the name has slashes.

    Raises:
      ValueError: the name leads out of the folder, or to a file of another name.
    """
    if not {'', '.', '..'}.isdisjoint(name.split('/')):
        raise ValueError(f'{folder}: cannot hold a file for the record {name!r}, whose id is no path inside of a folder; '
                         'change the id in its table and extract again (--mode=extract)')
    return folder / f'{name}{suffix}'


def _write_sound(path: pathlib.Path, waveform: np.ndarray, sequence: Sequence) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)  # of an id with slashes
    media.write_audio(path, np.asarray(waveform)[:sequence.samples], sequence.sample_rate_hz)


def _wait_for(writing: list[concurrent.futures.Future]) -> None:
    """Until all are written; raises what one of them raised."""
    for future in writing:
        future.result()


def _network(config, workdir: pathlib.Path, sequence: Sequence) -> pretrained.Pretrained:
    """The network that is scored, if it fits the config."""
    chosen = config.generate.pretrained
    step = pretrained.agreed_step(chosen) if chosen else snapshots.latest_agreed(workdir)
    parts = pretrained.find(chosen or workdir, variant=None, dtype=config.weights.dtype if chosen else None,
                            **store.places(config.weights), sigma_rel=config.ema.synthesis_sigma_rel, step=step,
                            data_dir=config.data_dir or None)
    if not chosen:
        checkpoints.check_config(parts.config, checkpoints.to_json(config), workdir / 'ema')
    elif parts.config['sequence']['rate'] != sequence.rate:
        raise ValueError(f'config.generate.pretrained: {chosen} is a network of {parts.config["sequence"]["rate"]}, but the '
                         f'records are of {sequence.rate} (config.sequence.rate)')
    elif parts.config['extract']['encoder'] != config.extract.encoder:
        raise ValueError(f'config.generate.pretrained: {chosen} knows features of the encoder '
                         f'{parts.config["extract"]["encoder"]!r}, but the records hold those of {config.extract.encoder!r} '
                         '(config.extract.encoder); score it on records that were extracted with its own')
    return parts


def _folder(config, workdir: pathlib.Path, data: pathlib.Path, parts: pretrained.Pretrained) -> pathlib.Path:
    """The folder of these sounds, with settings.json."""
    plain = checkpoints.to_json(config)
    plain['sampling'].pop('batch_size')
    source, places = config.generate.pretrained or workdir, store.places(config.weights)
    settings = {'network': parts.config, 'step': parts.step, 'pretrained': config.generate.pretrained,
                'sigma_rel': config.ema.synthesis_sigma_rel, 'sampling': plain['sampling'], 'sequence': plain['sequence'],
                'weights': fingerprints.of_weights(source, parts.name, parts.step, places),
                'records': fingerprints.of_records(config, data),
                'codec': fingerprints.of_codec(parts.config['extract']['codec'], config.sequence.rate, parts.codec_path,
                                               fingerprints.loaded_from(source, parts.step, places)),
                **fingerprints.of_negative_prompt(config)}
    text = json.dumps(settings, indent=1, sort_keys=True) + '\n'
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    folder = workdir / 'generated' / f'{config.evaluate.dataset}_{config.evaluate.split}_{digest}'
    folder.mkdir(parents=True, exist_ok=True)
    if jax.process_index() == 0:
        with media.atomic_file(folder / 'settings.json') as partial:
            partial.write_text(text)
    return folder


def _anywhere(condition: bool) -> bool:
    """Whether it holds on any process; all of them wait for each other."""
    if jax.process_count() == 1:
        return condition
    return bool(np.any(multihost_utils.process_allgather(np.array(condition))))
