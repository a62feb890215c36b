"""Renders the built-in dataset `impacts`: real mp4 files of things that strike, with sound, captions and the true onset times.

    DATA_DIR/media/impacts/{train,validation,test}.jsonl    clips with sound (H.264 + AAC in mp4)
    DATA_DIR/media/impacts_sounds/train.jsonl               sounds with a caption and no video (flac)
    DATA_DIR/media/impacts/impacts.json                     what they were made with

One JSON object a line: id, video and audio (path beside the table, or null; audio is null when it is inside the video),
caption, split, seed, duration_s, onset_times_s (strikes in the picture, or all of a sound), off_screen_onset_times_s,
off_screen, materials, strikes (time_s, speed, thing) and bytes (of the file). A table appears when all its files are there.
"""
import heapq
import json
import os
import pathlib
from typing import Any, Iterator, NamedTuple

import av
import numpy as np

from data_pipelines import impacts_picture
from data_pipelines import impacts_scene
from data_pipelines import impacts_sound
from data_pipelines import processes
from data_pipelines.progress import Progress
from mmaudio_jax import media
from mmaudio_jax import mux

VERSION = 1  # of what a seed looks and sounds like; other versions' files are not mixed with these
NOT_CONTENT = ('workers',)  # fields of config.impacts that do not change the files
VIDEO_CODEC_OPTIONS = {'preset': 'ultrafast', 'crf': '24', 'threads': '1'}  # no reordered frames, the same bytes every time
AUDIO_BIT_RATE = 128_000
AUDIO_CODEC_OPTIONS = {'aac_coder': 'fast'}  # a third of the time of the default, and closer to these sounds (44 to 57 dB)
AHEAD = 4  # files a worker that are given out ahead
MARKER = pathlib.Path('impacts', 'impacts.json')


class Job(NamedTuple):
    """One file to render."""
    path: str
    seed: int
    duration_s: float
    size: int  # pixels, 0 for a sound without video
    fps: int


class Part(NamedTuple):
    """One split of one dataset."""
    dataset: str
    split: str
    clips: int
    with_video: bool


Plan = list[tuple[Part, pathlib.Path, dict[str, Job]]]  # every part with its table and its files by id


def _parts(settings) -> list[Part]:
    """All splits, in the order in which they are rendered."""
    return [Part('impacts', 'train', settings.train_clips, True),
            Part('impacts', 'validation', settings.validation_clips, True),
            Part('impacts', 'test', settings.test_clips, True),
            Part('impacts_sounds', 'train', settings.train_sounds, False)]


def _video_packets(stream, frames: Iterator[np.ndarray]) -> Iterator[av.Packet]:
    """Encodes uint8 [H, W, 3] frames."""
    for k, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
        frame.pts = k
        yield from stream.encode(frame)
    yield from stream.encode(None)


def write_clip(job: Job) -> None:
    """Renders one file, whole or not at all.

    Raises:
      media.MediaError: disk full, no permission.
    """
    scene = impacts_scene.sample_scene(job.seed, job.duration_s, with_video=job.size > 0)
    waveform = impacts_sound.synthesize(scene)
    if not job.size:
        media.write_audio(job.path, waveform, impacts_sound.SAMPLE_RATE_HZ)
        return
    with media.atomic_file(job.path) as beside, av.open(os.path.abspath(beside), 'w', format='mp4') as container:
        picture = container.add_stream('libx264', rate=job.fps, width=job.size, height=job.size, pix_fmt='yuv420p',
                                       options=VIDEO_CODEC_OPTIONS)
        sound = container.add_stream('aac', rate=impacts_sound.SAMPLE_RATE_HZ, layout='mono', bit_rate=AUDIO_BIT_RATE,
                                     options=AUDIO_CODEC_OPTIONS)
        frames = _video_packets(picture, impacts_picture.frames(scene, job.size, job.fps))
        sounds = mux.encode_sound(sound, waveform)
        for packet in heapq.merge(frames, sounds, key=mux.packet_time):
            container.mux(packet)


def _row(part: Part, name: str, job: Job) -> dict[str, Any]:
    """The table's entry of a rendered file."""
    scene = impacts_scene.sample_scene(job.seed, job.duration_s, part.with_video)
    file = f'{part.split}/{pathlib.Path(job.path).name}'
    strikes = sorted(((strike, thing) for thing in scene.things for strike in thing.strikes), key=lambda pair: pair[0].time_s)
    return {'id': name, 'video': file if part.with_video else None, 'audio': None if part.with_video else file,
            'caption': impacts_scene.caption(scene), 'split': part.split, 'seed': job.seed, 'duration_s': job.duration_s,
            'onset_times_s': scene.onset_times_s(visible=True), 'off_screen_onset_times_s': scene.onset_times_s(visible=False),
            'off_screen': any(not thing.visible for thing in scene.things),
            'materials': [thing.material for thing in scene.things],
            'strikes': [{'time_s': strike.time_s, 'speed': round(strike.speed, 6), 'thing': thing.name.removeprefix('a ')}
                        for strike, thing in strikes],
            'bytes': os.path.getsize(job.path)}


def _jobs(part: Part, settings, folder: pathlib.Path) -> dict[str, Job]:
    """The files of a part by id."""
    suffix = 'mp4' if part.with_video else 'flac'
    names = [f'{part.dataset}_{part.split}_{i:05d}' for i in range(part.clips)]
    key = part.split if part.with_video else f'{part.dataset}/{part.split}'
    return {name: Job(path=str(folder / part.split / f'{name}.{suffix}'),
                      seed=impacts_scene.clip_seed(settings.seed, key, i), duration_s=settings.duration_s,
                      size=settings.frame_size if part.with_video else 0, fps=settings.fps) for i, name in enumerate(names)}


def _missing(jobs: dict[str, Job], table: pathlib.Path) -> list[Job]:
    """The files that are not there, or that are not as long as the table says, if there is one."""
    sizes = {}
    if table.is_file():
        rows = (json.loads(line) for line in table.read_text().splitlines())
        sizes = {row['id']: row['bytes'] for row in rows}
    missing = []
    for name, job in jobs.items():
        try:
            whole = os.path.getsize(job.path) == sizes.get(name, os.path.getsize(job.path))
        except FileNotFoundError:
            whole = False
        if not whole:
            missing.append(job)
    return missing


def _write_text(path: pathlib.Path, text: str) -> None:
    """Writes a text file, whole or not at all; one that is right already is left alone."""
    if path.is_file() and path.read_text() == text:
        return
    with media.atomic_file(path) as beside:
        beside.write_text(text)


def _check_same_settings(path: pathlib.Path, made_with: dict[str, Any]) -> None:
    """Raises ValueError, naming the first field, when the folder was made with other settings."""
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    advice = f'choose another workdir, or delete {path.parent} and impacts_sounds beside it'
    if before['version'] != made_with['version']:
        raise ValueError(f'{path.parent} was rendered by version {before["version"]} of impacts, this is version '
                         f'{made_with["version"]}; {advice}')
    for field, value in made_with['config'].items():
        if before['config'].get(field) != value:
            raise ValueError(f'{path.parent} was rendered with config.impacts.{field} = {before["config"].get(field)!r}, '
                             f'the configuration says {value!r}; {advice}')


def _check(settings) -> None:
    """Raises ValueError, naming the field, for settings that cannot be rendered."""
    if settings.duration_s < 1:
        raise ValueError(f'config.impacts.duration_s = {settings.duration_s} is too short: at least 1 s')
    if settings.frame_size < 32 or settings.frame_size % 2:
        raise ValueError(f'config.impacts.frame_size = {settings.frame_size} must be even and at least 32')
    for field in ('fps', 'workers', 'train_clips'):
        if settings[field] < 1:
            raise ValueError(f'config.impacts.{field} = {settings[field]} must be at least 1')


def _crashed(job: Job) -> None:
    raise media.MediaError(job.path, 'the process that rendered it died; is the memory enough for config.impacts.workers?')


def _render_all(jobs: list[Job], workers: int) -> None:
    """Renders the files in processes; the first error stops it, files that are done stay."""
    for folder in {pathlib.Path(job.path).parent for job in jobs}:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob('.*.part'):
            leftover.unlink()  # of a render that was killed: no other one is at work
    progress = Progress('impacts', len(jobs), jobs[0].duration_s)
    with processes.Workers(workers) as pool:
        for _ in pool.in_order(write_clip, jobs, AHEAD * workers, _crashed):
            progress.add(1, [])


def render(config, workdir: pathlib.Path) -> None:
    """Renders what is missing of the dataset below data_dir/media and writes its tables. Of several processes with one data_dir
    one renders, the others wait for it.

    Args:
      config: the whole configuration; config.impacts and config.data_dir are used.
      workdir: where media/ is made when config.data_dir is ''.

    Raises:
      ValueError: the folder was made with other settings (the field is named), or a setting cannot be rendered.
      media.MediaError: disk full, no permission.
    """
    settings = config.impacts
    _check(settings)
    root = pathlib.Path(config.data_dir or workdir) / 'media'
    fields = {name: value for name, value in settings.to_dict().items() if name not in NOT_CONTENT}
    made_with = {'version': VERSION, 'config': fields}
    plan = [(part, root / part.dataset / f'{part.split}.jsonl', _jobs(part, settings, root / part.dataset))
            for part in _parts(settings) if part.clips]
    if not _is_done(root, made_with, plan):
        with processes.locked(root / 'impacts'):
            if not _is_done(root, made_with, plan):  # else another process has rendered it meanwhile
                _make(root, made_with, plan, settings.workers)
                return
    print(f'impacts: {_total(plan)} files are in {root}, nothing to render', flush=True)


def _total(plan: Plan) -> int:
    return sum(len(jobs) for _, _, jobs in plan)


def _is_done(root: pathlib.Path, made_with: dict[str, Any], plan: Plan) -> bool:
    """Whether all files and tables are there; ValueError when they were made with other settings."""
    _check_same_settings(root / MARKER, made_with)
    return all(table.is_file() and not _missing(jobs, table) for _, table, jobs in plan)


def _make(root: pathlib.Path, made_with: dict[str, Any], plan: Plan, workers: int) -> None:
    """Renders what is missing, then writes the tables."""
    missing, total = [job for _, table, jobs in plan for job in _missing(jobs, table)], _total(plan)
    for _, table, _ in plan:
        table.parent.mkdir(parents=True, exist_ok=True)
    _write_text(root / MARKER, json.dumps(made_with, indent=1) + '\n')
    if len(missing) < total:
        print(f'impacts: {total - len(missing)} of {total} files are there, {len(missing)} to render', flush=True)
    if missing:
        _render_all(missing, workers)
    for part, table, jobs in plan:
        _write_text(table, ''.join(json.dumps(_row(part, name, job)) + '\n' for name, job in jobs.items()))
    print(f'impacts: {total} files in {root}', flush=True)
