"""Reads frames and sound from media files, writes sound, and puts new sound under a copied video stream.

Time zero of a file is the start of its video stream (of its sound when it has no video), for frames and sound alike, so that
they stay together when a file's timestamps start late. Every failure is a MediaError: one line, the file first.
Source of the frame selection and the resizing: MMAudio's released data code (SPEC section 7).
"""
import contextlib
import dataclasses
from fractions import Fraction
import heapq
import io
import math
import os
import pathlib
from typing import Iterator, Literal, Sequence
import uuid

import av
import numpy as np
from PIL import Image
import soundfile

from mmaudio_jax.resampling import resample

SOUND_GAP_S = 0.05  # a sound track may end that much early: codecs cut in blocks; silence fills it
SEEK_MARGIN = Fraction(1)  # seconds: decoders of sound need some packets before the wanted sample
CONTAINERS = {'.mp4': ('mp4', 'aac'), '.m4v': ('mp4', 'aac'), '.mov': ('mov', 'aac'), '.mkv': ('matroska', 'libopus'),
              '.webm': ('webm', 'libopus')}  # suffix → container, sound codec
SOUND_FORMATS = {'.flac': 'FLAC', '.wav': 'WAV'}
AUDIO_BIT_RATE = 192_000
OPUS_RATE_HZ = 48_000  # Opus knows few rates; this one holds everything

Path = str | os.PathLike


class MediaError(ValueError):
    """A media file that cannot be read or written: its name and the reason in one line."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f'{os.fspath(path)}: {reason}')
        self.path, self.reason = os.fspath(path), reason

    def __reduce__(self):  # so that it travels between processes
        return MediaError, (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class FrameRequest:
    """One stream of frames to read.

    Attributes:
      fps: samples a second.
      height, width: of the result, pixels.
      fit: 'squash' scales each axis by itself; 'crop' scales until the frame just covers the size (the longer edge floored),
        then cuts the centre.
    """
    fps: float
    height: int
    width: int
    fit: Literal['squash', 'crop']


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What probe finds. Sizes, rates and channels are 0 for streams that are not there.

    Attributes:
      duration_s: of the video stream, or of the sound when there is no video, seconds.
      width, height: pixels as stored (before rotation). fps: average frames a second.
      sample_rate_hz, channels: of the first sound stream.
    """
    duration_s: float
    width: int
    height: int
    fps: float
    sample_rate_hz: int
    channels: int


@contextlib.contextmanager
def _errors(path: Path):
    """Turns what the libraries raise into MediaErrors that name path."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        raise MediaError(path, 'no such file') from error
    except IsADirectoryError as error:
        raise MediaError(path, 'is a directory, not a media file') from error
    except PermissionError as error:
        raise MediaError(path, 'no permission') from error
    except av.error.InvalidDataError as error:
        raise MediaError(path, 'not a media file, or damaged or cut off') from error
    except (av.error.FFmpegError, OSError, EOFError, soundfile.SoundFileError) as error:
        raise MediaError(path, getattr(error, 'strerror', None) or str(error).splitlines()[0]) from error


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[pathlib.Path]:
    """Yields a name beside path to write to; renamed to path when the body ends well, removed when not.

    Raises:
      MediaError: disk full, no such folder, no permission.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:12]}.part')
    try:
        with _errors(path):
            yield beside
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


@contextlib.contextmanager
def _open(path: Path):
    """The opened file. An empty path is refused here, because the library takes it for standard input."""
    with _errors(path):
        if not os.fspath(path):
            raise MediaError(path, 'empty file name')
        if os.path.isdir(path):
            raise IsADirectoryError(path)
        with av.open(os.fspath(path)) as container:
            yield container


def _exact(seconds: float) -> Fraction:
    """The decimal fraction that a float stands for: 0.4 is two fifths, so that it meets the timestamp of a frame there."""
    return Fraction(seconds).limit_denominator(1_000_000)


def _video_stream(container, path: Path):
    """The first video stream that moves: cover pictures of sound files do not count."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise MediaError(path, 'has no video stream')


def _audio_stream(container, path: Path):
    """The first sound stream."""
    if not container.streams.audio:
        raise MediaError(path, 'has no sound track')
    return container.streams.audio[0]


def _origin(container, path: Path) -> Fraction:
    """Time zero in the file's own timestamps, seconds: see the module's docstring."""
    try:
        stream = _video_stream(container, path)
    except MediaError:
        stream = _audio_stream(container, path)
    return (stream.start_time or 0) * stream.time_base


def _decode(container, stream, start: Fraction) -> Iterator:
    """Decoded frames of stream as (time in the file's timestamps, frame), from a key frame at or before start."""
    stream.thread_type = 'AUTO'
    spacing = 1 / Fraction(stream.average_rate) if stream.type == 'video' and stream.average_rate else Fraction(0)
    for sought in ((True, False) if start > 0 else (False,)):
        if sought:
            container.seek(math.floor(start / stream.time_base), stream=stream)
        elif start > 0:
            container.seek(0)
        previous = None
        for frame in container.decode(stream):
            if frame.pts is not None:
                time = frame.pts * stream.time_base
            else:
                time = Fraction(0) if previous is None else previous + spacing
            if sought and previous is None and time > start:
                break  # the index of the file is wrong: read from its beginning
            previous = time
            yield time, frame
        else:
            if previous is not None or not sought:
                return


def _fit(picture: Image.Image, request: FrameRequest) -> np.ndarray:
    """The picture at the request's size: uint8 [height, width, 3]. Pillow's bicubic is the one of SPEC section 7."""
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

    Bicubic with a = -0.5, antialiased, a horizontal and a vertical pass that each round to uint8 (SPEC section 7).
    """
    return _fit(Image.fromarray(frame), request)


def _picture(frame) -> Image.Image:
    """The frame as RGB, turned the way a player shows it."""
    pixels = frame.to_ndarray(format='rgb24')
    return Image.fromarray(np.ascontiguousarray(np.rot90(pixels, round(frame.rotation / 90))))


def read_frames(path: Path, requests: Sequence[FrameRequest], start_s: float, duration_s: float) -> list[np.ndarray]:
    """Reads all requests in one decoding pass; frames are scaled while decoding, so memory does not grow with their size.

    The sample for time k / fps is the first frame whose timestamp is at or after it (exact fractions; the released code
    adds up 1 / fps in floating point, which sometimes takes the next frame where a timestamp is exactly k / fps).

    Args:
      path: any container and codec that PyAV reads.
      requests: the streams of frames.
      start_s: where to start, seconds after the start of the video stream.
      duration_s: seconds.

    Returns:
      For each request uint8 [int(fps * duration_s), height, width, 3], RGB.

    Raises:
      MediaError: unreadable, no video stream, no frames, or the stream ends early by a sample period or more. If by less, its
        last frame is repeated.
    """
    lengths = [int(request.fps * duration_s) for request in requests]
    results = [np.empty((length, request.height, request.width, 3), np.uint8) for request, length in zip(requests, lengths)]
    done = [0] * len(requests)
    periods = [1 / _exact(request.fps) for request in requests]
    with _open(path) as container:
        stream = _video_stream(container, path)
        start = _origin(container, path) + _exact(start_s)
        if start_s < 0:
            raise MediaError(path, f'start_s {start_s} is negative')

        def take(frame, until: Fraction) -> None:
            """Fills every sample whose time is at most until."""
            picture = None
            for i, request in enumerate(requests):
                first = done[i]
                while done[i] < lengths[i] and start + done[i] * periods[i] <= until:
                    done[i] += 1
                if done[i] > first:
                    picture = picture or _picture(frame)
                    results[i][first:done[i]] = _fit(picture, request)

        last, end = None, start
        for time, frame in _decode(container, stream, start):
            last, end = frame, time
            take(frame, time)
            if done == lengths:
                return results
        if last is None:
            raise MediaError(path, 'has no frames')
        end += last.duration * stream.time_base if last.duration else min(periods)
        missing = max(length - max(i, math.ceil((end - start) / period)) for length, i, period in zip(lengths, done, periods))
        if missing > 1:
            end_s = float(end - start) + start_s
            raise MediaError(path, f'the video ends at {end_s:.3f} s, {start_s + duration_s:.3f} s are needed')
        take(last, start + max(length * period for length, period in zip(lengths, periods)))
    return results


def _read_native(path: Path, start_s: float, duration_s: float | None) -> tuple[np.ndarray, int, float]:
    """Mono sound at the file's own rate: float32 [samples] from start_s on, the rate, and the end of the track in seconds."""
    pieces: list[tuple[int, np.ndarray]] = []  # (place, samples)
    with _open(path) as container:
        stream = _audio_stream(container, path)
        rate = stream.rate
        start = _origin(container, path) + _exact(start_s)
        wanted = None if duration_s is None else round(duration_s * rate)
        to_float = av.AudioResampler(format='fltp')
        place = None
        for time, frame in _decode(container, stream, max(start - SEEK_MARGIN, Fraction(0))):
            stamp = round((time - start) * rate)
            # Containers that count in milliseconds jitter by some samples; only a larger jump is a gap in the sound.
            if place is None or abs(stamp - place) > 0.02 * rate:
                place = stamp
            played = frame.duration if stream.time_base == Fraction(1, rate) and frame.duration else frame.samples
            for part in to_float.resample(frame):
                samples = part.to_ndarray().mean(axis=0, dtype=np.float32)[:played]  # the last block may be cut short
                pieces.append((place, samples))
                place += len(samples)
            while pieces and pieces[0][0] + len(pieces[0][1]) <= 0:
                pieces.pop(0)  # before the start: memory stays flat
            if wanted is not None and place >= wanted:
                break
    if place is None:
        raise MediaError(path, 'its sound track holds no sound')
    result = np.zeros(max(place, 0) if wanted is None else wanted, np.float32)
    for at, samples in pieces:
        samples, at = samples[max(0, -at):], max(0, at)
        result[at:at + len(samples)] = samples[:max(0, len(result) - at)]
    return result, rate, place / rate + start_s


def read_audio(path: Path, sample_rate_hz: int, start_s: float, duration_s: float | None) -> np.ndarray:
    """Reads sound, mono by averaging the channels, resampled as in SPEC section 4.

    Args:
      path: any container and codec that PyAV reads.
      sample_rate_hz: of the result.
      start_s: where to start, seconds after the start of the video stream (of the sound when there is none).
      duration_s: seconds, or None for all the rest.

    Returns:
      float32 [round(duration_s * sample_rate_hz)]. Silence stands before a track that starts late.

    Raises:
      MediaError: unreadable, no sound track, or it ends more than 0.05 s early (less is filled with silence).
    """
    waveform, rate, end_s = _read_native(path, start_s, duration_s)
    if duration_s is None:
        return resample(waveform, rate, sample_rate_hz)
    if end_s < start_s + duration_s - SOUND_GAP_S:
        raise MediaError(path, f'the sound ends at {end_s:.3f} s, {start_s + duration_s:.3f} s are needed')
    length = round(duration_s * sample_rate_hz)
    result = resample(waveform, rate, sample_rate_hz)[:length]
    return np.pad(result, (0, length - len(result)))


def probe(path: Path) -> MediaInfo:
    """What the file holds; reads its packets, decodes nothing.

    Raises:
      MediaError: unreadable, or neither video nor sound in it.
    """
    with _open(path) as container:
        try:
            video = _video_stream(container, path)
        except MediaError:
            video = None
        audio = container.streams.audio[0] if container.streams.audio else None
        if video is None and audio is None:
            raise MediaError(path, 'has neither video nor sound')
        rate = Fraction(video.average_rate or 0) if video else Fraction(0)
        end = None
        for packet in container.demux(video or audio):
            if packet.pts is not None:
                length = packet.duration * packet.time_base if packet.duration else (1 / rate if rate else 0)
                end = max(end or 0, packet.pts * packet.time_base + length)
        if end is None:
            raise MediaError(path, 'has no frames' if video else 'its sound track holds no sound')
        return MediaInfo(duration_s=float(end - _origin(container, path)), width=video.width if video else 0,
                         height=video.height if video else 0, fps=float(rate),
                         sample_rate_hz=audio.rate if audio else 0, channels=audio.channels if audio else 0)


def duration_s(path: Path) -> float:
    """Length of the video stream, or of the sound when there is no video, in seconds. Raises MediaError as probe does."""
    return probe(path).duration_s


def _checked(path: Path, waveform: np.ndarray) -> np.ndarray:
    """float32 [samples] within [-1, 1]; refuses what is no waveform."""
    waveform = np.asarray(waveform, np.float32)
    if waveform.ndim != 1 or not len(waveform):
        raise MediaError(path, f'cannot be written from a waveform of shape {waveform.shape}: [samples] is needed')
    if not np.isfinite(waveform).all():
        raise MediaError(path, 'cannot be written: the waveform is not finite')
    return np.clip(waveform, -1, 1)


def write_audio(path: Path, waveform: np.ndarray, sample_rate_hz: int) -> None:
    """Writes float [samples], clipped to [-1, 1], as 16-bit flac or wav (by the suffix); whole or not at all.

    Raises MediaError for another suffix, a waveform that is not finite, a full disk, a missing folder.
    """
    suffix = pathlib.Path(path).suffix.lower()
    if suffix not in SOUND_FORMATS:
        raise MediaError(path, f'sound is written as {" or ".join(SOUND_FORMATS)}, not {suffix or "a file without suffix"}')
    memory = io.BytesIO()
    with _errors(path):
        soundfile.write(memory, _checked(path, waveform), sample_rate_hz, format=SOUND_FORMATS[suffix], subtype='PCM_16')
    with atomic_file(path) as beside:
        beside.write_bytes(memory.getvalue())


def encode_sound(stream, waveform: np.ndarray, start: Fraction) -> Iterator[av.Packet]:
    """Encodes float32 [samples] as the packets of an output stream, the first sample at time start (seconds)."""
    context = stream.codec_context
    context.open(strict=False)
    size, first = context.frame_size, round(start * context.sample_rate)
    for at in range(0, len(waveform), size):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(waveform[None, at:at + size]), format='flt', layout='mono')
        frame.sample_rate, frame.pts, frame.time_base = context.sample_rate, first + at, Fraction(1, context.sample_rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def packet_time(packet: av.Packet) -> Fraction:
    """Decoding time in seconds, by which the packets of several streams are interleaved."""
    return (packet.dts or 0) * packet.time_base


def _packets(source, stream) -> Iterator[av.Packet]:
    """The stream's packets; decoding times that the container leaves out at its beginning (Matroska) are filled in."""
    waiting: list[av.Packet] = []
    for packet in source.demux(stream):
        if not packet.size:
            continue
        if packet.dts is None:
            waiting.append(packet)
            continue
        for i, early in enumerate(waiting):
            early.dts = packet.dts - (len(waiting) - i) * (packet.duration or 1)
        yield from waiting
        yield packet
        waiting.clear()
    for packet in waiting:
        packet.dts = packet.pts
        yield packet


def mux(video_path: Path, waveform: np.ndarray, sample_rate_hz: int, out_path: Path) -> None:
    """Writes the video stream of video_path, copied packet by packet, with the waveform as its only sound.

    Args:
      video_path: the video; its own sound is left out.
      waveform: float [samples] in [-1, 1]; its first sample plays with the first frame, and the track is exactly as long.
      sample_rate_hz: of the waveform.
      out_path: .mp4, .m4v, .mov (AAC), .mkv or .webm (Opus); written whole or not at all.

    Raises:
      MediaError: the input cannot be read, the container cannot take this video codec, disk full.
    """
    suffix = pathlib.Path(out_path).suffix.lower()
    if suffix not in CONTAINERS:
        raise MediaError(out_path, f'video is written as {", ".join(CONTAINERS)}, not {suffix or "a file without suffix"}')
    container_format, codec = CONTAINERS[suffix]
    waveform = _checked(out_path, waveform)
    if codec == 'libopus':
        waveform, sample_rate_hz = resample(waveform, sample_rate_hz, OPUS_RATE_HZ), OPUS_RATE_HZ
    with _open(video_path) as source, atomic_file(out_path) as beside:
        stream = _video_stream(source, video_path)
        with av.open(os.fspath(beside), 'w', format=container_format) as out:
            if stream.codec_context.name not in out.supported_codecs:
                raise MediaError(out_path, f'{suffix} cannot hold {stream.codec_context.name} video; '
                                 'write .mkv, or the suffix of the input')
            picture = out.add_stream_from_template(stream)
            sound = out.add_stream(codec, rate=sample_rate_hz, layout='mono', bit_rate=AUDIO_BIT_RATE)
            sounds = encode_sound(sound, waveform, _origin(source, video_path))
            for packet in heapq.merge(_packets(source, stream), sounds, key=packet_time):
                packet.stream = sound if packet.stream is sound else picture
                out.mux(packet)
