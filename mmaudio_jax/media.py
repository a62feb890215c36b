"""Reads frames and sound from media files of any container and codec, and writes sound; videos are written by mux.py.

Time zero of a file is the start of its video stream (of its sound when it has no video), for frames and sound alike, so that
they stay together when a file's timestamps start late. Video that starts less than LATE_S after zero counts from zero, as the
released demonstration counts: containers that count in milliseconds often start a few of them late. Every failure is a
MediaError: one line, the file first. Source of the frame selection: MMAudio's released data code.
"""
import contextlib
import dataclasses
from fractions import Fraction
import functools
import hashlib
import io
import math
import os
import pathlib
import re
from typing import Iterator, Sequence
import uuid

import av
from av.video.reformatter import VideoReformatter
import numpy as np
from PIL import Image
import soundfile

from mmaudio_jax.frames import divisor
from mmaudio_jax.frames import exact
from mmaudio_jax.frames import fit_picture
from mmaudio_jax.frames import FrameRequest
from mmaudio_jax.frames import shown_order
from mmaudio_jax.resampling import resample

SOUND_GAP_S = 0.05  # a sound track may end that much early: codecs cut in blocks; silence fills it
SEEK_MARGIN = Fraction(1)  # seconds: decoders of sound need some packets before the wanted sample
LATE_S = 1 / 25  # one sample of the faster stream of frames
HEADER_SLACK_S = 0.5  # a file whose header promises that much more than there is was cut off
SOUND_FORMATS = {'.flac': 'FLAC', '.wav': 'WAV'}
# What in a folder counts as a video or a sound, in every stage: by its name, in small or capital letters.
VIDEO_SUFFIXES = ('.mp4', '.m4v', '.mov', '.mkv', '.webm', '.avi', '.mpg', '.mpeg', '.wmv', '.asf', '.flv', '.f4v', '.ogv',
                  '.3gp', '.3g2', '.ts', '.mts', '.m2ts', '.vob')
SOUND_SUFFIXES = ('.wav', '.flac', '.ogg', '.oga', '.mp3', '.m4a', '.aac', '.opus', '.aif', '.aiff', '.wma')

Path = str | os.PathLike


class MediaError(ValueError):
    """A media file that cannot be read or written: its name and the reason in one line."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f'{os.fspath(path)}: {reason}')
        self.path, self.reason = os.fspath(path), reason

    def __reduce__(self):  # so that it travels between processes
        return MediaError, (self.path, self.reason)


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """What probe finds.

    Attributes:
      duration_s: of the video stream, or of the sound when there is no video, seconds.
      sound_s, sample_rate_hz: of the first sound stream, 0 when there is none.
    """
    duration_s: float
    sound_s: float
    sample_rate_hz: int


def digest(path: pathlib.Path) -> str:
    """SHA-256 of a file of any size."""
    with open(path, 'rb') as file:
        return hashlib.file_digest(file, 'sha256').hexdigest()


@contextlib.contextmanager
def explained(path: Path):
    """Turns what the libraries raise into MediaErrors that name path."""
    try:
        yield
    except MediaError:
        raise
    except FileNotFoundError as error:
        refuse_address(path)
        raise MediaError(path, 'no such file') from error
    except IsADirectoryError as error:
        raise MediaError(path, 'is a directory, not a media file') from error
    except PermissionError as error:
        raise MediaError(path, 'no permission') from error
    except (av.error.InvalidDataError, EOFError) as error:
        raise MediaError(path, 'not a media file, or damaged or cut off') from error
    except (av.error.FFmpegError, OSError, soundfile.SoundFileError) as error:
        reason = getattr(error, 'strerror', None) or getattr(error, 'error_string', None) or str(error).splitlines()[0]
        raise MediaError(path, reason) from error


@contextlib.contextmanager
def atomic_file(path: Path, synced: bool = False) -> Iterator[pathlib.Path]:
    """Yields a name beside path to write to; renamed to path when the body ends well, removed when not.

    synced: the content is on the disk before it gets its name, whatever happens to the machine.

    Raises:
      MediaError: disk full, no such folder, no permission.
    """
    path = pathlib.Path(path)
    beside = path.with_name(f'.{uuid.uuid4().hex}.part')  # not longer than the name, which may be as long as names can be
    try:
        with explained(path):
            if not path.parent.is_dir():
                raise MediaError(path, f'no such folder {path.parent}')
            yield beside
            if synced:
                with open(beside, 'rb') as file:
                    os.fsync(file.fileno())
            os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def refuse_address(path: Path) -> None:
    """Raises a MediaError for https://… in the place of a file's name; pathlib leaves one slash of the two."""
    if re.search('://|(^|/)(https?|ftp|rtsp|s3|gs):/', os.fspath(path)) and not os.path.exists(path):
        raise MediaError(path, 'is an address; download it first')


@contextlib.contextmanager
def opened(path: Path):
    """The opened file. The library takes an empty path for standard input, and what stands before a colon for a protocol."""
    with explained(path):
        if not os.fspath(path):
            raise MediaError(path, 'empty file name')
        if os.path.isdir(path):
            raise IsADirectoryError(path)
        with av.open(os.path.abspath(path)) as container:
            _check_index(container, path)
            yield container


def _check_index(container, path: Path) -> None:
    """Refuses an mp4 or mov file that was cut off after its table of contents: the table names packets beyond the end."""
    if 'mp4' not in container.format.name:
        return
    size = os.path.getsize(path)
    for stream in (*container.streams.video, *container.streams.audio):
        entries = stream.index_entries
        if len(entries) and entries[len(entries) - 1].pos + entries[len(entries) - 1].size > size:
            raise MediaError(path, f'is cut off: its table of contents names packets beyond its {size} bytes')


def video_stream(container, path: Path):
    """The first video stream that moves: cover pictures of sound files do not count."""
    for stream in container.streams.video:
        if not stream.disposition & av.stream.Disposition.attached_pic:
            return stream
    raise MediaError(path, 'has no video stream')


def audio_stream(container, path: Path):
    """The first sound stream."""
    if not container.streams.audio:
        raise MediaError(path, 'has no sound track')
    return container.streams.audio[0]


def time_zero(container, path: Path) -> Fraction:
    """Time zero in the file's own timestamps, seconds: see the module's docstring."""
    try:
        stream = video_stream(container, path)
    except MediaError:
        stream = audio_stream(container, path)
    start = (stream.start_time or 0) * stream.time_base
    return Fraction(0) if stream.type == 'video' and 0 < start < LATE_S else start


def decode(container, stream, start: Fraction, threads: int = 0, coarse: bool = False) -> Iterator:
    """Decoded frames of stream as (time in the file's timestamps, frame), from a key frame at or before start.

    threads: of the decoder, 0 for one a core; processes that decode side by side take one each. coarse: without the filter that
    smooths the edges of blocks, a sixth of the time, which frames that are divided do not show.
    """
    stream.thread_type, stream.codec_context.thread_count = 'AUTO', threads
    if coarse:
        stream.codec_context.options = {'skip_loop_filter': 'all'}
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


def upright(frame, divide: int = 1, converter: VideoReformatter | None = None) -> Image.Image:
    """The frame as RGB, both sides divided by `divide`, turned the way a player shows it.

    converter: kept for all frames of a video; setting up a new one for each costs a third of the conversion.
    """
    turns, interpolation = round(frame.rotation / 90), 'AREA' if divide > 1 else None
    frame = (converter or VideoReformatter()).reformat(frame, frame.width // divide, frame.height // divide, 'rgb24',
                                                       interpolation=interpolation, threads=1)
    return Image.fromarray(np.ascontiguousarray(np.rot90(frame.to_ndarray(), turns)))


def read_frames(path: Path, requests: Sequence[FrameRequest], start_s: float, duration_s: float,
                needed_s: float | None = None, threads: int = 0, strict: bool = False) -> list[np.ndarray]:
    """Reads all requests in one decoding pass; frames are scaled while decoding, so memory does not grow with their size.

    Which frame serves a sample, by timestamp, is the request's rule; the last one does if less than a period is missing.

    Args:
      path: any container and codec that PyAV reads.
      requests: the streams of frames.
      start_s: where to start, seconds after the start of the video stream.
      duration_s: seconds.
      needed_s: how much of duration_s the stream must have; for the rest its last frame stands still. None: all of it.
      threads: of the decoder, 0 for one a core.
      strict: a frame that the decoder could only mend is an error.

    Returns:
      For each request uint8 [int(fps * duration_s), height, width, 3], RGB.

    Raises:
      MediaError: unreadable, no video stream, no frames, or the stream ends early by a sample period or more.
    """
    lengths = [int(request.fps * duration_s) for request in requests]
    results = [np.empty((length, request.height, request.width, 3), np.uint8) for request, length in zip(requests, lengths)]
    done = [0] * len(requests)
    periods = [1 / exact(request.fps) for request in requests]
    times = [request.times(length) for request, length in zip(requests, lengths)]
    with opened(path) as container:
        stream = video_stream(container, path)
        start = time_zero(container, path) + exact(start_s)
        if start_s < 0:
            raise MediaError(path, f'start_s {start_s} is negative')

        def take(before, frame, until: Fraction) -> None:
            """Fills every sample whose time is at most until, the time of the frame that follows `before`."""
            turned = functools.cache(lambda shown: upright(shown, divisor(requests, shown.width, shown.height), converter))
            for i, request in enumerate(requests):
                first = done[i]
                while done[i] < lengths[i] and start + times[i][done[i]] <= until:
                    done[i] += 1
                if done[i] > first:
                    results[i][first:done[i]] = fit_picture(turned(before if request.rule == 'nearest' else frame), request)

        last, end, converter = None, start, VideoReformatter()
        pictures = decode(container, stream, start, threads, divisor(requests, stream.width, stream.height) > 1)
        for time, frame in shown_order(pictures) if container.format.name == 'avi' else pictures:
            if strict and time >= start and (frame.is_corrupt or last is not None and end < start and last.is_corrupt):
                raise MediaError(path, f'the frame at {float(time - start) + start_s:.3f} s is damaged')
            take(last or frame, frame, time)
            last, end = frame, time
            if done == lengths:
                return results
        if last is None:
            raise MediaError(path, 'has no frames')
        end += last.duration * stream.time_base if last.duration else min(periods)
        needed_s = duration_s if needed_s is None else needed_s
        if _missing(requests, done, end - start, needed_s) > 1:
            raise MediaError(path, f'the video ends at {float(end - start) + start_s:.3f} s, {start_s + needed_s:.3f} s '
                             'are needed')
        take(last, last, start + max(length * period for length, period in zip(lengths, periods)))
    return results


def _missing(requests: Sequence[FrameRequest], done: Sequence[int], available_s: Fraction, needed_s: float) -> int:
    """The most samples that a request lacks, of which `done` are filled, when the frames last for available_s."""
    return max(int(request.fps * needed_s) - max(count, math.ceil(available_s * exact(request.fps)))
               for request, count in zip(requests, done))


def sound_blocks(container, path: Path, start: Fraction, sought: Fraction, stereo: bool = False,
                 threads: int = 0) -> Iterator[tuple[int, np.ndarray]]:
    """The decoded sound, block by block, as (place of the first sample, float32 [samples] or [2, samples] for stereo).

    Args:
      container, path: the opened file.
      start: which sample has the place 0, in the file's timestamps, seconds.
      sought: where decoding begins, at the latest; in the file's timestamps, too.
      stereo, threads: as read_track.

    Raises:
      MediaError: no sound track, or nothing on it.
    """
    stream = audio_stream(container, path)
    to_float = av.AudioResampler(format='fltp', layout='stereo' if stereo else None)
    place = None
    for time, frame in decode(container, stream, sought, threads):
        stamp = round((time - start) * stream.rate)
        # Containers that count in milliseconds jitter by some samples; only a larger jump is a gap in the sound.
        if place is None or abs(stamp - place) > 0.02 * stream.rate:
            place = stamp
        played = frame.duration if stream.time_base == Fraction(1, stream.rate) and frame.duration else frame.samples
        for part in to_float.resample(frame):
            samples = part.to_ndarray()[:, :played]  # the last block may be cut short
            yield place, samples if stereo else samples.mean(axis=0, dtype=np.float32)
            place += samples.shape[1]
    if place is None:
        raise MediaError(path, 'its sound track holds no sound')


def read_track(path: Path, start_s: float, duration_s: float | None, stereo: bool = False,
               threads: int = 0) -> tuple[np.ndarray, int, float]:
    """Sound at the file's own rate.

    Args:
      path: any container and codec that PyAV reads.
      start_s: where to start, seconds after the start of the video stream (of the sound when there is none).
      duration_s: seconds, silence where the track has none; None for all the rest.
      stereo: two channels, mixed down as usual; otherwise mono, the average of the channels.
      threads: of the decoder, 0 for one a core.

    Returns:
      (float32 [samples] or [2, samples], sampling rate in Hz, end of the track in seconds).

    Raises:
      MediaError: unreadable, no sound track, or nothing on it.
    """
    pieces: list[tuple[int, np.ndarray]] = []  # (place, samples)
    end = 0
    with opened(path) as container:
        rate = audio_stream(container, path).rate
        start = time_zero(container, path) + exact(start_s)
        wanted = None if duration_s is None else round(duration_s * rate)
        for place, samples in sound_blocks(container, path, start, max(start - SEEK_MARGIN, Fraction(0)), stereo, threads):
            end = place + samples.shape[-1]
            if end > 0:  # else before the start: memory stays flat
                pieces.append((place, samples))
            if wanted is not None and end >= wanted:
                break
    length = max(end, 0) if wanted is None else wanted
    result = np.zeros((2, length) if stereo else length, np.float32)
    for at, samples in pieces:
        samples, at = samples[..., max(0, -at):], max(0, at)
        room = max(0, result.shape[-1] - at)
        result[..., at:at + samples.shape[-1]] = samples[..., :room]
    return result, rate, end / rate + start_s


def read_audio(path: Path, sample_rate_hz: int, start_s: float, duration_s: float | None) -> np.ndarray:
    """Reads sound, mono by averaging the channels, resampled as for MMAudio's features.

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
    waveform, rate, end_s = read_track(path, start_s, duration_s)
    if duration_s is None:
        return resample(waveform, rate, sample_rate_hz)
    if end_s < start_s + duration_s - SOUND_GAP_S:
        raise MediaError(path, f'the sound ends at {end_s:.3f} s, {start_s + duration_s:.3f} s are needed')
    length = round(duration_s * sample_rate_hz)
    result = resample(waveform, rate, sample_rate_hz)[:length]
    return np.pad(result, (0, length - len(result)))


def probe(path: Path, at_most_s: float | None = None) -> MediaInfo:
    """What the file holds; reads its packets, decodes nothing.

    Args:
      path: any container and codec that PyAV reads.
      at_most_s: refuses a longer file, as soon as that much of it was read.

    Raises:
      MediaError: unreadable, neither video nor sound in it, cut off, or too long.
    """
    with opened(path) as container:
        try:
            video = video_stream(container, path)
        except MediaError:
            video = None
        audio = container.streams.audio[0] if container.streams.audio else None
        if video is None and audio is None:
            raise MediaError(path, 'has neither video nor sound')
        fps = Fraction((video.average_rate or video.guessed_rate or 0) if video else 0)
        zero, end, last = time_zero(container, path), None, Fraction(0)
        heard = heard_from = (audio.start_time or 0) * audio.time_base if audio else Fraction(0)
        for packet in container.demux():
            if packet.pts is None or packet.is_discard:
                continue
            start, length = packet.pts * packet.time_base, (packet.duration or 0) * packet.time_base
            last = max(last, start + length)
            if packet.stream is audio:
                heard = max(heard, start + length)
            if packet.stream is (video or audio):
                end = max(end or zero, start + (length or (1 / fps if fps else 0)))
                if at_most_s is not None and end - zero > at_most_s:
                    known_s = (container.duration or 0) / av.time_base
                    raise MediaError(path, f'lasts {f"{known_s:.0f} s, " if known_s > at_most_s else ""}more than '
                                     f'{at_most_s:g} s: set duration_s to take its beginning')
        if end is None:
            raise MediaError(path, 'has no frames' if video else 'its sound track holds no sound')
        promised = (container.duration or 0) / av.time_base
        if 'matroska' in container.format.name and promised > last + HEADER_SLACK_S:
            raise MediaError(path, f'is cut off: its header says {promised:.3f} s, it ends at {float(last):.3f} s')
        return MediaInfo(float(end - zero), float(heard - heard_from), audio.rate if audio else 0)


def duration_s(path: Path, at_most_s: float | None = None) -> float:
    """Length of the video stream, or of the sound when there is no video, in seconds. Raises MediaError as probe does."""
    return probe(path, at_most_s).duration_s


def checked(path: Path, waveform: np.ndarray) -> np.ndarray:
    """The waveform as float32 [samples] clipped to [-1, 1]; a MediaError for what is none."""
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
    with explained(path):
        soundfile.write(memory, checked(path, waveform), sample_rate_hz, format=SOUND_FORMATS[suffix], subtype='PCM_16')
    with atomic_file(path) as beside:
        beside.write_bytes(memory.getvalue())
