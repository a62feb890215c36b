"""Clips for fault runs: good ones of many kinds, and ones that are broken in ten ways."""
from fractions import Fraction
import json
import os
import pathlib
import struct
from typing import Callable

import av
import numpy as np

from mmaudio_jax import media

SIZE, FPS, RATE_HZ, LENGTH_S = 64, 25, 16_000, 1.3


def write_av(path: pathlib.Path, seed: int, *, seconds: float = LENGTH_S, sound_s: float | None = None, fps: float = FPS,
             rate: int = RATE_HZ, layout: str = 'stereo', video: str = 'libx264', audio: str = 'aac', container: str = 'mp4',
             frames: int | None = None) -> None:
    """A square that wanders over a background, and noise that swells; video or audio '' leaves that track out."""
    rng = np.random.default_rng(seed)
    with av.open(os.fspath(path), 'w', format=container) as out:
        if video:
            options = {'preset': 'ultrafast', 'threads': '1', 'g': '10'} if video == 'libx264' else {}
            picture = out.add_stream(video, rate=Fraction(fps).limit_denominator(1001), width=SIZE, height=SIZE,
                                     pix_fmt='yuv420p', options=options)
        if audio:
            track = out.add_stream(audio, rate=rate, layout=layout)
        if video:
            background = rng.integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
            for i in range(round(seconds * fps) if frames is None else frames):
                pixels = background.copy()
                at = (7 * i + seed) % (SIZE - 16)
                pixels[at:at + 16, at:at + 16] = 255 - 8 * (seed % 16)
                frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
                frame.pts = i
                out.mux(picture.encode(frame))
            out.mux(picture.encode(None))
        if audio:
            length = round((seconds if sound_s is None else sound_s) * rate)
            channels = av.AudioLayout(layout).nb_channels
            noise = (rng.standard_normal((channels, length)) * np.linspace(0.01, 0.2, length)).astype(np.float32)
            size = track.codec_context.frame_size or 1024
            for at in range(0, length, size):
                block = av.AudioFrame.from_ndarray(np.ascontiguousarray(noise[:, at:at + size]), format='fltp', layout=layout)
                block.sample_rate, block.pts, block.time_base = rate, at, Fraction(1, rate)
                out.mux(track.encode(block))
            out.mux(track.encode(None))


GOOD: list[Callable[[pathlib.Path, int], pathlib.Path]] = []
BROKEN: dict[str, list[Callable[[pathlib.Path, int], pathlib.Path]]] = {}


def good(function):
    """Registers a kind of good clip."""
    GOOD.append(function)
    return function


def broken(kind: str):
    """Registers a broken clip of a kind."""
    def register(function):
        BROKEN.setdefault(kind, []).append(function)
        return function
    return register


def _file(stem: pathlib.Path, suffix: str) -> pathlib.Path:
    return stem.with_name(stem.name + suffix)


def _av(suffix: str, **fields) -> Callable[[pathlib.Path, int], pathlib.Path]:
    def make(stem: pathlib.Path, seed: int) -> pathlib.Path:
        write_av(_file(stem, suffix), seed, **fields)
        return _file(stem, suffix)
    return make


def _sound(stem: pathlib.Path, seed: int, seconds: float = LENGTH_S, rate: int = 22_050, suffix: str = '.flac') -> pathlib.Path:
    length = round(seconds * rate)
    noise = np.random.default_rng(seed).standard_normal(length) * np.linspace(0.01, 0.2, length)
    media.write_audio(_file(stem, suffix), noise, rate)
    return _file(stem, suffix)


good(_av('.mp4'))
good(_av('.mp4', layout='5.1', rate=48_000))
good(_av('.mkv', container='matroska', video='mpeg4', audio='libopus', rate=48_000))
good(_av('.mp4', fps=30_000 / 1001, rate=11_025))  # odd rates
good(_av('.avi', fps=12.5, layout='mono'))  # an mp4 with another ending
good(_sound)
good(_av('.mp4', fps=60.0, rate=44_100))


def _bytes(suffix: str, content: bytes) -> Callable[[pathlib.Path, int], pathlib.Path]:
    def make(stem: pathlib.Path, seed: int) -> pathlib.Path:
        del seed
        _file(stem, suffix).write_bytes(content)
        return _file(stem, suffix)
    return make


def _changed(make: Callable[[pathlib.Path, int], pathlib.Path],
             change: Callable[[bytes], bytes]) -> Callable[[pathlib.Path, int], pathlib.Path]:
    def make_changed(stem: pathlib.Path, seed: int) -> pathlib.Path:
        path = make(stem, seed)
        path.write_bytes(change(path.read_bytes()))
        return path
    return make_changed


def _cut(share: float) -> Callable[[bytes], bytes]:
    return lambda content: content[:int(share * len(content))]


def _scrambled(content: bytes) -> bytes:
    """The middle of the media data overwritten."""
    at, length = len(content) * 45 // 100, len(content) // 10
    return content[:at] + np.random.default_rng(0).bytes(length) + content[at + length:]


def _wav(rate: int) -> bytes:
    """A wav file whose header says `rate`."""
    samples = (3000 * np.sin(np.arange(40_000) / 9)).astype('<i2').tobytes()
    form = struct.pack('<4sIHHIIHH', b'fmt ', 16, 1, 1, rate, (2 * rate) % 2**32, 2, 16)
    return b'RIFF' + struct.pack('<I', 36 + len(samples)) + b'WAVE' + form + b'data' + struct.pack('<I', len(samples)) + samples


for _suffix in ('.mp4', '.webm', '.wav', '.flac', '.mkv'):
    broken('empty')(_bytes(_suffix, b''))
broken('truncated')(_changed(_av('.mp4'), _cut(0.6)))
broken('truncated')(_changed(_av('.mkv', container='matroska', audio='libopus', rate=48_000), _cut(0.5)))
broken('truncated')(_changed(_sound, _cut(0.5)))
broken('truncated')(_changed(_av('.mp4'), _cut(0.98)))
broken('truncated')(_changed(_av('.mp4', layout='mono'), _cut(0.02)))
broken('wrong extension')(_bytes('.mp4', b'This is a text.\n' * 500))
broken('wrong extension')(_bytes('.wav', b'<!DOCTYPE html><html>Video unavailable</html>'))
broken('wrong extension')(_bytes('.flac', b'%PDF-1.7\n' + bytes(range(256)) * 8))
broken('wrong extension')(_bytes('.mkv', b'PK\x03\x04' + bytes(2000)))
broken('wrong extension')(_bytes('.webm', json.dumps({'error': 'private video'}).encode()))
for _suffix, _container in (('.mp4', 'mp4'), ('.mkv', 'matroska'), ('.mov', 'mov'), ('.m4v', 'mp4'), ('.avi', 'avi')):
    broken('no audio')(_av(_suffix, container=_container, audio=''))
for _suffix, _container in (('.mp4', 'mp4'), ('.mkv', 'matroska'), ('.mov', 'mov'), ('.m4v', 'mp4'), ('.avi', 'avi')):
    broken('no video')(_av(_suffix, container=_container, video='', audio='aac'))
broken('zero duration')(_av('.mp4', frames=1, sound_s=0.07))
broken('zero duration')(_av('.mkv', container='matroska', frames=1, sound_s=0.07))
broken('zero duration')(lambda stem, seed: _sound(stem, seed, 0.001))
broken('zero duration')(_bytes('.wav', _wav(16_000)[:40] + bytes(4)))
broken('zero duration')(_av('.mov', container='mov', frames=2, sound_s=0.07))
broken('odd rates')(_bytes('.wav', _wav(0)))
broken('odd rates')(_bytes('.wav', _wav(2_000_000_000)))
broken('odd rates')(_bytes('.wav', _wav(96_000 * 7)))  # 40 000 samples last 0.06 s then
broken('odd rates')(_av('.mp4', fps=1000.0, frames=30))
broken('odd rates')(_av('.mkv', container='matroska', fps=500.0, frames=30))
for _layout in ('5.1', '5.1(side)', '5.1', '5.1(side)', '5.0'):
    broken('5.1 sound')(_av('.mp4', layout=_layout, rate=48_000, sound_s=0.4))  # which ends early
for _seed in range(5):
    broken('corrupt frames')(_changed(_av('.mp4', seconds=1.3 + 0.1 * _seed), _scrambled))


@broken('unreadable name')
def _too_long(stem: pathlib.Path, seed: int) -> pathlib.Path:
    del seed
    return stem.with_name(stem.name + 'n' * 300 + '.mp4')


@broken('unreadable name')
def _no_text(stem: pathlib.Path, seed: int) -> pathlib.Path:
    del seed
    return stem.with_name(stem.name + '\ud800.mp4')


@broken('unreadable name')
def _missing_bytes(stem: pathlib.Path, seed: int) -> pathlib.Path:
    del seed
    return stem.with_name(stem.name + '\udcff\udcfe.mp4')


@broken('unreadable name')
def _a_folder(stem: pathlib.Path, seed: int) -> pathlib.Path:
    del seed
    _file(stem, '.mp4').mkdir(exist_ok=True)
    return _file(stem, '.mp4')


@broken('unreadable name')
def _dangling(stem: pathlib.Path, seed: int) -> pathlib.Path:
    del seed
    if not _file(stem, '.mp4').is_symlink():
        _file(stem, '.mp4').symlink_to(stem.name + '-gone.mp4')
    return _file(stem, '.mp4')


def write_dataset(folder: pathlib.Path, clips: int, of_each_kind: int, distinct: int = 4) -> list[str]:
    """Media and train.jsonl of `clips` clips, the broken ones evenly among them.

    Args:
      folder: of the table.
      clips: in all.
      of_each_kind: broken ones, at most five.
      distinct: files of every good kind; the other clips are links to them.

    Returns:
      The ids of the broken clips, in the order of the table.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sources = [make(folder / f'good-{k}-{i}', 10 * k + i) for k, make in enumerate(GOOD) for i in range(distinct)]
    bad = [(kind, make) for i in range(of_each_kind) for kind, makers in BROKEN.items() for make in [makers[i]]]
    step, rows, names = clips / len(bad), [], []
    places = {int((k + 0.5) * step): entry for k, entry in enumerate(bad)}
    for i in range(clips):
        if i in places:
            kind, make = places[i]
            path = make(folder / f'broken-{i}', i)
            names.append(f'{i:03d} {kind}')
        else:
            source = sources[i % len(sources)]
            path = folder / f'clip-{i}{source.suffix}'
            if not path.is_symlink():
                path.symlink_to(source.name)
        sound = path.suffix in ('.wav', '.flac')
        rows.append({'id': names[-1] if i in places else f'{i:03d}', 'video': None if sound else path.name,
                     'audio': path.name if sound else None, 'caption': f'thing {i % 40}', 'split': 'train',
                     'label': f'{i % 7}'})
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    return names
