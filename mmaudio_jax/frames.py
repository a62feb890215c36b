"""Frames of a video as the encoders take them: which ones, and how they are scaled.

Source of the frame selection and the resizing: MMAudio's released code for its demonstration, its extraction and its batch
evaluation, and FFmpeg's filter fps, which the latter two use.
"""
import collections
from collections.abc import Iterable
from collections.abc import Iterator
import dataclasses
from fractions import Fraction
import heapq
import itertools
import math
from typing import Any, Literal, Sequence

import numpy as np
from PIL import Image

COARSE = 3
REORDERED = 16  # pictures that H.264 may store before one that is shown earlier


@dataclasses.dataclass(frozen=True)
class FrameRequest:
    """One stream of frames to read.

    Attributes:
      fps: samples a second.
      height, width: of the result, pixels.
      fit: 'squash' scales each axis by itself; 'crop' scales until the frame just covers the size (the longer edge floored),
        then cuts the centre.
      coarse: a frame that is much larger may be averaged down to COARSE times the size first: many times quicker, but not to
        the pixel what the official encoders were given.
      rule: which frame is the sample k. 'after': the first one at k / fps or later. 'summed': the same, but the times are sums
        of 1 / fps in floating point, as in the released demonstration: where a timestamp is exactly k / fps, the frame after
        it is often taken (183 of 200 samples of a video of 25 fps). 'nearest': the last one before (k + 1/2) / fps, as in the
        released extraction and batch evaluation.
    """
    fps: float
    height: int
    width: int
    fit: Literal['squash', 'crop']
    coarse: bool = False
    rule: Literal['after', 'summed', 'nearest'] = 'after'

    def times(self, count: int) -> list[Fraction]:
        """For each of the first samples, seconds after the start: the first frame at that time or later is the sample, or, by
        the rule 'nearest', the last one before it."""
        if self.rule == 'nearest':
            return [(k + Fraction(1, 2)) / exact(self.fps) for k in range(count)]
        if self.rule == 'after':
            return [k / exact(self.fps) for k in range(count)]
        sums = itertools.accumulate(itertools.repeat(1 / self.fps, count), initial=0.0)
        # float(timestamp) >= sum: also for a timestamp that is less, but rounds to the sum.
        return [(Fraction(math.nextafter(time, -math.inf)) + Fraction(time)) / 2 for time, _ in zip(sums, range(count))]


@dataclasses.dataclass(frozen=True, eq=False)
class Frames:
    """A video in memory, as video generators hand it over.

    Attributes:
      pixels: uint8 [T, H, W, 3], RGB.
      fps: frames a second.

    Raises:
      ValueError: another dtype or shape, no frame, or a rate that is not positive.
    """
    pixels: np.ndarray
    fps: float

    def __post_init__(self):
        pixels = self.pixels
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[3] != 3:
            raise ValueError(f'frames in memory are {describe(pixels)}; uint8 [T, H, W, 3] is needed')
        if not pixels.size:
            raise ValueError(f'frames in memory are {describe(pixels)}: there is no frame')
        if not isinstance(self.fps, (int, float, Fraction, np.number)) or not 0 < self.fps < math.inf:
            raise ValueError(f'fps {self.fps!r} of frames in memory is not a positive number')

    @property
    def duration_s(self) -> float:
        """Length in seconds."""
        return len(self.pixels) / self.fps


def describe(value: object) -> str:
    """What a wrong argument is: dtype and shape of an array, the type of anything else."""
    if isinstance(value, np.ndarray):
        return f'{value.dtype} {list(value.shape)}'
    return f'of type {type(value).__name__}'


def exact(seconds: float) -> Fraction:
    """The decimal fraction that a float stands for: 0.4 is two fifths, so that it meets the timestamp of a frame there."""
    return Fraction(seconds).limit_denominator(1_000_000)


def divisor(requests: Sequence[FrameRequest], width: int, height: int) -> int:
    """By how much both sides of a frame may be divided before it is fitted; 1 unless all requests are coarse."""
    if not all(request.coarse for request in requests):
        return 1
    return max(1, min(min(width // request.width, height // request.height) for request in requests) // COARSE)


def fit_picture(picture: Image.Image, request: FrameRequest) -> np.ndarray:
    """The picture at the request's size: uint8 [height, width, 3]. Pillow's bicubic is the released code's."""
    width, height = picture.size
    if request.fit == 'squash':
        return np.asarray(picture.resize((request.width, request.height), Image.Resampling.BICUBIC))
    if request.fit != 'crop':
        raise ValueError(f"fit {request.fit!r} is neither 'squash' nor 'crop'")
    if request.height * width >= request.width * height:
        size = (width * request.height // height, request.height)
    else:
        size = (request.width, height * request.width // width)
    left, top = round((size[0] - request.width) / 2), round((size[1] - request.height) / 2)
    scaled = picture.resize(size, Image.Resampling.BICUBIC)
    return np.asarray(scaled.crop((left, top, left + request.width, top + request.height)))


def fit_frame(frame: np.ndarray, request: FrameRequest) -> np.ndarray:
    """Scales one frame, uint8 [H, W, 3], to the request's size: uint8 [height, width, 3].

    Bicubic with a = -0.5, antialiased, a horizontal and a vertical pass that each round to uint8.
    """
    return fit_picture(Image.fromarray(frame), request)


def sample_frames(frames: Frames, requests: Sequence[FrameRequest], duration_s: float) -> list[np.ndarray]:
    """media.read_frames for a video in memory: frame i has the timestamp i / fps; past the end the last frame stands still."""
    results = []
    for request in requests:
        times = request.times(int(request.fps * duration_s))
        back = 1 if request.rule == 'nearest' else 0
        places = [min(max(0, math.ceil(time * exact(frames.fps)) - back), len(frames.pixels) - 1) for time in times]
        fitted = {place: fit_frame(frames.pixels[place], request) for place in set(places)}
        results.append(np.stack([fitted[place] for place in places]))
    return results


def shown_order(pictures: Iterable[tuple[Fraction, Any]]) -> Iterator[tuple[Fraction, Any]]:
    """Pictures (time, frame), in the order in which a decoder gives them, with times that grow.

    AVI gives the pictures of H.264 the times in which they are stored: each gets the earliest that is left of the next ones.
    MPEG program streams may repeat a time: its second picture is left out.
    """
    frames: collections.deque[Any] = collections.deque()
    times: list[Fraction] = []
    last = None
    for picture in itertools.chain(pictures, itertools.repeat(None)):
        if picture is not None:
            heapq.heappush(times, picture[0])
            frames.append(picture[1])
        if not frames:
            return
        if picture is None or len(frames) > REORDERED:
            time, frame = heapq.heappop(times), frames.popleft()
            if last is None or time > last:
                yield time, frame
                last = time
