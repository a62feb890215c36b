"""What a user asks of the Pipeline, checked: one Request a clip."""
from collections.abc import Mapping
import dataclasses
import math
import os
import pathlib
from typing import Any
import warnings

import numpy as np
from PIL import Image
from PIL import ImageOps
from PIL import UnidentifiedImageError

from mmaudio_jax import media
from mmaudio_jax.frames import describe
from mmaudio_jax.frames import Frames
from mmaudio_jax.media import Path
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.sequence import SYNC_FPS
from mmaudio_jax.sequence import SYNC_SEGMENT_FRAMES

BUCKET_S = 0.5  # durations that a video gives are rounded up to multiples of it
LONGEST_S = 120.0  # of a video whose duration_s is not set: attention needs memory with the square of the length
SHORTEST_S = 0.001  # of a video: less is a wrong rate of frames
MOST_S = 1800.0  # of any clip: the logits of one layer's attention alone would be more than 80 GB
FAR = 2.0  # a length this many times the training length, or less than its half, is worth a warning


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """One clip to make.

    Attributes:
      video: a file, frames in memory, or None.
      image: a file, uint8 [H, W, 3], or None.
      prompt, negative_prompt: texts.
      duration_s: of the result, seconds.
      sequence: lengths of what is generated; its duration is duration_s, or that rounded up.
      mask_clip: the CLIP frames of the video are left out.
      seed, index: the noise is a function of both.
      takes: how many sounds.
      noise: float32 [takes, N, C] instead, or None.
    """
    video: pathlib.Path | Frames | None
    image: pathlib.Path | np.ndarray | None
    prompt: str
    negative_prompt: str
    duration_s: float
    sequence: Sequence
    mask_clip: bool
    seed: int
    index: int
    takes: int
    noise: np.ndarray | None

    @property
    def samples(self) -> int:
        """Length of the result."""
        return round(self.duration_s * self.sequence.sample_rate_hz)


def rows(columns: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """One dict a clip from named values, of which each is a list (or tuple) of one length or stands for all clips.

    Returns:
      (the dicts, whether there was a list).

    Raises:
      ValueError: lists of different lengths.
    """
    lengths = {name: len(value) for name, value in columns.items() if isinstance(value, (list, tuple))}
    if len(set(lengths.values())) > 1:
        found = ', '.join(f'{name} {length}' for name, length in lengths.items())
        raise ValueError(f'the lists are of different lengths: {found}')
    count = next(iter(lengths.values()), 1)
    made = [{name: value[i] if name in lengths else value for name, value in columns.items()} for i in range(count)]
    return made, bool(lengths)


def make(rate: str, training_s: float, index: int, *, video: Path | Frames | np.ndarray | None,
         image: Path | np.ndarray | None, fps: float | None, prompt: str, negative_prompt: str, duration_s: float | None,
         seed: int, takes: int, mask_clip: bool, noise: Any) -> Request:
    """Checks one clip's arguments and fixes its length.

    Args:
      rate: '16k' or '44k'.
      training_s: duration that the network was trained at; that of a clip without video.
      index: of the clip's noise.
      The others are those of Pipeline.__call__, for one clip.

    Raises:
      ValueError: what is wrong with which of them, in one line.
      media.MediaError: the video or the image cannot be read, or is too long.
    """
    for name, text in (('prompt', prompt), ('negative_prompt', negative_prompt)):
        if not isinstance(text, str):
            raise ValueError(f'{name} is {describe(text)}; a text is needed')
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**32:
        raise ValueError(f'seed {seed!r} is not a whole number from 0 to 4294967295')
    if not isinstance(takes, (int, np.integer)) or takes < 1:
        raise ValueError(f'takes is {takes!r}; it must be at least 1')
    if not isinstance(mask_clip, (bool, np.bool_)):
        raise ValueError(f'mask_clip is {mask_clip!r}; True or False is needed')
    if video is not None and image is not None:
        raise ValueError('both a video and an image are given; one of them is needed')
    if mask_clip and video is None:
        raise ValueError('mask_clip leaves out the CLIP frames of a video, and there is none')
    source = _video(video, fps)
    still: pathlib.Path | np.ndarray | None = None if image is None else read_image(image)
    if isinstance(image, (str, os.PathLike)):
        still = pathlib.Path(image)  # that it can be read is known; a long list of requests holds no pixels
    length_s = _length_s(source, training_s) if duration_s is None else float(duration_s)
    if MOST_S < length_s < math.inf:
        raise ValueError(f'duration_s is {length_s:g}; at most {MOST_S:g} s can be computed as one clip: make several')
    sequence = Sequence(rate, _bucket(length_s) if duration_s is None and source is not None else length_s)
    if isinstance(source, Frames) and source.duration_s < length_s - 1 / SYNC_FPS:
        raise ValueError(f'the frames in memory last {source.duration_s:.3f} s, {length_s:.3f} s are needed')
    if not training_s / FAR <= length_s <= training_s * FAR:
        name = f'{source}: ' if isinstance(source, pathlib.Path) else ''
        warnings.warn(f'{name}{length_s:g} s is far from the {training_s:g} s that the network was trained at: the sound may '
                      'be worse', stacklevel=4)
    return Request(source, still, prompt, negative_prompt, length_s, sequence, bool(mask_clip), int(seed), index, int(takes),
                   _noise(noise, takes, sequence))


def _video(video: Path | Frames | np.ndarray | None, fps: float | None) -> pathlib.Path | Frames | None:
    if fps is not None and not hasattr(video, '__array__'):
        raise ValueError(f'fps is {fps!r}, but video is {describe(video)}: fps belongs to frames in memory; a file and a '
                         'Frames have their own')
    if video is None or isinstance(video, Frames):
        return video
    if isinstance(video, (str, os.PathLike)):
        media.refuse_address(video)
        return pathlib.Path(video)
    if not hasattr(video, '__array__'):
        raise ValueError(f'video is {describe(video)}; a file, uint8 [T, H, W, 3] or None is needed')
    if fps is None:
        raise ValueError('video is an array of frames: set fps, its frames a second')
    return Frames(np.asarray(video), fps)


def read_image(image: Path | np.ndarray) -> np.ndarray:
    """A still image as uint8 [H, W, 3] RGB, upright, transparency on black; of 16 bits the upper 8.

    Raises:
      media.MediaError: the file cannot be read, is no image, or holds floating-point numbers.
      ValueError: an array of another dtype or shape.
    """
    if isinstance(image, (str, os.PathLike)):
        with media.explained(image):
            if os.path.isdir(image):
                raise IsADirectoryError(image)
            try:
                with Image.open(image) as opened:
                    return np.asarray(_rgb(ImageOps.exif_transpose(opened), image))
            except (UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
                raise media.MediaError(image, 'not an image that can be read') from error
    pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f'image is {describe(pixels)}; a file or uint8 [H, W, 3] is needed')
    return pixels


def _rgb(picture: Image.Image, path: Path) -> Image.Image:
    """Eight bits a channel, and transparency on black: `convert` cuts off what is above 255, and shows what is transparent."""
    if picture.mode == 'F':
        raise media.MediaError(path, 'holds floating-point numbers; an image of 8 or 16 bits a channel is needed')
    if picture.mode.startswith('I'):
        picture = Image.fromarray(np.clip(np.asarray(picture) // 256, 0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = Image.alpha_composite(Image.new('RGBA', picture.size, 'black'), picture.convert('RGBA'))
    return picture.convert('RGB')


def _length_s(source: pathlib.Path | Frames | None, training_s: float) -> float:
    """That of the video, or the training length."""
    if source is None:
        return training_s
    if isinstance(source, Frames):
        if source.duration_s < SHORTEST_S:
            raise ValueError(f'the frames in memory last {float(source.duration_s):g} s, too short for a sound: there are '
                             f'{len(source.pixels)} of them, and fps is {float(source.fps):g}')
        if source.duration_s > LONGEST_S:
            raise ValueError(f'the frames in memory last {source.duration_s:.0f} s, more than {LONGEST_S:g} s: '
                             'set duration_s to take their beginning')
        return source.duration_s
    return media.duration_s(source, at_most_s=LONGEST_S)


def _bucket(length_s: float) -> float:
    """Rounded up to a multiple of BUCKET_S that has room for one segment of Synchformer."""
    shortest_s = SYNC_SEGMENT_FRAMES / SYNC_FPS
    return math.ceil(max(length_s, shortest_s) / BUCKET_S) * BUCKET_S


def _noise(noise: Any, takes: int, sequence: Sequence) -> np.ndarray | None:
    if noise is None:
        return None
    array = np.asarray(noise)
    wanted = (takes, sequence.latent_length, sequence.latent_channels)
    if array.dtype.kind != 'f' or array.shape not in (wanted, *[wanted[1:]] * (takes == 1)):
        raise ValueError(f'noise is {describe(array)}; float {list(wanted)} is needed for {takes} take{"s" * (takes > 1)} of '
                         f'{sequence.duration_s:g} s')
    if not np.isfinite(array).all():
        raise ValueError('noise holds NaN or infinity')
    return array.reshape(wanted).astype(np.float32)
