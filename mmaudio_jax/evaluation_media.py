"""Sound and pictures as the evaluation networks take them: other cuts, rates and frames than those of training.

Source: the protocol that MMAudio's scores were measured with. libsndfile reads .wav and .flac, PyAV anything else with a sound
track. Every failure is a MediaError that names the file; a clip is never replaced by another one.
"""
from collections.abc import Callable
from collections.abc import Iterator
import dataclasses
from fractions import Fraction
import math
import os
import pathlib

import av
import numpy as np
from PIL import Image
import soundfile

from mmaudio_jax import filterbanks
from mmaudio_jax import media
from mmaudio_jax import sequence
from mmaudio_jax.frames import exact
from mmaudio_jax.frames import fit_picture
from mmaudio_jax.frames import FrameRequest
from mmaudio_jax.frames import shown_order
from mmaudio_jax.media import MediaError
from mmaudio_jax.media import Path
from mmaudio_jax.media import SOUND_FORMATS
from mmaudio_jax.resampling import resample_for_evaluation

IMAGEBIND_FPS = Fraction(1, 2)
SIZE = 224  # pixels
SEGMENT_STEP = filterbanks.SYNCHFORMER_SEGMENT // 2  # samples
_CLIP_S = 2  # of ImageBind's clips of sound


@dataclasses.dataclass(frozen=True)
class Part(os.PathLike):
    """A clip in a longer file: duration_s from start_s on stand for the whole file."""
    path: pathlib.Path
    start_s: float
    duration_s: float

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def read_sound(path: Path) -> tuple[np.ndarray, int]:
    """All channels of a file (or of a Part) at its own rate: float32 `[channels, samples]` and the rate in Hz.

    Raises:
      MediaError: unreadable, cut off, no sound, other channels in its course, or samples that are not finite.
    """
    if os.fspath(path).lower().endswith(tuple(SOUND_FORMATS)):
        with media.explained(path), open(path, 'rb') as file:  # a missing file says so, which to libsndfile is a system error
            samples, rate = soundfile.read(file, dtype='float32', always_2d=True)
        samples = np.ascontiguousarray(samples.T)
    else:
        samples, rate = _track(path)
    if isinstance(path, Part):
        first = round(path.start_s * rate)
        samples = samples[:, first:first + round(path.duration_s * rate)]
    if not samples.size:
        raise MediaError(path, f'holds no sound{f" from {path.start_s:g} s on" if isinstance(path, Part) else ""}')
    if not np.isfinite(samples).all():
        raise MediaError(path, 'holds samples that are not finite')
    return samples, rate


def _track(path: Path) -> tuple[np.ndarray, int]:
    media.probe(path)  # knows files that were cut off, which decoding does not
    with media.opened(path) as container:
        stream, to_float = media.audio_stream(container, path), av.AudioResampler(format='fltp')
        parts = [part.to_ndarray() for frame in container.decode(stream) for part in to_float.resample(frame)]
        if not parts:
            raise MediaError(path, 'its sound track holds no sound')
        counts = list(dict.fromkeys(map(len, parts)))
        if len(counts) > 1:
            raise MediaError(path, f'changes from {counts[0]} to {counts[1]} channels; write it anew with as many throughout')
        return np.concatenate(parts, axis=1), stream.rate


def mono(path: Path, sample_rate_hz: int, duration_s: float) -> np.ndarray:
    """Mean of the channels less the mean of the whole file, resampled, the first duration_s of it or what there is: float32."""
    samples, rate = read_sound(path)
    waveform = samples.mean(axis=0, dtype=np.float64)
    waveform = resample_for_evaluation(waveform - waveform.mean(), rate, sample_rate_hz)
    return waveform[:int(sample_rate_hz * duration_s)]


def panns(path: Path, duration_s: float) -> np.ndarray:
    """16 kHz, float32 [samples]; 0.32 s at least, what its five poolings need."""
    waveform = mono(path, 16_000, duration_s)
    if len(waveform) < 32 * 160:
        raise MediaError(path, 'is shorter than the 0.32 s that PANNs needs')
    return waveform


def vggish(path: Path, duration_s: float) -> np.ndarray:
    """16 kHz, float32 [samples]; one patch at least."""
    waveform = mono(path, 16_000, duration_s)
    if not filterbanks.vggish_patch_count(len(waveform)):
        raise MediaError(path, 'is shorter than the 0.975 s that VGGish needs')
    return waveform


def passt(path: Path, duration_s: float) -> np.ndarray:
    """32 kHz, cut to duration_s, then filled with zeros or cut to 10 s: float32 [320 000]."""
    waveform = mono(path, 32_000, duration_s)[:filterbanks.PASST_SAMPLES]
    return np.pad(waveform, (0, filterbanks.PASST_SAMPLES - len(waveform)))


def clap(path: Path, duration_s: float) -> np.ndarray:
    """48 kHz, cut to duration_s, repeated as often as it fits into 10 s, then filled with zeros: float32 [480 000].

    Of a longer sound the published code takes 10 s at random; this takes the first.
    """
    waveform = mono(path, 48_000, duration_s)[:filterbanks.CLAP_SAMPLES]
    waveform = np.tile(waveform, filterbanks.CLAP_SAMPLES // len(waveform))
    return np.pad(waveform, (0, filterbanks.CLAP_SAMPLES - len(waveform)))


def synchformer_sound(path: Path, duration_s: float) -> np.ndarray:
    """16 kHz, mono, with its mean, cut into segments of 0.64 s that overlap by half: float32 `[S, 10 240]`."""
    samples, rate = read_sound(path)
    waveform = resample_for_evaluation(samples.mean(axis=0, dtype=np.float64), rate, 16_000)
    length = int(16_000 * duration_s)
    if len(waveform) < length:
        raise MediaError(path, f'lasts {len(waveform) / 16_000:.3f} s; DeSync needs {duration_s:g} s')
    starts = np.arange(0, length - filterbanks.SYNCHFORMER_SEGMENT + 1, SEGMENT_STEP)
    return waveform[starts[:, None] + np.arange(filterbanks.SYNCHFORMER_SEGMENT)]


def imagebind_sound(path: Path, duration_s: float) -> np.ndarray:
    """Three clips of 2 s, at the start, the middle and the end of the whole file (whatever duration_s): float32 `[3, 32 000]`.

    The channels are not mixed: the first one is heard, and the mean of all is subtracted from each clip. Where clips overlap
    (files under 6 s) the later ones see what was subtracted before, as in the published code.
    """
    del duration_s
    samples, rate = read_sound(path)
    samples = np.stack([resample_for_evaluation(channel, rate, 16_000) for channel in samples])
    length = samples.shape[1]
    if length < filterbanks.IMAGEBIND_CLIP:
        raise MediaError(path, f'lasts {length / 16_000:.3f} s; ImageBind needs {_CLIP_S} s')
    clips = []
    for part in range(3):
        start = int((length / 16_000 - _CLIP_S) * part / 2 * 16_000)
        clip = samples[:, start:start + filterbanks.IMAGEBIND_CLIP]
        clip -= clip.mean()
        clips.append(clip[0].copy())
    return np.stack(clips)


def synchformer_picture(path: Path, duration_s: float) -> np.ndarray:
    """25 frames a second, the shorter side scaled to 224, the centre cut out: uint8 `[25 · duration_s, 224, 224, 3]`."""
    square = FrameRequest(sequence.SYNC_FPS, SIZE, SIZE, 'crop')
    count = int(sequence.SYNC_FPS * duration_s)
    return np.stack(list(_frames(path, exact(square.fps), count, lambda picture: fit_picture(picture, square))))


def imagebind_picture(path: Path, duration_s: float) -> np.ndarray:
    """Every pair of neighbouring frames at 0.5 a second, in three squares along the longer side: uint8 `[9, 2, 224, 224, 3]`.

    (9 at 8 s; the last frame before 1, 3, 5 and 7 s.)
    """
    pictures = list(_frames(path, IMAGEBIND_FPS, int(IMAGEBIND_FPS * Fraction(duration_s)), _scaled))
    if len(pictures) < 2:
        raise MediaError(path, f'{duration_s:g} s hold no two frames at one in two seconds, which the IB-score needs')
    height, width = pictures[0].shape[:2]
    spare = max(height, width) - SIZE
    views = []
    for offset in (0, math.ceil(spare / 2), spare):
        cut = slice(offset, offset + SIZE)
        squares = [picture[cut] if height > width else picture[:, cut] for picture in pictures]
        views += [np.stack(pair) for pair in zip(squares, squares[1:])]
    return np.stack(views)


def _frames(path: Path, fps: Fraction, count: int, fit: Callable[[Image.Image], np.ndarray]) -> Iterator[np.ndarray]:
    """`count` frames at `fps`, upright, as `fit` scales them.

    Sample m is the last frame whose time, rounded to the nearest sample (halves up), is m or before: what ffmpeg's fps filter
    gives, on which the published scores rest.
    """
    done, previous = 0, None
    with media.opened(path) as container:
        stream = media.video_stream(container, path)
        stream.thread_type = 'AUTO'
        unit = stream.time_base or Fraction(1)
        start = (stream.start_time or 0) * unit + (exact(path.start_s) if isinstance(path, Part) else 0)
        slot = 0
        pictures = ((frame.pts * unit, frame) for frame in container.decode(stream) if frame.pts is not None)
        for time, frame in shown_order(pictures) if container.format.name == 'avi' else pictures:
            slot = math.floor((time - start) * fps + Fraction(1, 2))
            if done < min(slot, count):
                picture = fit(media.upright(previous or frame))
                while done < min(slot, count):
                    yield picture
                    done += 1
            previous = frame
            if done == count:
                return
        if previous is not None and done < count:
            yield fit(media.upright(previous))
            done += 1
    if done < count:
        raise MediaError(path, f'has frames for {done} of {count} samples at {float(fps):g} a second')


def _scaled(picture: Image.Image) -> np.ndarray:
    """The shorter side scaled to 224 (bicubic, antialiased), the longer one floored."""
    width, height = picture.size
    size = (SIZE, height * SIZE // width) if width <= height else (width * SIZE // height, SIZE)
    return np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
