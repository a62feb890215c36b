"""--mode=generate: sounds for a file, a folder of videos, the rows of a CSV, or a prompt alone, as files.

    OUTPUT/NAME.flac (or .wav), NAME.mp4 (or .mkv …) with the new sound, NAME.png (spectrogram), NAME.json (the settings):
                         for each input
    OUTPUT/report.jsonl  one line an input of the last run: name, what was asked for, status (done, kept, failed), files, error;
                         of several processes, process i writes report_<i>.jsonl
"""
from collections.abc import Iterator
import concurrent.futures
import contextlib
import dataclasses
import json
import pathlib
import sys
import time
from typing import Any
import warnings

import jax

from mmaudio_jax import fingerprints
from mmaudio_jax import generate_jobs
from mmaudio_jax import media
from mmaudio_jax import mux
from mmaudio_jax import pipeline
from mmaudio_jax import plots
from mmaudio_jax import pretrained
from mmaudio_jax import sampler
from mmaudio_jax import snapshots
from mmaudio_jax.generate_jobs import Job
from mmaudio_jax.request import Request
from mmaudio_jax.weights import files
from mmaudio_jax.weights import store

_CHOICES = {'audio_format': [suffix[1:] for suffix in media.SOUND_FORMATS],
            'video_format': [suffix[1:] for suffix in mux.CONTAINERS], 'original_sound': mux.ORIGINAL_SOUND}
_ERRORS = (ValueError, OSError, jax.errors.JaxRuntimeError)  # of one input or its results; the last: out of memory


def generate(config, workdir: pathlib.Path) -> int:
    """Writes the files of every input; see the module's docstring.

    A result whose NAME.json has the same settings is left as it is. An input that fails is reported, the others are done.
    Inputs of equal length share batches of config.sampling.batch_size, over the devices of the process as config.mesh splits
    them; while a batch is computed, the next one is read and the last one written. With several processes each does its share
    of the inputs.

    Args:
      config: its fields generate, sampling, weights, ema, mesh and sharding.
      workdir: of a training run, unless config.generate.pretrained is set; holds the output unless config.generate.output is.

    Returns:
      0, or 1 when an input failed.

    Raises:
      ValueError: nothing to do, an input that is not there, a CSV that cannot be used, or no trained network.
    """
    jobs = generate_jobs.jobs(config.generate, config.sampling)
    for field, choices in _CHOICES.items():
        if config.generate[field] not in choices:
            raise ValueError(f'config.generate.{field} is {config.generate[field]!r}; it must be one of {", ".join(choices)}')
    pipeline.check_db('config.generate.original_db', config.generate.original_db)
    folder = pathlib.Path(config.generate.output or workdir / 'generated')
    if any(source and _same(source.parent, folder) for job in jobs for source in (job.video, job.image)):
        raise ValueError(f'config.generate.output is the folder of the videos, {folder}: they would be overwritten; '
                         'choose another one')
    folder.mkdir(parents=True, exist_ok=True)
    pipe = _load(config, workdir)
    run = _Run(config, pipe, _weights(config, workdir, pipe), folder, jobs[jax.process_index()::jax.process_count()])
    with _plain_warnings():
        return run.run()


def _same(a: pathlib.Path, b: pathlib.Path) -> bool:
    """Whether both are one folder, by whatever name: macOS takes Videos for videos."""
    return a.resolve() == b.resolve() or a.exists() and b.exists() and a.samefile(b)


def _load(config, workdir: pathlib.Path) -> pipeline.Pipeline:
    """The network of config.generate.pretrained, or that of the workdir."""
    options = config.generate
    common = {**store.places(config.weights), 'compilation_cache': options.compilation_cache, 'verbose': options.verbose,
              'devices': jax.local_devices(), 'batch_size': config.sampling.batch_size, 'placement': config}
    if options.pretrained:
        return pipeline.Pipeline.from_pretrained(options.pretrained, dtype=config.weights.dtype,
                                                 step=pretrained.agreed_step(options.pretrained), **common)
    step = snapshots.latest_agreed(workdir)
    return pipeline.Pipeline.from_pretrained(workdir, sigma_rel=config.ema.synthesis_sigma_rel, step=step,
                                             data_dir=config.data_dir or None, **common)


def _weights(config, workdir: pathlib.Path, pipe: pipeline.Pipeline) -> dict[str, Any]:
    """What says that results are of the same weights."""
    chosen = config.generate.pretrained
    source, places, names = chosen or workdir, store.places(config.weights), pipe.config['extract']
    loaded_from = fingerprints.loaded_from(source, pipe.step, places)
    codec = fingerprints.of_codec(names['codec'], pipe.config['sequence']['rate'], pipe.codec_path, loaded_from)
    found = {'run': pipe.name, 'step': pipe.step, 'digest': fingerprints.of_weights(source, pipe.name, pipe.step, places),
             'codec': codec, **fingerprints.of_encoder(names['encoder'], (files.CLIP, files.SYNCHFORMER), loaded_from)}
    if chosen:
        return found | {'pretrained': chosen, 'dtype': config.weights.dtype}
    return found | {'seed': pipe.config['seed'], 'sigma_rel': config.ema.synthesis_sigma_rel}


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings are one line without the place in the code, each time; those of threads too."""
    with warnings.catch_warnings():
        warnings.simplefilter('always', UserWarning)
        warnings.filterwarnings('ignore', 'Glyph .* missing from font')  # of a prompt in the title of its picture
        warnings.showwarning = lambda message, *_, **__: print(f'generate: {message}', file=sys.stderr, flush=True)
        yield


class _Run:
    """The inputs of this process, on their way."""

    def __init__(self, config, pipe: pipeline.Pipeline, weights: dict[str, Any], folder: pathlib.Path, jobs: list[Job]):
        self._config, self._pipe, self._weights, self._folder, self._jobs = config, pipe, weights, folder, jobs
        self._settings = sampler.SamplerSettings.of(config.sampling)
        self._numbers = {job.name: number for number, job in enumerate(jobs, 1)}
        self._failed = 0
        process = f'_{jax.process_index()}' if jax.process_count() > 1 else ''
        self._report = folder / f'report{process}.jsonl'

    def run(self) -> int:
        """Makes everything; the exit code."""
        self._report.write_text('')
        waiting: dict[Any, list[tuple[Job, Request]]] = {}
        for job in self._jobs:
            with self._caught(job):
                if _is_done(self._folder / job.name, self._description(job)):
                    self._tell(job, 'kept', f'is in {self._folder}, nothing to do')
                    continue
                fields = {name: value for name, value in dataclasses.asdict(job).items() if name != 'name'}
                request = self._pipe.request(**fields, mask_clip=self._config.generate.mask_clip and job.video is not None)
                waiting.setdefault(request.sequence, []).append((job, request))
        size = self._pipe.batch_size
        batches = [alike[start:start + size] for alike in waiting.values() for start in range(0, len(alike), size)]
        with concurrent.futures.ThreadPoolExecutor(pipeline.READERS) as pool:
            reading = [pool.submit(self._pipe.read, request) for _, request in batches[0]] if batches else []
            writing: list[tuple[Job, concurrent.futures.Future]] = []
            for number, batch in enumerate(batches):
                frames = reading
                reading = [pool.submit(self._pipe.read, request) for _, request in (batches[number + 1:] or [[]])[0]]
                made = self._make(batch, frames)
                self._finish(writing)
                writing = [(job, pool.submit(self._write, job, clip)) for job, clip in made]
            self._finish(writing)
        if self._failed:
            print(f'generate: {self._failed} of {len(self._jobs)} failed, the others are in {self._folder}', file=sys.stderr,
                  flush=True)
        return 1 if self._failed else 0

    def _make(self, batch: list[tuple[Job, Request]],
              reading: list[concurrent.futures.Future]) -> list[tuple[Job, pipeline.Clip]]:
        """The sounds of a batch, but for those whose frames cannot be read. If all fail together, each is tried alone."""
        ready = []
        for (job, request), future in zip(batch, reading, strict=True):
            with self._caught(job):
                ready.append((job, request, future.result()))
        if not ready:
            return []
        jobs, requests, frames = zip(*ready)
        try:
            return [(job, clips[0]) for job, clips in zip(jobs, self._pipe.generate_batch(requests, frames, self._settings))]
        except _ERRORS as error:
            if len(ready) == 1:
                self._fail(jobs[0], error)
                return []
        made = []
        for job, request, streams in ready:
            with self._caught(job):
                made.append((job, self._pipe.generate_batch([request], [streams], self._settings)[0][0]))
        return made

    def _write(self, job: Job, clip: pipeline.Clip) -> tuple[list[str], float]:
        """Writes the files of one input; their names, and the seconds that took."""
        started, stem, options = time.monotonic(), self._folder / job.name, self._config.generate
        record = _beside(stem, '.json')
        record.unlink(missing_ok=True)  # what it describes is about to change
        files = [_beside(stem, f'.{options.audio_format}')]
        clip.save(files[0])
        if job.video or job.image:
            files.append(_beside(stem, f'.{options.video_format}'))
            clip.save(files[1], *([options.original_sound, options.original_db] if job.video else []))
        picture = _beside(stem, '.png')
        try:
            plots.spectrogram(picture, {job.prompt or job.name: clip.audio}, clip.sample_rate_hz)
            files.append(picture)
        except Exception as error:  # whatever matplotlib raises: the sound is there, and is what was asked for
            picture.unlink(missing_ok=True)  # that of an earlier sound
            warnings.warn(f'{job.source}: {picture.name} was not drawn: {_first_line(error)}')
        names = [file.name for file in files]
        with media.atomic_file(record) as partial:
            partial.write_text(json.dumps({'settings': self._description(job), 'files': names}, indent=1) + '\n')
        return names, time.monotonic() - started

    def _finish(self, writing: list[tuple[Job, concurrent.futures.Future]]) -> None:
        for job, future in writing:
            with self._caught(job):
                names, seconds = future.result()
                self._tell(job, 'done', f'wrote {", ".join(names)}', files=names, seconds_to_write=round(seconds, 2))

    @contextlib.contextmanager
    def _caught(self, job: Job) -> Iterator[None]:
        try:
            yield
        except _ERRORS as error:
            self._fail(job, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._failed += 1
        text = _first_line(error)
        self._tell(job, 'failed', f'FAILED: {text}', error=text)

    def _tell(self, job: Job, status: str, message: str, **details: Any) -> None:
        """Prints a line and adds one to the report."""
        print(f'generate: {self._numbers[job.name]}/{len(self._jobs)} {job.source}: {message}',
              file=sys.stderr if status == 'failed' else sys.stdout, flush=True)
        with open(self._report, 'a', encoding='utf-8') as file:
            file.write(json.dumps({**dataclasses.asdict(job), 'status': status, **details}, default=str) + '\n')

    def _description(self, job: Job) -> dict[str, Any]:
        """What a result depends on, as JSON has it."""
        options = self._config.generate
        return {
            **{name: _identity(getattr(job, name)) for name in ('video', 'image')},
            **{name: getattr(job, name) for name in ('prompt', 'negative_prompt', 'seed', 'duration_s')},
            **({'index': job.index} if job.index else {}),
            **{name: options[name] for name in ('mask_clip', 'audio_format', 'video_format', 'original_sound', 'original_db')},
            **{name: self._config.sampling[name] for name in ('solver', 'num_steps', 'guidance', 'schedule')},
            'weights': self._weights,
        }


def _first_line(error: Exception) -> str:
    """Of its message, or its type when it has none."""
    return next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)


def _identity(path: pathlib.Path | None) -> dict[str, Any] | None:
    """Name, size and time of a file."""
    if path is None:
        return None
    with media.explained(path):
        state = path.stat()
    return {'name': path.name, 'bytes': state.st_size, 'modified': state.st_mtime}


def _is_done(stem: pathlib.Path, settings: dict) -> bool:
    """Whether NAME.json, which is written last, has these settings, and what it lists is there."""
    try:
        found = json.loads(_beside(stem, '.json').read_text())
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict):  # another program's file
        return False
    return found.get('settings') == settings and all((stem.parent / file).is_file() for file in found.get('files', ['']))


def _beside(stem: pathlib.Path, suffix: str) -> pathlib.Path:
    """The stem may hold dots, so that with_suffix would cut it."""
    return stem.with_name(stem.name + suffix)
