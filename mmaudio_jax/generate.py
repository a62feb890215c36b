"""--mode=generate: sounds for a file, a folder of videos, or a prompt alone, as files."""
import hashlib
import json
import pathlib
import sys

import jax

from mmaudio_jax import media
from mmaudio_jax import pipeline
from mmaudio_jax import plots

VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.wmv', '.flv', '.ogv', '.3gp')
_COPY_INTO = ('.mp4', '.mkv')  # the first that can hold the video's codec


def generate(config, workdir: pathlib.Path) -> int:
    """Writes for every input NAME: NAME.flac (or .wav), NAME.mp4 with the new sound, NAME.png and NAME.json (the settings).

    The video stream is copied; where mp4 cannot hold its codec, the file is NAME.mkv. A result whose NAME.json has the same
    settings is left as it is. A file that fails is reported, the others are done. With several processes each does its share.

    Args:
      config: its fields generate, sampling and ema.
      workdir: of a training run.

    Returns:
      0, or 1 when a file failed.

    Raises:
      ValueError: nothing to do, an input that is not there, or no trained network in workdir.
    """
    inputs = _inputs(config.generate)
    folder = pathlib.Path(config.generate.output or workdir / 'generated')
    if any(video and video.parent.resolve() == folder.resolve() for video in inputs.values()):
        raise ValueError(f'config.generate.output is the folder of the videos, {folder}: they would be overwritten; '
                         'choose another one')
    folder.mkdir(parents=True, exist_ok=True)
    pipe = pipeline.Pipeline.from_pretrained(workdir, sigma_rel=config.ema.synthesis_sigma_rel,
                                             data_dir=config.data_dir or None)
    mine = list(inputs.items())[jax.process_index()::jax.process_count()]
    failed = 0
    for number, (name, video) in enumerate(mine, 1):
        progress = f'generate: {number}/{len(mine)} {video or name}'
        try:
            settings = _settings(config, pipe, video)
            if _is_done(folder / name, settings):
                print(f'{progress}: is in {folder}, nothing to do', flush=True)
                continue
            written = _generate_one(config, pipe, video, folder / name, settings)
            print(f'{progress}: wrote {written}', flush=True)
        except (ValueError, OSError) as error:
            failed += 1
            print(f'{progress}: FAILED: {error}', file=sys.stderr, flush=True)
    if failed:
        print(f'generate: {failed} of {len(mine)} failed, the others are in {folder}', file=sys.stderr, flush=True)
    return 1 if failed else 0


def _inputs(options) -> dict[str, pathlib.Path | None]:
    """Name of the results to the video, or to None for the prompt alone."""
    if not options.input:
        if not options.prompt:
            raise ValueError('nothing to generate: set config.generate.input (a video or a folder of videos), '
                             'config.generate.prompt, or both')
        digest = hashlib.sha256(options.prompt.encode()).hexdigest()[:8]
        words = ''.join(letter if letter.isalnum() else '_' for letter in options.prompt)[:60].strip('_')
        return {f'{words}_{digest}': None}
    path = pathlib.Path(options.input)
    if path.is_file():
        return {path.stem: path}
    if not path.is_dir():
        raise ValueError(f'config.generate.input is {options.input!r}, and there is no such file or folder')
    videos = sorted(file for file in path.iterdir() if file.suffix.lower() in VIDEO_SUFFIXES)
    if not videos:
        raise ValueError(f'config.generate.input: no videos ({" ".join(VIDEO_SUFFIXES)}) in {path}')
    stems = [video.stem for video in videos]
    return {video.stem if stems.count(video.stem) == 1 else video.name.replace('.', '_'): video for video in videos}


def _settings(config, pipe: pipeline.Pipeline, video: pathlib.Path | None) -> dict:
    """What a result depends on, as JSON has it."""
    state = video.stat() if video else None
    return {
        'video': {'name': video.name, 'bytes': state.st_size, 'modified': state.st_mtime} if video and state else None,
        'prompt': config.generate.prompt,
        'duration_s': config.generate.duration_s,
        'audio_format': config.generate.audio_format,
        'sampling': {**config.sampling.to_dict(), 'batch_size': 1},
        'weights': {'run': pipe.config['name'], 'seed': pipe.config['seed'], 'step': pipe.step,
                    'sigma_rel': config.ema.synthesis_sigma_rel},
    }


def _is_done(stem: pathlib.Path, settings: dict) -> bool:
    """Whether NAME.json, which is written last, has these settings, and what it lists is there."""
    try:
        found = json.loads(_beside(stem, '.json').read_text())
    except (OSError, ValueError):
        return False
    return found.get('settings') == settings and all((stem.parent / file).is_file() for file in found.get('files', ['']))


def _generate_one(config, pipe: pipeline.Pipeline, video: pathlib.Path | None, stem: pathlib.Path, settings: dict) -> str:
    """Writes the files of one input; returns their names."""
    sampling = config.sampling
    record = _beside(stem, '.json')
    record.unlink(missing_ok=True)  # what it describes is about to change
    clip = pipe(video=video, prompt=config.generate.prompt, negative_prompt=sampling.negative_prompt,
                duration_s=config.generate.duration_s or None, seed=sampling.seed, num_steps=sampling.num_steps,
                guidance=sampling.guidance, solver=sampling.solver)
    sound = _beside(stem, f'.{config.generate.audio_format}')
    clip.save(sound)
    files = [sound]
    if video is not None:
        files.append(_save_video(clip, stem))
    picture = _beside(stem, '.png')
    plots.spectrogram(picture, {config.generate.prompt or stem.name: clip.audio}, clip.sample_rate_hz)
    names = [file.name for file in [*files, picture]]
    partial = _beside(stem, '.json.partial')
    partial.write_text(json.dumps({'settings': settings, 'files': names}, indent=1) + '\n')
    partial.replace(record)
    return ', '.join(names)


def _save_video(clip: pipeline.Clip, stem: pathlib.Path) -> pathlib.Path:
    """Writes the video with its new sound into the first container that takes it; its path."""
    for suffix in _COPY_INTO[:-1]:
        try:
            clip.save(_beside(stem, suffix))
            return _beside(stem, suffix)
        except media.MediaError:  # not for this container: the last one reports what is wrong
            pass
    clip.save(_beside(stem, _COPY_INTO[-1]))
    return _beside(stem, _COPY_INTO[-1])


def _beside(stem: pathlib.Path, suffix: str) -> pathlib.Path:
    """The stem may hold dots, so that with_suffix would cut it."""
    return stem.with_name(stem.name + suffix)
