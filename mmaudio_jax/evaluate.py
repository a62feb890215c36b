"""--mode=evaluate: sounds for a split, their onsets against the truth, and the controls that keep the figures honest.

    generated                what the network makes of each clip's video and caption, decoded
    shuffled                 the same sounds against the truth of other clips: what timing by chance scores
    codec                    the codec's own reconstruction of the true latents: the ceiling of anything generated with it
    truth                    the true sound: the ceiling of the onset detector (it also hears what is off screen)
"""
from collections.abc import Mapping
import concurrent.futures
import hashlib
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np

from mmaudio_jax import checkpoints
from mmaudio_jax import codec
from mmaudio_jax import fingerprints
from mmaudio_jax import hosts
from mmaudio_jax import media
from mmaudio_jax import metrics
from mmaudio_jax import mux
from mmaudio_jax import plots
from mmaudio_jax import score
from mmaudio_jax import score_inputs
from mmaudio_jax import snapshots
from mmaudio_jax import split_sounds
from mmaudio_jax import tables
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store

REPORT_VERSION = 1
ROWS = ('generated', 'shuffled', 'codec', 'truth')
SHUFFLE_SEED = 0  # of the control: always the same pairs, so that runs compare
# Sections and fields that change figures, of those that training does not depend on.
_WITH_INFLUENCE = ('sampling', 'evaluate', 'ema.synthesis_sigma_rel')
Row = Mapping[str, Any]


def evaluate(config, workdir: pathlib.Path) -> None:
    """Samples config.evaluate.dataset's split, scores it, prints the table and writes workdir/report.json.

    The batches are split over all devices; every process samples and decodes, the first one decodes the true latents (the row
    'codec'), scores and writes. Clips to look at are in workdir/generated/<split>. A report of the same config, weights and
    data is left as it is; any other is replaced.

    Args:
      config: the whole configuration, of the run in workdir but for what training does not depend on.
      workdir: of a training run.

    Raises:
      ValueError: no trained network, one of another config, a split without onset times, or sounds that are not finite.
      FileNotFoundError: records, codec or the table of the split are missing.
    """
    if config.score.generated or config.score.compare or config.score.sample:
        score.score(config, workdir)
        return
    started = time.monotonic()
    data = pathlib.Path(config.data_dir or workdir)
    step = snapshots.latest_agreed(workdir)
    identity, path = _identity(config, workdir, data, step), workdir / 'report.json'
    if hosts.agreed(_matches(path, identity)):
        _mark_as_last(path, workdir / 'scores.json')
        hosts.say(f'evaluate: {path} is of step {step}, this config and these data, nothing to do')
        return
    params, trained = snapshots.load_params(workdir, config.ema.synthesis_sigma_rel, step)
    checkpoints.check_config(trained, checkpoints.to_json(config), workdir / 'ema')
    examples = list(split_sounds.examples(config, data))
    table_path = _table_path(config, data)
    rows = _rows(table_path, [example['id'] for example in examples])
    sequence = Sequence(config.sequence.rate, config.sequence.duration_s)
    codec_path = data / 'records' / 'codec.npz'
    snapshots.check_codec(workdir, step, codec_path)
    decoder = codec.make(config.extract.codec, sequence, codec_path, store.loader(config.weights))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:  # reads the true sounds while others are sampled
        reading = pool.submit(_true_sounds, table_path, rows, sequence) if jax.process_index() == 0 else None
        generated = split_sounds.sample(config, mmaudio.build(config.model, sequence), params, examples, sequence, decoder)
    sampled = time.monotonic()
    if reading is None:
        return
    _check_finite(examples, generated)
    decoded = _decoded_truth(config, decoder, examples)
    sounds = {'generated': list(generated[:, :sequence.samples]), 'codec': list(decoded[:, :sequence.samples]),
              'truth': reading.result()}
    scores, onsets = onset_scores(config.evaluate, sounds, [row['onset_times_s'] for row in rows], sequence)
    _save_clips(config, workdir, table_path, rows, sounds, onsets, sequence)
    report = {
        **identity, 'sigma_rel': config.ema.synthesis_sigma_rel,
        'dataset': config.evaluate.dataset, 'split': config.evaluate.split, 'clips': len(examples),
        'seeds': {'training': config.seed, 'sampling': config.sampling.seed, 'shuffle': SHUFFLE_SEED},
        'quoted_window_s': config.evaluate.onset_windows_s[0], 'onsets': scores,
        'seconds': {'sampling': round(sampled - started, 1), 'total': round(time.monotonic() - started, 1)},
        'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
        'versions': score.versions(), 'config': checkpoints.to_json(config),
    }
    with media.atomic_file(path) as beside:
        beside.write_text(json.dumps(report, indent=1) + '\n')
    print(table(report), flush=True)
    print(f'evaluate: {len(examples)} clips in {report["seconds"]["total"]:.0f} s; every figure is in {path}', flush=True)


def _check_finite(examples: list[Any], sounds: Any) -> None:
    broken = [example['id'] for example, sound in zip(examples, sounds, strict=True) if not np.isfinite(sound).all()]
    if broken:
        raise ValueError(f'{len(broken)} of {len(examples)} generated sounds are not finite, first that of {broken[0]!r}: '
                         'lower config.sampling.guidance, or train again with a lower config.optimizer.learning_rate')


def onset_scores(options, sounds: Mapping[str, list[np.ndarray]], truths: list[list[float]],
                 sequence: Sequence) -> tuple[dict[str, dict], dict[str, list[metrics.Onsets]]]:
    """Onset scores of every row and window, and the onsets that were found.

    Args:
      options: config.evaluate.
      sounds: 'generated', 'codec' and 'truth' to one waveform [samples] a clip.
      truths: true onsets of each clip, seconds.
      sequence: rate and duration of the waveforms.

    Returns:
      ({window in seconds as text: {row: metrics.aggregate}}, {sound: onsets of each clip}). With a single clip there is
      nothing to shuffle, and that row is left out.
    """
    onsets = {name: [metrics.detect_onsets(waveform, sequence.sample_rate_hz, options.onset_delta, options.onset_lag_s)
                     for waveform in waveforms] for name, waveforms in sounds.items()}
    truths = [[time_s for time_s in truth if time_s < sequence.duration_s] for truth in truths]
    others = [truths[other] for other in derangement(len(truths), SHUFFLE_SEED)]
    pairs = {name: (found, truths) for name, found in onsets.items()}
    if others:
        pairs['shuffled'] = (onsets['generated'], others)
    scores = {f'{window:g}': {name: metrics.aggregate([metrics.score_onsets(found, truth, window)
                                                       for found, truth in zip(*pairs[name], strict=True)])
                              for name in ROWS if name in pairs} for window in options.onset_windows_s}
    return scores, onsets


def derangement(count: int, seed: int) -> list[int]:
    """A permutation of range(count) that leaves nothing in its place (one cycle, Sattolo 1986); [] when there is none."""
    if count < 2:
        return []
    generator, items = np.random.default_rng(seed), list(range(count))
    for last in range(count - 1, 0, -1):
        other = int(generator.integers(last))
        items[last], items[other] = items[other], items[last]
    return items


def table(report: Mapping[str, Any]) -> str:
    """The onset scores as Markdown: the mean over clips of each rate, the median error over all matched onsets."""
    lines = ['| sound | window ± s | F1 | accuracy | precision | AP | median error ms |', '|---|---|---|---|---|---|---|']
    for window, rows in report['onsets'].items():
        for name, row in rows.items():
            rates = [f'{row["macro"][key]:.3f}' for key in ('f1', 'accuracy', 'precision', 'average_precision')]
            error = '' if row['median_error_ms'] is None else f'{row["median_error_ms"]:.1f}'
            lines.append(f'| {name} | {window} | {" | ".join(rates)} | {error} |')
    return '\n'.join(lines)


def _identity(config, workdir: pathlib.Path, data: pathlib.Path, step: int) -> dict[str, Any]:
    """What a report depends on. The data count by their content: a folder that moved is still the same."""
    counted = checkpoints.without_free_fields(config, _WITH_INFLUENCE)
    counted['sampling'].pop('batch_size')
    digest = hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()
    places = store.places(config.weights)
    return {
        'report_version': REPORT_VERSION, 'fingerprint': digest, 'step': step,
        'weights': fingerprints.of_weights(workdir, config.name, step, places),
        'records': fingerprints.of_records(config, data),
        'codec': fingerprints.of_codec(config.extract.codec, config.sequence.rate, data / 'records' / 'codec.npz', places),
        'encoder': None, **fingerprints.of_negative_prompt(config),
        'table': fingerprints.of_file(_table_path(config, data)),
    }


def _matches(path: pathlib.Path, identity: Mapping[str, Any]) -> bool:
    try:
        report = json.loads(path.read_text())
    except (OSError, ValueError):
        return False
    return all(report.get(name) == value for name, value in identity.items())


def _mark_as_last(report: pathlib.Path, scores: pathlib.Path) -> None:
    """Makes the report the newer of the two: ablations take the figures that were asked for last."""
    if jax.process_index() == 0 and scores.is_file() and scores.stat().st_mtime_ns >= report.stat().st_mtime_ns:
        report.touch()


def _table_path(config, data: pathlib.Path) -> pathlib.Path:
    return data / 'media' / config.evaluate.dataset / f'{config.evaluate.split}.jsonl'


def _rows(path: pathlib.Path, ids: list[str]) -> list[Row]:
    """The table's entries of the clips `ids`, with their true onsets."""
    if not path.is_file():
        raise FileNotFoundError(f'{path}: the table with the true onset times is missing; --mode=impacts makes that of impacts')
    by_id = {str(row.get('id')): row for row in score_inputs.table_rows(path)}
    missing = [name for name in ids if name not in by_id]
    if missing:
        raise ValueError(f'{path} has no entry for {missing[0]!r} and {len(missing) - 1} other records: '
                         'extract again (--mode=extract), or restore the table')
    for name in ids:
        if 'onset_times_s' not in by_id[name]:
            raise ValueError(f'{path}: {name!r} has no onset_times_s; onsets can only be scored against known ones. For the '
                             'metrics of the paper set --config.score.sample=True (docs/evaluation.md)')
    return [by_id[name] for name in ids]


def _true_sounds(table_path: pathlib.Path, rows: list[Row], sequence: Sequence) -> list[np.ndarray]:
    """One waveform [samples] a row of the table at `table_path`, cut to the duration."""
    return [media.read_audio(tables.beside(table_path, row['audio'] or row['video']), sequence.sample_rate_hz,
                             row.get('start_s') or 0.0, sequence.duration_s) for row in rows]


def _decoded_truth(config, decoder: codec.Codec, examples: list[dict]) -> np.ndarray:
    """What the codec makes of the true latents: waveforms `[clips, samples]`."""
    latents = np.stack([np.asarray(example['latent_mean'], np.float32) for example in examples])
    size = config.sampling.batch_size
    return np.concatenate([decoder.decode(latents[start:start + size]) for start in range(0, len(latents), size)])


def _save_clips(config, workdir: pathlib.Path, table_path: pathlib.Path, rows: list[Row],
                sounds: Mapping[str, list[np.ndarray]], onsets: Mapping[str, list[metrics.Onsets]],
                sequence: Sequence) -> None:
    """The first clips as mp4 with the new sound, and as spectrograms with the true and the found onsets."""
    folder = workdir / 'generated' / config.evaluate.split
    for index, row in enumerate(rows[:config.evaluate.save_clips]):
        generated = sounds['generated'][index]
        sound, picture, clip = (split_sounds.place_of(folder, row['id'], suffix) for suffix in ('.flac', '.png', '.mp4'))
        clip.parent.mkdir(parents=True, exist_ok=True)
        if row['video'] and not row.get('start_s'):  # a later part of a video cannot be copied without its beginning
            mux.write_video(tables.beside(table_path, row['video']), generated, sequence.sample_rate_hz, clip)
        else:
            media.write_audio(sound, generated, sequence.sample_rate_hz)
        titles = {f'generated: {row["caption"]}': generated, 'true sound': sounds['truth'][index]}
        marks = {'true onsets': row['onset_times_s'], 'found in the generated sound': onsets['generated'][index].times_s}
        plots.spectrogram(picture, titles, sequence.sample_rate_hz, marks)
