"""How clips are read for extraction: frames and sound of a clip, or why it cannot be used; runs in worker processes.

The rules are those of MMAudio's data code: the sound is mono by averaging the channels; in the split train
its file is scaled to a peak of 0.95 and silence is rejected (there files without a sound, here clips); sound that ends too
early is rejected; it is resampled after it is cut out, with some more behind it, so that the resampler sees no edge at the
clip's end.
"""
import collections
import dataclasses
from fractions import Fraction
import functools
import math
import pathlib
from typing import Any, Iterable, Iterator, Sequence

import numpy as np

from data_pipelines import clips as clips_lib
from mmaudio_jax import media
from mmaudio_jax.resampling import resample

PEAK = 0.95  # training files are scaled to it
SILENT_PEAK = 1e-6
MARGIN_S = 0.1  # read beyond a clip's end for the resampler, whose filter reaches 4 ms
GROUP = 8  # clips of one sound file that are read together, in one pass over it
BLOCK_S = 0.05  # loudness and silence are measured over such blocks
SILENT_DB = -60.0  # a block below it, relative to full scale, counts as silence

_PEAKS: collections.OrderedDict[pathlib.Path, tuple[float, float]] = collections.OrderedDict()  # (peak, end_s) of files read
_PEAKS_KEPT = 256


@dataclasses.dataclass(frozen=True)
class Request:
    """What to read of every clip: frame streams over duration_s, and `samples` of sound at every rate in Hz."""
    frames: tuple[media.FrameRequest, ...]
    duration_s: float
    sounds: tuple[tuple[int, int], ...]  # (sampling rate in Hz, samples)

    @property
    def sound_s(self) -> float:
        """Seconds of sound that a clip must have: a little over duration_s at 44k."""
        return max(samples / rate for rate, samples in self.sounds)


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A clip as read, or why not.

    Attributes:
      frames: uint8 `[F, h, w, 3]` for each frame request; None for a sound alone.
      waveforms: float32 `[samples]` for each rate.
      measures: loudness_db (of the sound as it is in the file, relative to full scale), silent_share (of the blocks), file_s
        (length of the file's sound as far as it was read).
      rejected: None, or the reason, without the file's name; then nothing else is there.
    """
    frames: list[np.ndarray] | None = None
    waveforms: list[np.ndarray] = dataclasses.field(default_factory=list)
    measures: dict[str, float] = dataclasses.field(default_factory=dict)
    rejected: str | None = None


def _rejected(reason: str) -> Loaded:
    return Loaded(rejected=reason)


def groups(clips: Iterable[clips_lib.Clip]) -> Iterator[tuple[clips_lib.Clip, ...]]:
    """Clips as they are read: neighbours that are sounds cut from one file together, all others alone."""
    group: list[clips_lib.Clip] = []
    for clip in clips:
        together = (group and clip.video is None and group[0].video is None and clip.audio == group[0].audio
                    and clip.split == group[0].split and len(group) < GROUP)
        if group and not together:
            yield tuple(group)
            group = []
        group.append(clip)
    if group:
        yield tuple(group)


def load(group: Sequence[clips_lib.Clip], request: Request) -> list[Loaded]:
    """Reads the clips of a group, in order; what cannot be used is no error but `rejected`."""
    return [_guarded(functools.partial(_load, clip, track, request)) for clip, track in zip(group, _tracks(group, request))]


def crashed(group: Sequence[clips_lib.Clip]) -> list[Loaded]:
    """What takes the place of `load`'s result when the process that read the group died."""
    return [_rejected('the decoder crashed') for _ in group]


def _guarded(read) -> Loaded:
    """read(), or the rejection that its error means."""
    try:
        return read()
    except media.MediaError as error:
        return _rejected(error.reason)
    except UnicodeError:
        return _rejected('the file name is no text in any encoding')
    except Exception as error:  # pylint: disable=broad-except  # one bad file must not stop a job of days, whatever it raises
        return _rejected(f'{type(error).__name__}: {" ".join(str(error).split())[:200]}')


def _load(clip: clips_lib.Clip, track, request: Request) -> Loaded:
    """One clip of a group whose sound is read by track()."""
    sound, rate, peak, end_s = track()
    needed, needed_s, fill = round(request.sound_s * rate), clip.start_s + request.sound_s, clip.fill
    there = sound[:max(0, round((end_s - clip.start_s) * rate))]
    if len(there) < needed - round(media.SOUND_GAP_S * rate) and not (fill and len(there)):
        raise media.MediaError(clip.sound, f'the sound ends at {end_s:.3f} s, {needed_s:.3f} s are needed')
    own_peak = float(np.abs(there).max(initial=0.0))
    if not np.isfinite(own_peak + peak):
        raise media.MediaError(clip.sound, 'the sound is not finite')
    if clip.split == 'train' and own_peak < SILENT_PEAK:
        raise media.MediaError(clip.sound, f'silent (peak {own_peak:.1e})')
    measures = _measures(there[:round(request.duration_s * rate)], rate, end_s)
    if fill == 'repeat' and len(there) < len(sound):
        sound = np.resize(there, len(sound))
    if clip.split == 'train':
        sound = sound * np.float32(PEAK / peak)
    waveforms = []
    for to_hz, samples in request.sounds:
        waveform = resample(sound, rate, to_hz)[:samples]
        waveforms.append(np.pad(waveform, (0, samples - len(waveform))))
    frames = None
    if clip.video is not None and request.frames:
        frames = media.read_frames(clip.video, request.frames, clip.start_s, request.duration_s, threads=1,
                                   strict=True)
    return Loaded(frames, waveforms, measures)


def _measures(sound: np.ndarray, rate: int, end_s: float) -> dict[str, float]:
    """See Loaded; rounded, so that they are the same numbers wherever they are computed."""
    power = np.square(sound.astype(np.float64))
    size = max(1, round(BLOCK_S * rate))
    whole = len(power) // size * size
    blocks = power[:whole].reshape(-1, size).mean(axis=1) if whole else power.mean(keepdims=True)
    return {
        'loudness_db': round(10 * math.log10(max(power.mean(), 1e-12)), 2),
        'silent_share': round(float((blocks < 10**(SILENT_DB / 10)).mean()), 3),
        'file_s': round(end_s, 2),
    }


def _tracks(group: Sequence[clips_lib.Clip], request: Request) -> list:
    """For each clip of a group a function () -> (float32 sound from the clip's start on, rate in Hz, the file's peak, its end
    in seconds); it raises MediaError when the file cannot be read.

    A training file is read whole once, for its peak, and the clips of the group are cut out on the way; later groups of the
    same file seek.
    """
    path, length_s = group[0].sound, request.sound_s + MARGIN_S

    def seek(clip):
        sound, rate, end_s = media.read_track(path, clip.start_s, length_s, threads=1)
        known = _PEAKS if clip.split == 'train' else {}  # what training read before must not show in other splits' measures
        peak, file_s = known.get(path, (1.0, end_s))
        return sound, rate, peak, max(end_s, file_s)

    if group[0].split == 'train' and path not in _PEAKS:
        try:
            sounds, rate, peak, end_s = _read_whole(path, [clip.start_s for clip in group], length_s)
        except Exception as error:  # pylint: disable=broad-except  # raised again for each clip, in _guarded
            return [functools.partial(_raise, error) for _ in group]
        _PEAKS[path] = peak, end_s
        if len(_PEAKS) > _PEAKS_KEPT:
            _PEAKS.popitem(last=False)
        return [functools.partial(lambda *found: found, sound, rate, peak, end_s) for sound in sounds]
    return [functools.partial(seek, clip) for clip in group]


def _raise(error: Exception) -> Any:
    raise error


def _read_whole(path: pathlib.Path, starts_s: Sequence[float], length_s: float) -> tuple[list[np.ndarray], int, float, float]:
    """Several parts of a file's sound in one pass over all of it; memory holds the parts only.

    Args:
      path: of the file.
      starts_s: where the parts start, seconds.
      length_s: of every part.

    Returns:
      (float32 mono parts at the file's own rate, silence where it has no sound; the rate in Hz; its peak; its end in seconds).

    Raises:
      MediaError: as media.read_track.
    """
    with media.opened(path) as container:
        rate, zero = media.audio_stream(container, path).rate, media.time_zero(container, path)
        firsts = [round(start_s * rate) for start_s in starts_s]
        parts = [np.zeros(round(length_s * rate), np.float32) for _ in starts_s]
        peak, end = 0.0, 0
        for place, samples in media.sound_blocks(container, path, zero, Fraction(0), threads=1):
            peak, end = max(peak, float(np.abs(samples[max(0, -place):]).max(initial=0.0))), place + len(samples)
            for first, part in zip(firsts, parts):
                at = place - first
                if -len(samples) < at < len(part):
                    piece = samples[max(0, -at):len(part) - at]
                    part[max(0, at):max(0, at) + len(piece)] = piece
    return parts, rate, peak, end / rate
