"""Writes videos: the pictures of a file, copied packet by packet, or frames in memory, encoded; and new sound under them.

The pictures of a file are encoded anew only when the container cannot take them, with a warning. Where the new sound ends,
the pictures end too.
"""
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
from fractions import Fraction
import heapq
import itertools
import os
import pathlib
import warnings

import av
from av.video.frame import PictureType
import numpy as np

from mmaudio_jax import media
from mmaudio_jax.frames import exact
from mmaudio_jax.frames import Frames
from mmaudio_jax.frames import shown_order
from mmaudio_jax.media import MediaError
from mmaudio_jax.media import Path
from mmaudio_jax.resampling import resample

_H264 = ('libx264', {'preset': 'veryfast', 'crf': '18'})
_VP9 = ('libvpx-vp9', {'deadline': 'realtime', 'cpu-used': '6', 'crf': '24', 'b:v': '0', 'row-mt': '1'})


@dataclasses.dataclass(frozen=True)
class Container:
    """How a video file is written: FFmpeg's format, the codec of new sound, and that of new pictures with its options."""
    format: str
    sound: str
    pictures: tuple[str, dict[str, str]]


CONTAINERS = {
    '.mp4': Container('mp4', 'aac', _H264),
    '.m4v': Container('mp4', 'aac', _H264),
    '.mov': Container('mov', 'aac', _H264),
    '.mkv': Container('matroska', 'libopus', _H264),
    '.webm': Container('webm', 'libopus', _VP9),
}
ORIGINAL_SOUND = ('replace', 'mix', 'keep')
AUDIO_BIT_RATE = 192_000  # of mono; twice that of stereo
OPUS_RATE_HZ = 48_000  # Opus knows few rates; this one holds everything
HIGHEST_RATE_HZ = 48_000  # of a mixture: not every player takes more
HIDING = ('mp4', 'mov')  # formats that hold pictures which are decoded, but not shown
CLOCK = Fraction(1, 90_000)  # of pictures that are encoded: any frame rate's timestamps, variable ones too

Sound = tuple[np.ndarray, int]  # float32 [samples] or [2, samples], sampling rate in Hz


class MediaWarning(UserWarning):
    """Something was written otherwise than asked for; the message names the file."""


class _Refused(Exception):
    """The container does not take a stream; the message says which."""


def write_video(source: Path | Frames, waveform: np.ndarray, sample_rate_hz: int, out_path: Path, original: str = 'replace',
                original_db: float = 0.0) -> None:
    """Writes pictures with new sound; whole or not at all.

    Args:
      source: a video file, whose stream is copied packet by packet up to the end of the sound, or frames in memory.
      waveform: float [samples] in [-1, 1]; its first sample plays with the first frame, and the track is exactly as long.
      sample_rate_hz: of the waveform.
      out_path: .mp4, .m4v, .mov (AAC), .mkv or .webm (Opus).
      original: what becomes of the source's own sound: 'replace' leaves it out, 'mix' adds it to the new sound (both turned
        down alike where they would clip), 'keep' makes it a second track, copied if the container takes it.
      original_db: its level in a mixture, dB.

    Raises:
      MediaError: the input cannot be read, another suffix, the waveform is not finite, disk full.
      ValueError: original is none of ORIGINAL_SOUND.

    Warns:
      MediaWarning: the pictures or the kept sound were encoded anew, or the source has no sound of its own.
    """
    if original not in ORIGINAL_SOUND:
        raise ValueError(f'original is {original!r}; it must be one of {", ".join(ORIGINAL_SOUND)}')
    suffix = pathlib.Path(out_path).suffix.lower()
    if suffix not in CONTAINERS:
        raise MediaError(out_path, f'video is written as {", ".join(CONTAINERS)}, not {suffix or "a file without suffix"}')
    sound, length = (media.checked(out_path, waveform), sample_rate_hz), Fraction(len(waveform), sample_rate_hz)
    if isinstance(source, Frames):
        if original != 'replace':
            warnings.warn(f'{os.fspath(out_path)}: frames in memory have no sound of their own', MediaWarning, stacklevel=2)
        _write_frames(source, [sound], length, out_path)
        return
    own = None if original == 'replace' else _own_sound(source, float(length))
    if own and original == 'mix':
        sound = mixed(sound, own, original_db)
    kept = own if original == 'keep' else None
    try:
        _copy_file(source, sound, length, out_path, kept is not None)
    except _Refused as reason:
        warnings.warn(f'{os.fspath(out_path)}: {reason}: encoded anew', MediaWarning, stacklevel=2)
        try:
            _encode_file(source, [sound] if kept is None else [sound, kept], length, out_path)
        except _Refused as again:
            raise MediaError(out_path, f'cannot be written: {again}, not even encoded anew') from again


def mixed(sound: Sound, other: Sound, other_db: float) -> Sound:
    """The sum of two sounds, the other one turned up by other_db dB; as long as the first, and scaled where it would clip.

    It has the higher of both rates (at most 48 kHz) and is stereo when one of them is.
    """
    rate = min(max(sound[1], other[1]), HIGHEST_RATE_HZ)
    length = round(sound[0].shape[-1] * rate / sound[1])
    first, second = (_at_rate(*part, rate, length) for part in (sound, other))
    total = first + np.float32(10**(other_db / 20)) * second
    return total / max(1.0, float(np.abs(total).max())), rate


def _at_rate(waveform: np.ndarray, from_hz: int, to_hz: int, length: int) -> np.ndarray:
    """float32 [..., length] at the rate to_hz; cut, or filled up with silence."""
    channels = [resample(channel, from_hz, to_hz)[:length] for channel in np.atleast_2d(waveform)]
    padded = [np.pad(channel, (0, length - len(channel))) for channel in channels]
    return np.stack(padded) if waveform.ndim == 2 else padded[0]


def _own_sound(source: Path, length_s: float) -> Sound | None:
    """The source's own sound, mono or stereo; None, with a warning, when it has none."""
    with media.opened(source) as container:
        channels = container.streams.audio[0].channels if container.streams.audio else 0
    if not channels:
        warnings.warn(f'{os.fspath(source)}: has no sound of its own', MediaWarning, stacklevel=3)
        return None
    return media.read_track(source, 0.0, length_s, stereo=channels > 1)[:2]


@contextlib.contextmanager
def _output(out_path: Path) -> Iterator:
    """The opened output beside out_path, renamed when whole. The muxer's refusals are _Refused."""
    container = CONTAINERS[pathlib.Path(out_path).suffix.lower()]
    with media.atomic_file(out_path) as beside, av.open(os.path.abspath(beside), 'w', format=container.format) as out:
        yield out


def _copy_file(source: Path, sound: Sound, length: Fraction, out_path: Path, keep: bool) -> None:
    """Copies the pictures, and the source's own sound as a second track if it is kept."""
    with contextlib.ExitStack() as stack:
        container = stack.enter_context(media.opened(source))
        start = media.time_zero(container, source)
        out = stack.enter_context(_output(out_path))
        tracks = [_copied(out, container, media.video_stream(container, source), start, length, source),
                  _new_track(out, sound, out_path)]
        if keep:
            again = stack.enter_context(media.opened(source))
            tracks.append(_copied(out, again, media.audio_stream(again, source), start, length, source))
        _interleave(out, tracks)


def _encode_file(source: Path, sounds: list[Sound], length: Fraction, out_path: Path) -> None:
    """Encodes the pictures of a file anew, with the timestamps that they have."""
    with media.opened(source) as container, _output(out_path) as out:
        stream = media.video_stream(container, source)
        start = media.time_zero(container, source)

        def pictures() -> Iterator[tuple[Fraction, av.VideoFrame]]:
            with media.explained(source):
                for time, frame in shown_order(media.decode(container, stream, start)):
                    if time >= start + length:
                        return
                    upright = av.VideoFrame.from_image(media.upright(frame)) if frame.rotation else frame
                    yield time - start, upright

        tracks = [_encoded(out, pictures(), Fraction(stream.average_rate or 25), out_path)]
        tracks += [_new_track(out, sound, out_path) for sound in sounds]
        _interleave(out, tracks)


def _write_frames(frames: Frames, sounds: list[Sound], length: Fraction, out_path: Path) -> None:
    """Encodes frames in memory."""
    fps = exact(frames.fps)
    with _output(out_path) as out:
        shown = ((i / fps, av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24'))
                 for i, pixels in enumerate(frames.pixels) if i / fps < length)
        tracks = [_encoded(out, shown, fps, out_path)]
        tracks += [_new_track(out, sound, out_path) for sound in sounds]
        _interleave(out, tracks)


def _interleave(out, tracks: list[Iterator[av.Packet]]) -> None:
    """Writes the packets of all tracks in the order of their times."""
    for packet in heapq.merge(*tracks, key=packet_time):
        try:
            out.mux(packet)
        except (av.error.ArgumentError, av.error.InvalidDataError, av.error.PatchWelcomeError) as error:
            raise _Refused(f'{out.format.name} cannot take this video') from error


def _copied(out, container, stream, start: Fraction, length: Fraction, source: Path) -> Iterator[av.Packet]:
    """The packets of a stream from `start` on, in the file's timestamps, for an output that takes its codec.

    The output begins at zero whenever the file does: before a later beginning AAC's first block would be heard, which players
    cut off at zero alone, and the sound would be that much longer than the video.
    """
    name = stream.codec_context.name
    if name not in out.supported_codecs:
        raise _Refused(f'{out.format.name} cannot hold {name} {stream.type}')
    target = out.add_stream_from_template(stream, opaque=True)  # otherwise its codec must have an encoder here: AV1's has none
    ticks = round(start / stream.time_base)

    def packets() -> Iterator[av.Packet]:
        with media.explained(source):
            for packet in _up_to(_timed(container.demux(stream)), start + length):
                if packet.pts is not None:
                    hidden = stream.type == 'video' and packet.is_discard and packet.pts < ticks
                    if hidden and out.format.name not in HIDING:
                        raise _Refused(f'{out.format.name} cannot hide the pictures from before the beginning')
                    if packet.pts + (packet.duration or 0) < ticks and not hidden:
                        continue  # kept sound from before the video
                    packet.pts -= ticks
                packet.dts -= ticks
                packet.stream = target
                yield packet

    return packets()


def _timed(packets: Iterable[av.Packet]) -> Iterator[av.Packet]:
    """Packets of one stream; decoding times that the container leaves out at its beginning (Matroska) are filled in."""
    waiting: list[av.Packet] = []
    for packet in packets:
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


def _up_to(packets: Iterable[av.Packet], end: Fraction) -> Iterator[av.Packet]:
    """Packets of one stream that play before the end; a later one only if such a packet, decoded after it, may need it."""
    later: list[av.Packet] = []
    for packet in packets:
        if packet.dts is not None and packet.dts * packet.time_base >= end:
            return
        if packet.pts is not None and packet.pts * packet.time_base >= end:
            later.append(packet)
            continue
        yield from later
        later.clear()
        yield packet


def _encoded(out, pictures: Iterator[tuple[Fraction, av.VideoFrame]], fps: Fraction, out_path: Path) -> Iterator[av.Packet]:
    """Encodes pictures (time in seconds, frame); an odd size is scaled by a pixel, because the codecs halve the colours."""
    codec, options = CONTAINERS[pathlib.Path(out_path).suffix.lower()].pictures
    first = next(pictures, None)
    if first is None:
        raise MediaError(out_path, 'cannot be written: the video has no frames')
    width, height = (max(2, size - size % 2) for size in (first[1].width, first[1].height))
    stream = out.add_stream(codec, rate=fps, width=width, height=height, pix_fmt='yuv420p', options=options)
    stream.codec_context.time_base = CLOCK

    def packets() -> Iterator[av.Packet]:
        for time, frame in itertools.chain([first], pictures):
            fitted = frame.reformat(width=width, height=height, format='yuv420p')
            fitted.pts, fitted.time_base, fitted.pict_type = round(time / CLOCK), CLOCK, PictureType.NONE
            yield from stream.encode(fitted)
        yield from stream.encode(None)

    return packets()


def _new_track(out, sound: Sound, out_path: Path) -> Iterator[av.Packet]:
    """Adds a sound track that begins at zero."""
    waveform, rate = sound
    codec = CONTAINERS[pathlib.Path(out_path).suffix.lower()].sound
    if codec == 'libopus':
        waveform, rate = _at_rate(waveform, rate, OPUS_RATE_HZ, round(waveform.shape[-1] * OPUS_RATE_HZ / rate)), OPUS_RATE_HZ
    stream = out.add_stream(codec, rate=rate, layout='mono' if waveform.ndim == 1 else 'stereo',
                            bit_rate=AUDIO_BIT_RATE * waveform.ndim)
    return encode_sound(stream, waveform)


def encode_sound(stream, waveform: np.ndarray) -> Iterator[av.Packet]:
    """Encodes float32 [samples], or [2, samples] for stereo, as packets of an output stream that begins at zero."""
    context = stream.codec_context
    context.open(strict=False)
    size, channels = context.frame_size, np.atleast_2d(waveform)
    for at in range(0, channels.shape[1], size):
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(channels[:, at:at + size]), format='fltp',
                                           layout='mono' if len(channels) == 1 else 'stereo')
        frame.sample_rate, frame.pts, frame.time_base = context.sample_rate, at, Fraction(1, context.sample_rate)
        yield from stream.encode(frame)
    yield from stream.encode(None)


def packet_time(packet: av.Packet) -> Fraction:
    """Decoding time in seconds, by which the packets of several streams are interleaved."""
    return (packet.dts or 0) * packet.time_base
