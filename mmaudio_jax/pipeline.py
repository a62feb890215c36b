"""The public door for generation: a trained network with its encoders and codec, from a video or a text to a sound.

    pipe = Pipeline.from_pretrained('large_44k_v2')
    pipe(video='silent.mp4', prompt='a glass strikes').save('new.mp4')
"""
from collections.abc import Sequence as Sequence_
import concurrent.futures
import dataclasses
import os
import pathlib
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from mmaudio_jax import codec
from mmaudio_jax import encoders
from mmaudio_jax import media
from mmaudio_jax import mux
from mmaudio_jax import partitioning
from mmaudio_jax import pretrained
from mmaudio_jax import request as request_lib
from mmaudio_jax import sampler
from mmaudio_jax.frames import Frames
from mmaudio_jax.frames import sample_frames
from mmaudio_jax.media import Path
from mmaudio_jax.models import mmaudio
from mmaudio_jax.request import Request
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.stages import Stages
from mmaudio_jax.weights import download

READERS = 4  # files that are decoded at a time
MOST_DB = 200.0  # of the original sound in a mixture, up or down: far beyond what 16 bits hold
PROGRAMS = 8  # compiled ones that are kept: each guidance, solver, number of steps and length has its own
STILL_FPS = 25.0  # of the video that a still image makes
STILL_SIDE = 4096  # pixels of it at most: h264 takes no panorama at full size


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A generated sound.

    Attributes:
      audio: float32 [samples] within ±1.
      sample_rate_hz: of `audio`.
      video: the file or the frames that it was made for, or None.
      image: the still image that it was made for, uint8 [H, W, 3], or None.
      prompt: the text that it was made for.
      latents: float32 [N, C], from which the sound was decoded.
    """
    audio: np.ndarray
    sample_rate_hz: int
    video: pathlib.Path | Frames | None
    image: np.ndarray | None
    prompt: str
    latents: np.ndarray

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.audio) / self.sample_rate_hz

    def save(self, path: Path, original: str = 'replace', original_db: float = 0.0) -> None:
        """Writes .flac or .wav (the sound alone, 16 bits, mono), or a video: .mp4, .m4v, .mov, .mkv, .webm.

        The pictures of a video file are copied as they are, up to the end of the sound; they are encoded anew only when the
        container cannot take them, with a warning. Frames in memory, and a still image, are encoded.

        Args:
          path: the file; written whole or not at all.
          original: what becomes of the video's own sound: 'replace' leaves it out, 'mix' adds it to the new one, 'keep' makes
            it a second track.
          original_db: its level in a mixture, dB.

        Raises:
          ValueError: a video file for a sound that was made without pictures, the original's sound in a sound file, or a
            level that is no number of dB.
          media.MediaError: the file cannot be written, or the video cannot be read any more.
        """
        check_db('original_db', original_db)
        path = pathlib.Path(path)
        if path.suffix.lower() in media.SOUND_FORMATS:
            if original != 'replace':
                raise ValueError(f'{path}: a sound file holds the new sound alone; original={original!r} needs a video file')
            media.write_audio(path, self.audio, self.sample_rate_hz)
            return
        pictures = self.video
        if self.image is not None:
            count = max(1, round(self.duration_s * STILL_FPS))
            still = Image.fromarray(self.image)
            still.thumbnail((STILL_SIDE, STILL_SIDE))
            pictures = Frames(np.broadcast_to(np.asarray(still), (count, still.height, still.width, 3)), STILL_FPS)
        if pictures is None:
            raise ValueError(f'{path}: this sound was made without a video; save it as {" or ".join(media.SOUND_FORMATS)}')
        if path.suffix.lower() not in mux.CONTAINERS:
            raise media.MediaError(path, f'a sound is saved as {" or ".join(media.SOUND_FORMATS)}, with its pictures as '
                                   f'{", ".join(mux.CONTAINERS)}, not {path.suffix or "a file without suffix"}')
        mux.write_video(pictures, self.audio, self.sample_rate_hz, path, original, original_db)


class Pipeline:
    """Generates sounds; made by `from_pretrained`.

    Attributes:
      name: of the official variant or the training run. config: plain data, as in configs/base.py.
      step: of the weights; None for an official network.
      codec_path: of the fitted codec; None for an official network.
      batch_size: sounds that are made at once.
    """

    def __init__(self, parts: pretrained.Pretrained, devices: Sequence_[jax.Device] | None, stages: Stages,
                 batch_size: int | None, placement: Any):
        self.batch_size = parts.config['sampling']['batch_size'] if batch_size is None else batch_size
        if self.batch_size < 1:
            raise ValueError(f'batch_size is {self.batch_size}; it must be at least 1')
        self.name, self.config, self.step = parts.name, parts.config, parts.step
        self.codec_path, self._stages = parts.codec_path, stages
        self._is_official = parts.step is None
        self._model: mmaudio.MMAudio | partitioning.OnMesh = parts.model
        self._mesh, places = None, None
        if devices and list(devices) != jax.local_devices()[:1]:
            axes = {} if placement is None else partitioning.fitted(placement.mesh, len(devices))
            self._mesh = partitioning.make_mesh(axes, devices=list(devices))
            places = partitioning.replicated(self._mesh)
            if placement is not None:
                self._model = partitioning.on_mesh(parts.model, self._mesh, placement)
                places = partitioning.state_shardings(self._mesh, parts.params, placement)
        self._params = jax.device_put(parts.params, places)
        self._programs: dict[tuple[sampler.SamplerSettings, Sequence], Any] = {}
        self._choosing = threading.Lock()  # of a program, by one thread at a time
        self._made: dict[Sequence, tuple[encoders.Encoder, codec.Codec]] = {}

        def load(name: str) -> Any:
            with stages('load', name):
                return parts.load(name)

        self._load = load

    @classmethod
    def from_pretrained(cls, source: Path, *, variant: str | None = None, dtype: str | None = None, cache: Path | None = None,
                        folder: Path | None = None, offline: bool = False, verify: bool = True, compilation_cache: bool = True,
                        devices: Sequence_[jax.Device] | None = None, verbose: bool = False, sigma_rel: float | None = None,
                        step: int | None = None, data_dir: Path | None = None, batch_size: int | None = None,
                        placement: Any = None) -> 'Pipeline':
        """Loads the network; encoders and codec are loaded when they are first used.

        Args:
          source: an official network ('small_16k', 'small_44k', 'medium_44k', 'large_44k', 'large_44k_v2'), whose files are
            downloaded when they are first used; a folder with official files; or the workdir of a training run.
          variant: which network, for a folder that holds several.
          dtype: 'float32' or 'bfloat16', of weights and computation (the codec stays float32); None for float32, or what the
            training run used.
          cache: folder of downloads and conversions; None for $MMAUDIO_JAX_CACHE, or ~/.cache/mmaudio_jax.
          folder: where official files are looked for first, when `source` is not a folder of them.
          offline: nothing is downloaded.
          verify: official files must have the published MD5; False for weights of your own in the official form.
          compilation_cache: keep compiled programs in the cache folder, so that the next process starts quickly; programs
            that are kept elsewhere already (jax_compilation_cache_dir) stay there.
          devices: batches are split over these; None for the first one alone.
          verbose: print time and memory of each stage.
          sigma_rel: training run: width of the weights' average; None for its config.ema.synthesis_sigma_rel.
          step: training run: one of the stored ones; None for the last.
          data_dir: training run: folder with records/ (the fitted codec); None for its config.data_dir, or the workdir.
          batch_size: sounds that are made at once; None for config.sampling's.
          placement: a config as in configs/base.py, whose mesh and sharding say what each of several devices has of the
            network's parameters and of a batch (partitioning.fitted). None: all parameters.

        Raises:
          ValueError: an unknown name, nothing in the folder, a file of other weights, a step that is not stored, an argument
            of a training run for official weights, or a `variant` where there is no choice.
          FileNotFoundError: the fitted codec is missing.
          OSError: no network, disk full.
        """
        if compilation_cache and getattr(jax.config, 'jax_compilation_cache_dir') is None:
            jax.config.update('jax_compilation_cache_dir', str(download.cache_folder(cache) / 'compiled'))
        stages = Stages('pipeline', verbose)
        with stages('load', os.fspath(source)):
            parts = pretrained.find(source, variant=variant, dtype=dtype, cache=cache, folder=folder, offline=offline,
                                    verify=verify, sigma_rel=sigma_rel, step=step, data_dir=data_dir)
            if parts.step is None and sigma_rel is not None:
                raise ValueError(f'sigma_rel is {sigma_rel!r}, but {os.fspath(source)} has official weights, of one average; '
                                 'it chooses among those of a training run')
            pipe = cls(parts, devices, stages, batch_size, placement)
        trained_on = pipe.config['sequence']
        pipe.encoder_and_codec(Sequence(trained_on['rate'], trained_on['duration_s']))  # reports a missing codec
        return pipe

    def encoder_and_codec(self, sequence: Sequence) -> tuple[encoders.Encoder, codec.Codec]:
        """Encoder and codec for clips of this length."""
        if sequence not in self._made:
            names = self.config['extract']
            self._made[sequence] = (encoders.make(names['encoder'], sequence, self._load, self._mesh),
                                    codec.make(names['codec'], sequence, self.codec_path, self._load, self._mesh))
        return self._made[sequence]

    def __call__(self, video: Any = None, prompt: Any = '', negative_prompt: Any = None, duration_s: Any = None,
                 seed: Any = None, num_steps: int | None = None, guidance: float | None = None, solver: str | None = None, *,
                 image: Any = None, fps: Any = None, takes: int | None = None, mask_clip: bool = False,
                 noise: Any = None, schedule: str | None = None) -> Any:
        """Makes sounds. A list (or tuple) for any of the arguments down to seed, image, fps or noise makes a batch.

        Args:
          video: a file with a video stream; frames in memory, uint8 [T, H, W, 3] with their `fps` (or a Frames); None for a
            sound from the text or the image alone.
          prompt: what is heard; '' leaves it to the video.
          negative_prompt: what is not to be heard; None for config.sampling's.
          duration_s: seconds from the start of the video. None for all of it (at most 120 s), or the training length without a
            video. The network attends over the whole clip, so that its length decides the result: what is asked for is
            computed at exactly that length (a video that ends there to the frame may be cut short by a frame or two in the
            official demonstration, docs/design.md). A length that is only the video's is rounded up to the next half second,
            where the last frame stands still, and the sound is cut back to the sample: videos of many lengths share few
            compiled programs, and batches.
          seed: of the noise; None for config.sampling's. Clip i of a batch has the noise of (seed, i); with a list, that of
            (seed[i], 0), so that it is the same alone.
          num_steps, guidance, solver: of the sampler; None for config.sampling's.
          image: a still image instead of a video: a file, or uint8 [H, W, 3].
          fps: frames a second of frames in memory.
          takes: makes so many sounds of each clip; take t is what seed + t gives.
          mask_clip: the video's CLIP frames are left out, so that it gives the timing (sync features) alone.
          noise: float [N, C] (with takes [takes, N, C]) in place of the seed's.
          schedule: of the steps (sampler.SCHEDULES); None for config.sampling's, 'dopri5' has its own.

        Returns:
          A Clip; with a list, or with takes, a list; with both, a list of lists. Clips of equal length share a batch.

        Raises:
          ValueError: what is wrong with which argument; results that are not finite.
          media.MediaError: a video that cannot be read, or is shorter than duration_s.

        Warns:
          A length of more than twice or less than half the training length.
        """
        settings = self.settings(num_steps, guidance, solver, schedule)
        columns = {'video': video, 'image': image, 'fps': fps, 'prompt': prompt, 'negative_prompt': negative_prompt,
                   'duration_s': duration_s, 'seed': seed, 'noise': noise}
        rows, is_batch = request_lib.rows(columns)
        own_seeds = isinstance(seed, (list, tuple))
        count = 1 if takes is None else takes
        requests = [self.request(index=0 if own_seeds else index, takes=count, mask_clip=mask_clip, **row)
                    for index, row in enumerate(rows)]
        clips = self.generate(requests, settings)
        results = [clip[0] if takes is None else clip for clip in clips]
        return results if is_batch else results[0]

    def settings(self, num_steps: int | None = None, guidance: float | None = None, solver: str | None = None,
                 schedule: str | None = None) -> sampler.SamplerSettings:
        """Of the sampler; None stands for config.sampling's. Raises ValueError for an unknown solver, or no step."""
        defaults = self.config['sampling']
        if schedule is None:
            schedule = 'uniform' if solver == 'dopri5' else defaults['schedule']
        return sampler.SamplerSettings(solver=defaults['solver'] if solver is None else solver,
                                       num_steps=defaults['num_steps'] if num_steps is None else num_steps,
                                       guidance=defaults['guidance'] if guidance is None else guidance, schedule=schedule)

    def request(self, *, video: Any = None, image: Any = None, fps: float | None = None, prompt: str = '',
                negative_prompt: str | None = None, duration_s: float | None = None, seed: int | None = None,
                noise: Any = None, index: int = 0, takes: int = 1, mask_clip: bool = False) -> Request:
        """One clip to make, checked; arguments and errors are those of __call__. `index` picks the noise of the seed."""
        defaults, sequence = self.config['sampling'], self.config['sequence']
        return request_lib.make(sequence['rate'], sequence['duration_s'], index, video=video, image=image, fps=fps,
                                prompt=prompt, duration_s=duration_s,
                                negative_prompt=defaults['negative_prompt'] if negative_prompt is None else negative_prompt,
                                seed=defaults['seed'] if seed is None else seed, takes=takes, mask_clip=mask_clip, noise=noise)

    def generate(self, requests: Sequence_[Request], settings: sampler.SamplerSettings) -> list[list[Clip]]:
        """The takes of every request, in their order; those of equal length share batches of batch_size."""
        size = self.batch_size
        clips: dict[int, list[Clip]] = {}
        for sequence in dict.fromkeys(request.sequence for request in requests):
            alike = [index for index, request in enumerate(requests) if request.sequence == sequence]
            for start in range(0, len(alike), size):
                chunk = alike[start:start + size]
                batch = [requests[index] for index in chunk]
                with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
                    frames = list(pool.map(self.read, batch))
                clips |= zip(chunk, self.generate_batch(batch, frames, settings))
        return [clips[index] for index in range(len(requests))]

    def read(self, request: Request) -> list[np.ndarray]:
        """Frames of its video, uint8: CLIP stream (unless masked) and sync stream; nothing without a video."""
        if request.video is None:
            return []
        frame_requests = self.encoder_and_codec(request.sequence)[0].frame_requests[1 if request.mask_clip else 0:]
        if self._is_official:  # is shown the frames that the released demonstration shows it, others those of their records
            wanted = [dataclasses.replace(frame_request, rule='summed') for frame_request in frame_requests]
        else:
            wanted = list(frame_requests)
        with self._stages('frames', 'in memory' if isinstance(request.video, Frames) else request.video.name):
            if isinstance(request.video, Frames):
                return sample_frames(request.video, wanted, request.sequence.duration_s)
            return media.read_frames(request.video, wanted, 0.0, request.sequence.duration_s, needed_s=request.duration_s)

    def generate_batch(self, batch: Sequence_[Request], frames: Sequence_[list[np.ndarray]],
                       settings: sampler.SamplerSettings) -> list[list[Clip]]:
        """The takes of requests of one sequence; frames are what `read` gave for each of them."""
        sequence = batch[0].sequence
        encoder = self.encoder_and_codec(sequence)[0]
        images = [None if request.image is None else request_lib.read_image(request.image) for request in batch]
        clip, sync = self.video_features(sequence, frames, images, encoder)
        with self._stages('text', f'{len(batch)} clips'):
            text = encoder.encode_text([request.prompt for request in batch] + [request.negative_prompt for request in batch])
        rows = [(index, take) for index, request in enumerate(batch) for take in range(request.takes)]
        clips: list[list[Clip]] = [[] for _ in batch]
        for start in range(0, len(rows), self.batch_size):
            part = rows[start:start + self.batch_size]
            at = np.array([index for index, _ in part])
            noise = np.concatenate([_noise(batch[index], take) for index, take in part])
            with self._stages('flow and codec', f'{len(part)} sounds of {sequence.duration_s:g} s, {settings.num_steps} steps'):
                latents, waveforms = self._sample(settings, sequence, noise, clip[at], sync[at], text[at],
                                                  text[len(batch) + at])
            self._check_finite(latents, waveforms, settings)
            for (index, _), waveform, latent in zip(part, waveforms, latents):
                request = batch[index]
                sound = waveform[:request.samples]
                clips[index].append(Clip(sound, sequence.sample_rate_hz, request.video, images[index], request.prompt, latent))
        return clips

    def video_features(self, sequence: Sequence, frames: Sequence_[list[np.ndarray]], images: Sequence_[np.ndarray | None],
                       encoder: encoders.Encoder) -> tuple[np.ndarray, np.ndarray]:
        """CLIP `[B, V, 1024]` and sync `[B, S, 768]` features; the learned empty ones where there is nothing to see."""
        empty: Any = self._model.apply({'params': self._params}, len(frames), sequence.clip_length, sequence.sync_length,
                                       method='empty_features')
        clip, sync = (np.array(feature, np.float32) for feature in empty[:2])
        with_clip = [index for index, streams in enumerate(frames) if len(streams) == 2]
        with_sync = [index for index, streams in enumerate(frames) if streams]
        stills = {index: image for index, image in enumerate(images) if image is not None}
        if with_clip or stills:
            with self._stages('CLIP', f'{len(with_clip)} videos, {len(stills)} images'):
                if with_clip:
                    clip[with_clip] = encoder.encode_clip(np.stack([frames[index][0] for index in with_clip]))
                for index, image in stills.items():
                    clip[index] = encoder.encode_image(image)
        if with_sync:
            with self._stages('Synchformer', f'{len(with_sync)} videos'):
                sync[with_sync] = encoder.encode_sync(np.stack([frames[index][-1] for index in with_sync]))
        return clip, sync

    def _sample(self, settings: sampler.SamplerSettings, sequence: Sequence, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        """Latents `[B, N, C]` and waveforms `[B, samples]`; a batch that the devices do not share evenly is filled up."""
        weights, decode = self.encoder_and_codec(sequence)[1].program()
        with self._choosing:
            program = self._programs.pop((settings, sequence), None)
            if program is None:
                program = sampler.make_sampler(self._model, settings, self._mesh, decode)
            self._programs[settings, sequence] = program  # the last one used is last
            while len(self._programs) > PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
        count = len(arrays[0])
        missing = 0 if self._mesh is None else -count % partitioning.batch_shards(self._mesh)
        filled = [np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for array in arrays]
        results = program(self._params, *filled, weights)
        return tuple(np.asarray(result)[:count] for result in results)

    def _check_finite(self, latents: np.ndarray, waveforms: np.ndarray, settings: sampler.SamplerSettings) -> None:
        if np.isfinite(latents).all() and np.isfinite(waveforms).all():
            return
        leaves, _ = jax.tree_util.tree_flatten_with_path(self._params)
        bad = [partitioning.tensor_name(path) for path, leaf in leaves if not np.isfinite(np.asarray(leaf, np.float32)).all()]
        if bad:
            raise ValueError(f'{self.name}: the result is not finite: its weights hold NaN or infinity, first in {bad[0]}')
        dtype = jnp.dtype(self._model.dtype).name
        advice = '' if dtype == 'float32' else ", or take dtype='float32'"
        steps = f', or to more than the {sampler.DOPRI5_MAX_STEPS} steps that dopri5 may take'
        raise ValueError(f'{self.name}: the result is not finite, though its weights are: guidance {settings.guidance:g} leads '
                         f'to numbers too large for {dtype}{steps if settings.solver == "dopri5" else ""}; lower it{advice}')


def check_db(name: str, level_db: float) -> None:
    """Raises ValueError for a level, of the argument or field of this name, that is no number of dB."""
    if not isinstance(level_db, (int, float, np.number)) or not abs(level_db) <= MOST_DB:
        raise ValueError(f'{name} is {level_db!r}; a number of dB from {-MOST_DB:g} to {MOST_DB:g} is needed')


def _noise(one: Request, take: int) -> np.ndarray:
    """float32 [1, N, C]."""
    if one.noise is not None:
        return one.noise[take:take + 1]
    seed = (one.seed + take) % 2**32
    return np.asarray(sampler.noise(seed, [one.index], one.sequence.latent_length, one.sequence.latent_channels))
