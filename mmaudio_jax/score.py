"""--mode=evaluate with config.score: scores folders of sound, any system's, against references with the paper's metrics.

The sounds of a network of ours are made on the way (config.score.sample, split_sounds.py).

The way of a clip: _sources finds the files of the references and score_inputs those of the systems, _references embeds the
former and says which clips are asked for, _system pairs and embeds each system's and computes its figures (score_metrics.py),
_report makes plain data of them all, which score_tables.py prints.

Embeddings are kept (embeddings.py), so that an interrupted run goes on where it stopped and another metric, or another system
against the same references, costs only what is new. A clip that is missing or cannot be read is an error, or, when that is
allowed, is counted beside every figure.
"""
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import hashlib
from importlib import metadata
import json
import math
import pathlib
import platform
import time
from typing import Any

import jax
import numpy as np

from mmaudio_jax import embedders
from mmaudio_jax import embeddings
from mmaudio_jax import evaluation_media
from mmaudio_jax import media
from mmaudio_jax import metrics
from mmaudio_jax import metrics_distribution
from mmaudio_jax import plots
from mmaudio_jax import published_caches
from mmaudio_jax import score_inputs
from mmaudio_jax import score_metrics
from mmaudio_jax import score_tables
from mmaudio_jax import split_sounds
from mmaudio_jax.metrics_distribution import Result
from mmaudio_jax.resampling import resample_for_evaluation

_PACKAGES = ('jax', 'flax', 'numpy', 'scipy', 'librosa', 'av', 'soundfile', 'mmaudio_jax')
_SHEET_RATE_HZ = 16_000
_MAIN = ('fd_passt', 'fd_panns', 'fd_vgg', 'kl_panns', 'kl_passt', 'is_panns', 'ib_score', 'desync')
_ONSETS = tuple(score_metrics.ONSETS)
RECORDS = 'records'  # config.score.references: the media of the split's records


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is measured by name.

    Attributes:
      duration_s: how much of each clip counts. metrics: the columns. table: of published_results.json, '' for none.
      suffix: that names of generated files may have more than their references'.
    """
    duration_s: float
    metrics: tuple[str, ...]
    table: str
    suffix: str = ''


# The duration of the AudioCaps table and the set of the Movie Gen table are not published; 8 s is the code's default.
PROTOCOLS = {
    'vggsound': Protocol(8.0, _MAIN, 'vggsound'),
    'audiocaps': Protocol(8.0, ('fd_panns', 'fd_vgg', 'is_panns', 'clap'), 'audiocaps'),
    'greatest_hits': Protocol(8.0, _ONSETS, 'greatest_hits', '_denoised'),
    'impacts': Protocol(4.0, _ONSETS, ''),
    'moviegen': Protocol(8.0, ('is_panns', 'ib_score', 'desync', 'clap'), ''),
}


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What holds for all systems.

    Attributes:
      config: the whole configuration. protocol: what is measured.
      settings: how clips are embedded. sources: the files that they are measured against.
      cache_note: of figures against published caches.
    """
    config: Any
    protocol: Protocol
    settings: embeddings.Settings
    sources: score_inputs.References
    cache_note: str = ''


@dataclasses.dataclass(frozen=True)
class System:
    """One system's scores.

    Attributes:
      folder: its sounds. clips: how many it has. pairing: with the references.
      failed: clip → why it could not be read or embedded.
      short: clip → its seconds, of those that last less than what counts.
      results: metric → figure. undefined: metric → why there is no figure.
      covered: metric → digest of the names of the clips that the figure covers.
    """
    folder: pathlib.Path
    clips: int
    pairing: score_inputs.Pairing
    failed: dict[str, str]
    short: dict[str, float]
    results: dict[str, Result]
    undefined: dict[str, str]
    covered: dict[str, str]


def score(config, workdir: pathlib.Path) -> None:
    """Scores the systems that config.score names; prints the table, writes scores.{json,md,tex,png}.

    They are config.score.generated, or those of config.score.compare; and with config.score.sample what the network makes of
    config.evaluate.dataset's split, which comes first.

    Args:
      config: the whole configuration; the sections score and evaluate (onsets, split) count, and all that sampling needs.
      workdir: where the results go, and the embeddings unless config.score.cache names another folder.

    Raises:
      ValueError: clips that do not pair or cannot be read, references that a metric needs and that are not named, an unknown
        protocol or metric, weights of another network.
      FileNotFoundError: a folder, table or checkpoint is missing.
    """
    started, options = time.monotonic(), config.score
    protocol = _protocol(options)
    folders = score_inputs.systems(options.generated, options.compare)
    if not folders and not options.sample:
        raise ValueError('nothing to score: name a folder (config.score.generated) or several (--compare a=DIR b=DIR)')
    if options.sample and config.name in folders:
        raise ValueError(f'--compare: {config.name!r} is the name of the network that is sampled; choose another one')
    settings = embeddings.Settings(pathlib.Path(options.weights), pathlib.Path(options.cache or workdir / 'embeddings'),
                                   protocol.duration_s, options.batch_size, options.workers)
    cache = options.reference_cache  # before hours of sampling
    cache_note = published_caches.length_note(pathlib.Path(cache), protocol.duration_s) if cache else ''
    made = {}
    if options.sample:
        _check_weights(options, protocol, settings.weights)
        made = split_sounds.write(config, workdir)
    sources, listed = _sources(config, workdir, protocol, list(made))
    scoring = Scoring(config, protocol, settings, sources, cache_note)
    generated = {name: score_inputs.sounds(folder, protocol.suffix) for name, folder in folders.items()}
    if made:
        generated, folders = {config.name: made, **generated}, {config.name: next(iter(made.values())).parent, **folders}
    recorded = split_sounds.SyncFeatures(config, pathlib.Path(config.data_dir or workdir)) if options.record_features else None
    reference, asked, lacking = _references(scoring, listed, recorded)
    asked = asked or set().union(*generated.values())  # without references: all systems must have the same clips
    systems = {}
    for name, clips in generated.items():
        pairing = score_inputs.pair(clips, asked, options.allow_unpaired, folders[name])
        systems[name] = _system(scoring, name, folders[name], clips, pairing, reference)
    if jax.process_index() != 0:
        return
    short = _short_references(scoring, reference)
    report = _report(scoring, systems, asked, lacking, short, time.monotonic() - started)
    _write(report, workdir)
    print(score_tables.markdown(report), flush=True)
    print(f'score: {len(systems)} systems, {len(asked)} clips asked for, {report["seconds"]:.0f} s; every figure is in '
          f'{workdir / "scores.json"}', flush=True)
    _plot(report, workdir / 'scores.png')
    _sheets(scoring, workdir, generated, sorted(set(asked).intersection(*generated.values())))


def _write(report: Mapping[str, Any], workdir: pathlib.Path) -> None:
    for suffix, content in (('json', json.dumps(report, indent=1)), ('md', score_tables.markdown(report)),
                            ('tex', score_tables.latex(report))):
        with media.atomic_file(workdir / f'scores.{suffix}') as partial:
            partial.write_text(content + '\n', encoding='utf-8', errors='backslashreplace')  # names need not be UTF-8


def _plot(report: Mapping[str, Any], path: pathlib.Path) -> None:
    """The figures of all systems with their intervals, and the published ones; nothing when no figure is defined."""
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for name in report['metrics']:
        scores = {system: row['scores'].get(name, {}) for system, row in report['systems'].items()}
        panel = {system: (score['value'], score['low'], score['high']) for system, score in scores.items() if 'value' in score}
        if panel:
            published = score_tables.all_rows(report['published'])
            panels[score_tables.title(name)] = panel | {
                f'{row}, published': (figures[name],) * 3 for row, figures in published.items() if name in figures}
    if panels:
        plots.intervals(path, panels)


def _protocol(options) -> Protocol:
    """The named protocol with what the config changes in it."""
    if options.protocol not in PROTOCOLS:
        raise ValueError(f'config.score.protocol is {options.protocol!r}; it must be one of {", ".join(PROTOCOLS)}')
    protocol = PROTOCOLS[options.protocol]
    names = tuple(options.metrics) or protocol.metrics
    unknown = [name for name in names if name not in score_metrics.METRICS]
    if unknown:
        raise ValueError(f'config.score.metrics: {unknown[0]!r} is not one of {", ".join(score_metrics.METRICS)}')
    if not 0 <= options.duration_s < math.inf:
        raise ValueError(f"config.score.duration_s is {options.duration_s}; seconds are needed, or 0 for the protocol's")
    return dataclasses.replace(protocol, duration_s=options.duration_s or protocol.duration_s, metrics=names)


def _check_weights(options, protocol: Protocol, folder: pathlib.Path) -> None:
    """Raises FileNotFoundError for a network whose file is missing, before hours of sampling."""
    metrics = [score_metrics.METRICS[name] for name in protocol.metrics]
    names = [metric.generated for metric in metrics]
    if not options.reference_cache:
        names += [metric.reference for metric in metrics]
    networks = embedders.embedders(folder)
    for name in dict.fromkeys(filter(None, names)):
        networks[name].path(folder)


def _sources(config, workdir: pathlib.Path, protocol: Protocol,
             ids: list[str]) -> tuple[score_inputs.References, set[str]]:
    """The references, and the clips that are asked for because they are there; `ids`: those that were made of the split."""
    options = config.score
    cached = published_caches.names(pathlib.Path(options.reference_cache)) if options.reference_cache else set()
    if options.references != RECORDS and (options.references or options.reference_cache or not options.sample):
        found = score_inputs.references(options.references, options.captions, protocol.duration_s, ending=protocol.suffix)
        return _restricted(options, found, cached | set(found.sounds) | set(ids))
    data = pathlib.Path(config.data_dir or workdir)
    if not ids:
        ids = [example['id'] for example in split_sounds.examples(config, data)]
    table = data / 'media' / config.evaluate.dataset / f'{config.evaluate.split}.jsonl'
    named = options.references == RECORDS or table.is_file()  # a metric without references needs no table
    found = score_inputs.references(str(table) if named else '', options.captions, protocol.duration_s, ids)
    return _restricted(options, found, cached | set(ids))


def _restricted(options, found: score_inputs.References, listed: set[str]) -> tuple[score_inputs.References, set[str]]:
    """A table of captions without the rows of other clips, if something else says which clips there are."""
    clips = listed | set(found.onsets)
    if options.captions and clips:
        found = dataclasses.replace(found, captions=score_inputs.captions_of(found.captions, clips, options.captions))
    return found, listed


def _references(scoring: Scoring, listed: set[str],
                recorded: score_metrics.Clips | None) -> tuple[dict[str, score_metrics.Clips], set[str], dict[str, str]]:
    """Embedder → embeddings of the references, the names of all clips that are asked for, and why some have no reference.

    Args:
      listed: clips that are asked for whether or not they have a reference.
      recorded: picture features for DeSync that need not be computed.
    """
    options, onsets = scoring.config.score, scoring.sources.onsets
    needed = dict.fromkeys(filter(None, (score_metrics.METRICS[metric].reference for metric in scoring.protocol.metrics)))
    found = {name: _reference(scoring, name, recorded) for name in needed}
    covers = {f'reference for {name}': set(clips) for name, clips in found.items()}
    if not set(score_metrics.ONSETS).isdisjoint(scoring.protocol.metrics):
        if not onsets:
            raise ValueError(f'{options.references or "config.score.references"}: no onset times (NAME_times.txt, or '
                             'onset_times_s in a .jsonl table); onset metrics need them')
        covers['onset times'] = set(onsets)
    failed = {name: reason for clips in found.values() if isinstance(clips, embeddings.Stored)
              for name, reason in clips.failed.items()}
    asked = listed.union(failed, *covers.values())
    lacking = {name: f'no {what}' for what, clips in covers.items() for name in asked - clips} | failed
    if lacking and not options.allow_unpaired:
        raise ValueError(_failures('the references', lacking))
    return found, asked, lacking


def _reference(scoring: Scoring, name: str, recorded: score_metrics.Clips | None) -> score_metrics.Clips:
    """Embeddings of the references by the embedder `name`: of the records, of a published cache, or computed."""
    if name == 'synchformer_picture' and recorded is not None:
        return recorded
    options, sources, network = scoring.config.score, scoring.sources, embedders.embedders(scoring.settings.weights)[name]
    if options.reference_cache and not (network.kind == 'text' and sources.captions):
        return published_caches.load(pathlib.Path(options.reference_cache), name)
    of_kind: dict[str, tuple[Mapping[str, Any], str]] = {
        'sound': (sources.sounds, 'sounds'), 'picture': (sources.videos, 'videos'), 'text': (sources.captions, 'captions')}
    clips, what = of_kind[network.kind]
    if not clips:
        users = [metric for metric in scoring.protocol.metrics if name == score_metrics.METRICS[metric].reference]
        raise ValueError(f'{", ".join(users)} need reference {what}: name them (config.score.references, '
                         'config.score.captions, config.score.reference_cache), or choose other metrics '
                         '(config.score.metrics)')
    return embeddings.embed(network, clips, scoring.settings, 'references')


def _short_references(scoring: Scoring, reference: Mapping[str, score_metrics.Clips]) -> dict[str, float]:
    """Seconds of the reference sounds that are too short, if any network hears them."""
    networks = embedders.embedders(scoring.settings.weights)
    heard = any(isinstance(clips, embeddings.Stored) and networks[name].kind == 'sound' for name, clips in reference.items())
    return score_inputs.short(scoring.sources.sounds, scoring.protocol.duration_s) if heard else {}


def _failures(whose: str, failed: Mapping[str, str]) -> str:
    name, reason = next(iter(sorted(failed.items())))
    return (f'{whose}: {len(failed)} clips cannot be scored; {name}: {reason}. Mend them, or set '
            'config.score.allow_unpaired=True to score the others')


def _system(scoring: Scoring, label: str, folder: pathlib.Path, clips: Mapping[str, pathlib.Path],
            pairing: score_inputs.Pairing, reference: Mapping[str, score_metrics.Clips]) -> System:
    """Embeds and scores one system; process 0 alone has the figures."""
    config, settings, metric_names = scoring.config, scoring.settings, scoring.protocol.metrics
    onsets = [metric for metric in metric_names if metric in score_metrics.ONSETS]
    embedded = [metric for metric in metric_names if metric not in score_metrics.ONSETS]
    networks = embedders.embedders(settings.weights)
    needed = dict.fromkeys(score_metrics.METRICS[metric].generated for metric in embedded)
    stored = {name: embeddings.embed(networks[name], clips, settings, label) for name in needed}
    failed = {name: reason for part in stored.values() for name, reason in part.failed.items()}
    rates, unread = _onset_rates(scoring, clips, pairing.names) if onsets else ({}, {})
    failed |= unread
    if failed and not config.score.allow_unpaired:
        raise ValueError(_failures(str(folder), failed))
    results: dict[str, Result] = {}
    undefined: dict[str, str] = {}
    covered: dict[str, str] = {}
    if jax.process_index() != 0:
        return System(folder, len(clips), pairing, failed, {}, results, undefined, covered)
    if onsets:
        try:
            figures = score_metrics.onset_results(rates, _onset_note(config))
            results |= {metric: figures[metric] for metric in onsets}
            covered |= dict.fromkeys(onsets, _digest([name for name, rate in rates.items() if rate is not None]))
        except ValueError as error:
            undefined |= dict.fromkeys(onsets, str(error))
    offsets = embedders.offset_head(settings.weights) if 'desync' in embedded else None
    for metric in embedded:
        try:
            ours, theirs = score_metrics.METRICS[metric].generated, score_metrics.METRICS[metric].reference
            result, covered[metric] = _figure(metric, pairing.names, stored[ours], reference.get(theirs), offsets)
            timed = isinstance(reference.get(theirs), published_caches.Published) and networks[theirs].kind != 'text'
            results[metric] = _noted(result, scoring.cache_note if timed else '')
        except ValueError as error:
            undefined[metric] = str(error)
    short = score_inputs.short(clips, scoring.protocol.duration_s)
    return System(folder, len(clips), pairing, failed, short, results, undefined, covered)


def _figure(metric: str, paired: Sequence[str], ours: score_metrics.Clips, theirs: score_metrics.Clips | None,
            offsets: score_metrics.Offsets | None) -> tuple[Result, str]:
    """One metric of embeddings, with a note when it is not over the pairs alone, and the digest of the clips that it covers."""
    pairs = [clip for clip in paired if clip in ours and (theirs is None or clip in theirs)]
    result = score_metrics.compute(metric, ours, theirs or {}, pairs, offsets)
    used = score_metrics.METRICS[metric].clips(pairs, ours, theirs or {})
    if any(list(side) != pairs for side in used if side):
        note = f'all {len(used[0])} sounds{f" and all {len(used[1])} references" if used[1] else ""}, as published'
        result = _noted(result, f'over {note}')
    return result, _digest(*used)


def _noted(result: Result, note: str) -> Result:
    return dataclasses.replace(result, note='; '.join(filter(None, (result.note, note))))


def _digest(*names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps([list(side) for side in names]).encode()).hexdigest()[:12]


def _onset_rates(scoring: Scoring, clips: Mapping[str, pathlib.Path],
                 paired: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Onset rates of the paired clips, and why some have none. They take milliseconds and are not kept."""
    config, duration_s, truths = scoring.config, scoring.protocol.duration_s, scoring.sources.onsets
    rates: dict[str, Any] = {}
    failed: dict[str, str] = {}
    for name in paired:
        if name not in truths:
            continue
        try:
            samples, rate = evaluation_media.read_sound(clips[name])
            rates[name] = score_metrics.onset_rates(samples.mean(axis=0), rate, truths[name], config.evaluate, duration_s,
                                                    config.score.compat)
        except ValueError as error:
            failed[name] = str(error)
    return rates, failed


def _onset_note(config) -> str:
    if config.score.compat:
        return f'as the published code with its slips, delta {config.evaluate.onset_delta:g}'
    return f'window ± {config.evaluate.onset_windows_s[0]:g} s'


def _report(scoring: Scoring, systems: Mapping[str, System], asked: set[str], lacking: Mapping[str, str],
            short: Mapping[str, float], seconds: float) -> dict[str, Any]:
    """Everything as plain data; see score_tables for how it is printed. short: as _short_references has it."""
    options, protocol = scoring.config.score, scoring.protocol
    return {
        'report_version': 2, 'protocol': options.protocol, 'duration_s': protocol.duration_s, 'metrics': list(protocol.metrics),
        'asked': len(asked), 'allow_unpaired': options.allow_unpaired, 'interval': metrics_distribution.LEVEL,
        'lacking': dict(lacking), 'short': dict(short), 'record_features': options.record_features,
        'systems': {name: {
            'folder': str(system.folder), 'clips': system.clips, 'paired': len(system.pairing.names),
            'missing': list(system.pairing.missing), 'extra': list(system.pairing.extra), 'failed': system.failed,
            'short': system.short,
            'scores': {**{metric: _plain(result) | {'covered': system.covered[metric]}
                          for metric, result in system.results.items()},
                       **{metric: {'undefined': reason} for metric, reason in system.undefined.items()}},
        } for name, system in systems.items()},
        'differences': _differences(systems), 'published': score_tables.published(protocol.table),
        'seconds': round(seconds, 1), 'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}',
        'versions': versions(),
    }


def _differences(systems: Mapping[str, System]) -> dict[str, dict[str, Any]]:
    """'other − first' → metric → difference, for the metrics that both have."""
    first, *others = systems
    found: dict[str, dict[str, Any]] = {}
    for name in others:
        one, other, row = systems[first], systems[name], found.setdefault(f'{name} − {first}', {})
        for metric in other.results.keys() & one.results.keys():
            if other.covered[metric] != one.covered[metric]:
                row[metric] = {'undefined': 'the systems do not cover the same clips'}
            else:
                row[metric] = _plain(metrics_distribution.difference(other.results[metric], one.results[metric]))
    return found


def _plain(result: Result) -> dict[str, Any]:
    return {'value': result.value, 'low': result.low, 'high': result.high, 'clips': result.clips, 'note': result.note}


def versions() -> dict[str, str]:
    """Of Python and the packages on which scores depend; 'source' for one that is not installed."""
    found = {'python': platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # run from the source folder
            found[package] = 'source'
    return found


def _sheets(scoring: Scoring, workdir: pathlib.Path, generated: Mapping[str, Mapping[str, pathlib.Path]],
            names: list[str]) -> None:
    """Spectrograms of the first clips that all systems have: the reference above every system, one scale, onsets marked."""
    config, sources = scoring.config, scoring.sources
    for name in names[:config.score.sheets]:
        sounds: dict[str, np.ndarray] = {}
        paths = {'reference': sources.sounds[name]} if name in sources.sounds else {}
        for title, path in (paths | {key: clips[name] for key, clips in generated.items()}).items():
            try:
                samples, rate = evaluation_media.read_sound(path)
            except evaluation_media.MediaError:  # a video without sound, or a failure that the report already names
                continue
            waveform = resample_for_evaluation(samples.mean(axis=0), rate, _SHEET_RATE_HZ)
            sounds[title] = np.asarray(waveform[:int(_SHEET_RATE_HZ * scoring.protocol.duration_s)])
        marks = {}
        if name in sources.onsets:
            marks['true onsets'] = sources.onsets[name]
        elif 'reference' in sounds:
            found = metrics.detect_onsets(sounds['reference'], _SHEET_RATE_HZ, config.evaluate.onset_delta,
                                          config.evaluate.onset_lag_s)
            marks['onsets found in the reference'] = list(found.times_s)
        if sounds:
            plots.spectrogram(workdir / 'scores' / f'{name}.png', sounds, _SHEET_RATE_HZ, marks)
