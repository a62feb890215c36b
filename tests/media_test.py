"""Frame selection and resizing against the golden and exact cases; sound, muxing and bad files."""
import errno
import os
import struct

import av
import numpy as np
import pytest

from mmaudio_jax import media
from mmaudio_jax.media import FrameRequest
from tests.conftest import GOLDEN

SMALL = FrameRequest(fps=25.0, height=48, width=64, fit='squash')


def write_video(path, frames=25, fps=25, codec='libx264', size=(64, 48), skip=()):
    """Writes frames whose brightness is 8 x their number."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = 'yuv420p'
        for k in range(frames):
            if k in skip:
                continue
            pixels = np.full((size[1], size[0], 3), 8 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def numbers(frames):
    """The frame numbers that write_video drew, read back."""
    return np.round(frames.mean(axis=(1, 2, 3)) / 8).astype(int).tolist()


def tone(samples, rate):
    return 0.5 * np.sin(2 * np.pi * 440 * np.arange(samples) / rate).astype(np.float32)


@pytest.mark.parametrize('name,request_,step', [('clip', FrameRequest(8.0, 384, 384, 'squash'), 6),
                                                ('sync', FrameRequest(25.0, 224, 224, 'crop'), 4)])
def test_resizing_is_the_official_one(name, request_, step):
    golden = np.load(GOLDEN / 'frames.npz')
    ours = np.stack([media.fit_frame(frame, request_) for frame in golden['frames']]).astype(np.float64)
    if name == 'clip':
        mean, std = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    else:
        mean, std = np.array([0.5] * 3), np.array([0.5] * 3)
    levels = (golden[name].transpose(0, 2, 3, 1) * std + mean) * 255
    error = np.abs(ours[:, ::step, ::step] - levels)
    assert error.max() < 1.01  # measured 1.00003 grey levels, at 0.15 % (clip) and 0.44 % (sync) of the pixels
    assert (error > 0.5).mean() < 0.005
    assert np.abs((ours.mean(axis=(1, 2)) / 255 - mean) / std - golden[name + '_mean']).max() < 2e-5  # measured 8.1e-6


def test_same_rate_takes_each_frame_once(tmp_path):
    path = write_video(tmp_path / 'a.mp4')
    eight = FrameRequest(fps=8.0, height=20, width=20, fit='crop')
    fine, coarse = media.read_frames(path, [SMALL, eight], 0.0, 1.0)
    assert numbers(fine) == list(range(25))
    assert coarse.shape == (8, 20, 20, 3)
    assert numbers(coarse) == [0, 4, 7, 10, 13, 16, 19, 22]  # the first frame at or after k / 8 s
    assert numbers(media.read_frames(path, [SMALL], 0.4, 0.4)[0]) == list(range(10, 20))


def test_a_frame_may_serve_several_samples_and_gaps_take_the_next(tmp_path):
    path = write_video(tmp_path / 'a.mkv', frames=12, fps=10, skip=(4, 5))
    assert numbers(media.read_frames(path, [FrameRequest(20.0, 48, 64, 'squash')], 0.0, 1.0)[0]) == [
        0, 1, 1, 2, 2, 3, 3, 6, 6, 6, 6, 6, 6, 7, 7, 8, 8, 9, 9, 10]


def test_an_early_end_repeats_the_last_frame_once_only(tmp_path):
    path = write_video(tmp_path / 'a.mp4', frames=24)
    assert numbers(media.read_frames(path, [SMALL], 0.0, 1.0)[0]) == list(range(24)) + [23]
    with pytest.raises(media.MediaError, match=r'a\.mp4: the video ends at 0\.960 s, 1\.040 s are needed'):
        media.read_frames(path, [SMALL], 0.0, 1.04)


def test_late_timestamps_count_from_the_start(tmp_path):
    path = write_video(tmp_path / 'late.ts', skip=(0, 1, 2))
    assert numbers(media.read_frames(path, [SMALL], 0.0, 0.8)[0])[:20] == list(range(3, 23))


def test_rotated_video_stands_upright(tmp_path):
    path = tmp_path / 'a.mp4'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, 'yuv420p'
        pixels = np.zeros((48, 64, 3), np.uint8)
        pixels[:24, :32] = 200  # bright top left corner
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format='rgb24')))
        container.mux(stream.encode(None))
    content = bytearray(path.read_bytes())
    matrix = content.index(b'tkhd') + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    content[matrix:matrix + 36] = struct.pack('>9i', 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)  # a quarter turn to the right
    path.write_bytes(content)
    frame, = media.read_frames(path, [FrameRequest(25.0, 64, 48, 'squash')], 0.0, 0.04)[0]
    corners = frame[[4, 4, -4, -4], [4, -4, 4, -4], 0]
    assert (corners > 150).tolist() == [False, True, False, False]


def test_sound_is_mono_and_exact(tmp_path):
    path = tmp_path / 'a.wav'
    media.write_audio(path, tone(16_000, 16_000), 16_000)
    read = media.read_audio(path, 16_000, 0.25, 0.5)
    assert read.shape == (8_000,) and read.dtype == np.float32
    assert np.abs(read - tone(16_000, 16_000)[4_000:12_000]).max() <= 1 / 32_768
    assert media.duration_s(path) == 1.0
    with pytest.raises(media.MediaError, match='the sound ends at 1.000 s, 2.000 s are needed'):
        media.read_audio(path, 16_000, 0.0, 2.0)


@pytest.mark.parametrize('suffix,codec', [('.mp4', 'libx264'), ('.mov', 'libx264'), ('.mkv', 'libx264'), ('.webm', 'libvpx')])
def test_mux_copies_the_video_and_keeps_the_sound_exact(tmp_path, suffix, codec):
    source, out = write_video(tmp_path / f'in{suffix}', codec=codec), tmp_path / f'out{suffix}'
    sound = tone(41_237, 48_000)
    sound[:10_000] = 0
    media.mux(source, sound, 48_000, out)

    def packets(path):
        with av.open(str(path)) as container:
            return [bytes(packet) for packet in container.demux(video=0) if packet.size]

    assert packets(out) == packets(source)
    read = media.read_audio(out, 48_000, 0.0, None)
    assert len(read) == len(sound)
    lags = range(-200, 201)
    scores = [np.dot(read[9_000:30_000], sound[9_000 + lag:30_000 + lag]) for lag in lags]
    assert abs(lags[int(np.argmax(scores))]) <= 2  # encoder delay is cut: measured 0
    assert numbers(media.read_frames(out, [SMALL], 0.0, 1.0)[0]) == list(range(25))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.endswith('.part')] == []


def test_bad_files_are_one_line(tmp_path):
    text = tmp_path / 'text.mp4'
    text.write_text('not a video')
    whole = write_video(tmp_path / 'whole.mp4')
    cut = tmp_path / 'cut.mp4'
    cut.write_bytes(whole.read_bytes()[:-200])
    silent = tmp_path / 'sound.wav'
    media.write_audio(silent, tone(16_000, 16_000), 16_000)
    empty = tmp_path / 'empty.mp4'
    empty.write_bytes(b'')
    cases = [(text, 'not a media file'), (cut, 'not a media file, or damaged or cut off'), (tmp_path, 'is a directory'),
             (tmp_path / 'missing.mp4', 'no such file'), (silent, 'has no video stream'), (empty, 'not a media file')]
    for path, reason in cases:
        with pytest.raises(media.MediaError, match=reason) as error:
            media.read_frames(path, [SMALL], 0.0, 1.0)
        assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)
    with pytest.raises(media.MediaError, match='has no sound track'):
        media.read_audio(whole, 16_000, 0.0, 1.0)
    with pytest.raises(media.MediaError, match='cannot hold h264'):
        media.mux(whole, tone(16_000, 16_000), 16_000, tmp_path / 'a.webm')
    with pytest.raises(media.MediaError, match='not finite'):
        media.write_audio(tmp_path / 'a.wav', np.array([np.nan]), 16_000)
    with pytest.raises(media.MediaError, match='sound is written as .flac or .wav'):
        media.write_audio(tmp_path / 'a.mp3', tone(16, 16_000), 16_000)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read everything')
def test_no_permission(tmp_path):
    path = write_video(tmp_path / 'a.mp4')
    path.chmod(0)
    with pytest.raises(media.MediaError, match='no permission'):
        media.read_frames(path, [SMALL], 0.0, 1.0)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / 'a.wav').write_bytes(b'before')

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(media.MediaError, match='a.wav: No space left on device'):
        media.write_audio(tmp_path / 'a.wav', tone(100, 16_000), 16_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.wav']
    assert (tmp_path / 'a.wav').read_bytes() == b'before'
