"""The public door for generation: a trained network with its encoders and codec, from a video or a text to a sound.

    pipe = Pipeline.from_pretrained('DIR')
    pipe(video='silent.mp4', prompt='a glass strikes').save('new.mp4')
"""
from collections.abc import Mapping
from collections.abc import Sequence as Sequence_
import dataclasses
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import checkpoints
from mmaudio_jax import codec
from mmaudio_jax import encoders
from mmaudio_jax import media
from mmaudio_jax import mux
from mmaudio_jax import sampler
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

Path = str | os.PathLike


@dataclasses.dataclass(frozen=True)
class Clip:
    """A generated sound.

    Attributes:
      audio: float32 [samples] within ±1.
      sample_rate_hz: of `audio`.
      video: the file that it was made for, or None.
      prompt: the text that it was made for.
    """
    audio: np.ndarray
    sample_rate_hz: int
    video: pathlib.Path | None
    prompt: str

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.audio) / self.sample_rate_hz

    def save(self, path: Path) -> None:
        """Writes .flac or .wav (the sound alone), or a video file (.mp4, .mkv …) with the original pictures and this sound.

        Raises:
          ValueError: a video file for a sound that was made without a video.
          media.MediaError: the file cannot be written, or the container cannot hold this video.
        """
        path = pathlib.Path(path)
        if path.suffix.lower() in media.SOUND_FORMATS:
            media.write_audio(path, self.audio, self.sample_rate_hz)
        elif self.video is None:
            raise ValueError(f'{path}: this sound was made without a video; save it as {" or ".join(media.SOUND_FORMATS)}')
        else:
            mux.write_video(self.video, self.audio, self.sample_rate_hz, path)


@dataclasses.dataclass(frozen=True)
class _Request:
    """One clip to make; `index` picks its noise."""
    index: int
    video: pathlib.Path | None
    prompt: str
    negative_prompt: str
    sequence: Sequence


class Pipeline:
    """Generates sounds; made by `from_pretrained`.

    Attributes:
      config: that of the training run, plain data.
      step: of the weights.
    """

    def __init__(self, model: mmaudio.MMAudio, params: Any, config: Mapping[str, Any], step: int, codec_path: pathlib.Path):
        self.config, self.step = config, step
        self._model = model
        self._params = jax.device_put(params)
        self._codec_path = codec_path
        self._samplers: dict[sampler.SamplerSettings, Any] = {}
        self._rooms: dict[Sequence, tuple[encoders.Encoder, codec.Codec]] = {}

    @classmethod
    def from_pretrained(cls, workdir: Path, *, sigma_rel: float | None = None, step: int | None = None,
                        data_dir: Path | None = None) -> 'Pipeline':
        """Loads what a training run left.

        Args:
          workdir: of the run.
          sigma_rel: width of the weights' average; None for the run's config.ema.synthesis_sigma_rel.
          step: one of the stored ones; None for the last.
          data_dir: folder with records/ (the fitted codec); None for the run's config.data_dir, or the workdir.

        Raises:
          ValueError: nothing was trained there, or the step is not stored.
          FileNotFoundError: the codec's file is missing.
        """
        workdir = pathlib.Path(workdir)
        step = checkpoints.latest_snapshot(workdir) if step is None else step
        params, config = checkpoints.load_params(workdir, sigma_rel, step)
        sequence = Sequence(config['sequence']['rate'], config['sequence']['duration_s'])
        data = pathlib.Path(data_dir or config['data_dir'] or workdir)
        pipe = cls(mmaudio.build(config['model'], sequence), params, config, step, data / 'records' / 'codec.npz')
        pipe.room(sequence)  # a missing codec is reported now
        return pipe

    def room(self, sequence: Sequence) -> tuple[encoders.Encoder, codec.Codec]:
        """Encoder and codec for clips of this length."""
        if sequence not in self._rooms:
            names = self.config['extract']
            self._rooms[sequence] = (encoders.make(names['encoder'], sequence),
                                     codec.make(names['codec'], sequence, self._codec_path))
        return self._rooms[sequence]

    def __call__(self, video: Path | None | Sequence_[Path | None] = None, prompt: str | Sequence_[str] = '',
                 negative_prompt: str | Sequence_[str] = '', duration_s: float | None = None, seed: int = 42,
                 num_steps: int | None = None, guidance: float | None = None, solver: str | None = None) -> Any:
        """Makes sounds.

        Args:
          video: a file with a video stream; None for a sound from the text alone. A list makes a batch.
          prompt: what is heard; '' leaves it to the video. A list makes a batch.
          negative_prompt: what is not to be heard.
          duration_s: seconds from the start of the video; None for all of it, or the training length without a video.
          seed: of the noise; clip i of a batch has noise of its own.
          num_steps, guidance, solver: of the sampler; None for the training run's config.sampling.

        Returns:
          A Clip, or a list of them when video, prompt or negative_prompt is a list. Clips of equal length share a batch.

        Raises:
          ValueError: lists of different lengths, or a duration too short.
          media.MediaError: a video that cannot be read, or is shorter than duration_s.
        """
        given = (video, prompt, negative_prompt)
        lengths = {len(value) for value in given if isinstance(value, (list, tuple))}
        if len(lengths) > 1:
            raise ValueError(f'video, prompt and negative_prompt are lists of different lengths: {sorted(lengths)}')
        count = lengths.pop() if lengths else None
        if count == 0:
            return []
        columns = [value if isinstance(value, (list, tuple)) else [value] * (count or 1) for value in given]
        defaults = self.config['sampling']
        settings = sampler.SamplerSettings(solver=defaults['solver'] if solver is None else solver,
                                           num_steps=defaults['num_steps'] if num_steps is None else num_steps,
                                           guidance=defaults['guidance'] if guidance is None else guidance)
        requests = [self._request(index, *row) for index, row in enumerate(zip(*columns, [duration_s] * len(columns[0])))]
        clips: dict[int, Clip] = {}
        for sequence in dict.fromkeys(request.sequence for request in requests):
            alike = [request for request in requests if request.sequence == sequence]
            for start in range(0, len(alike), defaults['batch_size']):
                batch = alike[start:start + defaults['batch_size']]
                clips |= zip((request.index for request in batch), self._generate(batch, settings, seed))
        return clips[0] if count is None else [clips[index] for index in range(count)]

    def _request(self, index: int, video: Any, prompt: Any, negative_prompt: Any, duration_s: Any) -> _Request:
        """Checks one clip's arguments and fixes its length."""
        path = None if video is None else pathlib.Path(video)
        if duration_s is None:
            duration_s = self.config['sequence']['duration_s'] if path is None else media.duration_s(path)
        return _Request(index, path, prompt, negative_prompt, Sequence(self.config['sequence']['rate'], duration_s))

    def _generate(self, batch: list[_Request], settings: sampler.SamplerSettings, seed: int) -> list[Clip]:
        """The sounds of clips of one length."""
        sequence = batch[0].sequence
        encoder, decoder = self.room(sequence)
        features = [self._video_features(request, encoder) for request in batch]
        clip, sync = (np.concatenate(parts) for parts in zip(*features))
        text = encoder.encode_text([request.prompt for request in batch])
        negative = encoder.encode_text([request.negative_prompt for request in batch])
        if settings not in self._samplers:
            self._samplers[settings] = sampler.make_sampler(self._model, settings)
        noise = sampler.noise(seed, [request.index for request in batch], sequence.latent_length,
                              sequence.latent_channels)
        latents = self._samplers[settings](self._params, noise, clip, sync, text, negative)
        waveforms = decoder.decode(np.asarray(latents))[:, :round(sequence.duration_s * sequence.sample_rate_hz)]
        return [Clip(np.asarray(waveform, np.float32), sequence.sample_rate_hz, request.video, request.prompt)
                for waveform, request in zip(waveforms, batch)]

    def _video_features(self, request: _Request, encoder: encoders.Encoder) -> tuple[np.ndarray, np.ndarray]:
        """CLIP `[1, V, 1024]` and sync `[1, S, 768]` features; the learned empty ones without a video."""
        sequence = request.sequence
        if request.video is None:
            empty: Any = self._model.apply({'params': self._params}, 1, sequence.clip_length, sequence.sync_length,
                                           method='empty_features')
            return np.asarray(empty[0]), np.asarray(empty[1])
        frames = media.read_frames(request.video, encoder.frame_requests, 0.0, sequence.duration_s)
        return encoder.encode_video(*(stream[None] for stream in frames))


def with_empty_features(model: mmaudio.MMAudio, params: Any,
                        batch: Mapping[str, np.ndarray]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Conditions of records: what an example does not have is replaced by the learned empty features.

    Args:
      model: the network.
      params: its parameters.
      batch: clip_features `[B, V, 1024]`, sync_features `[B, S, 768]`, text_features `[B, 77, 1024]`, any float dtype;
        video_exists, text_exists `[B]` bool.

    Returns:
      (clip, sync, text), float32, of the same shapes.
    """
    names = ('clip_features', 'sync_features', 'text_features')
    shape = batch['clip_features'].shape
    empty: Any = model.apply({'params': params}, shape[0], shape[1], batch['sync_features'].shape[1], method='empty_features')
    exists = (batch['video_exists'], batch['video_exists'], batch['text_exists'])
    clip, sync, text = [jnp.where(jnp.asarray(there)[:, None, None], jnp.asarray(batch[name], jnp.float32), missing)
                        for name, missing, there in zip(names, empty, exists, strict=True)]
    return clip, sync, text
