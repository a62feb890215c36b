"""Frame selection, sound, and files of every kind: what is read from them, and what is said of bad ones."""
import errno
from fractions import Fraction
import os
import struct
import subprocess
import sys

import av
import numpy as np
import pytest

from mmaudio_jax import evaluation_media
from mmaudio_jax import media
from mmaudio_jax import mux
from mmaudio_jax.media import FrameRequest
from tests.conftest import GOLDEN

SMALL = FrameRequest(fps=25.0, height=48, width=64, fit='squash')


def write_video(path, frames=25, fps=25, codec='libx264', size=(64, 48), skip=()):
    """Writes frames whose brightness is 8 x their number, modulo 256."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height = size
        stream.pix_fmt = 'yuv420p'
        for k in range(frames):
            if k in skip:
                continue
            pixels = np.full((size[1], size[0], 3), 8 * k % 256, np.uint8)
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


def filtered(path, fps):
    """The frames that FFmpeg's filter fps makes of a video: what the released extraction reads."""
    taken = []
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = av.filter.Graph()
        graph.link_nodes(graph.add_buffer(template=stream), graph.add('fps', f'fps={fps}'), graph.add('buffersink')).configure()
        for frame in [*container.decode(stream), None]:
            graph.push(frame)
            while True:
                try:
                    taken.append(graph.pull().to_ndarray(format='rgb24'))
                except (av.error.BlockingIOError, av.error.EOFError):
                    break
    return np.stack(taken)


@pytest.mark.parametrize('rate', [12, 24, 25, 30, Fraction(30_000, 1001), 60])
def test_the_nearest_frames_are_those_of_the_filter_of_the_released_extraction(tmp_path, rate):
    path = write_video(tmp_path / 'a.mp4', frames=int(2 * rate), fps=rate, skip=(5, 6, 11))
    for fps in (8, 25):
        ours, = media.read_frames(path, [FrameRequest(float(fps), 48, 64, 'squash', rule='nearest')], 0.0, 1.8)
        assert numbers(ours) == numbers(filtered(path, fps)[:len(ours)])
        later, = media.read_frames(path, [FrameRequest(float(fps), 48, 64, 'squash')], 0.0, 1.8)
        assert numbers(ours) != numbers(later)


def test_an_early_end_repeats_the_last_frame_once_only(tmp_path):
    path = write_video(tmp_path / 'a.mp4', frames=24)
    assert numbers(media.read_frames(path, [SMALL], 0.0, 1.0)[0]) == list(range(24)) + [23]
    with pytest.raises(media.MediaError, match=r'a\.mp4: the video ends at 0\.960 s, 1\.040 s are needed'):
        media.read_frames(path, [SMALL], 0.0, 1.04)


def test_late_timestamps_count_from_the_start(tmp_path):
    path = write_video(tmp_path / 'late.ts', skip=(0, 1, 2))
    assert numbers(media.read_frames(path, [SMALL], 0.0, 0.8)[0])[:20] == list(range(3, 23))


def write_sound_and_video(path, hz=440.0, corner=False, rate=44_100):
    """One second: white frames, or dark ones with a bright top left corner; stereo, a tone whose right side is half as loud."""
    pixels = np.full((48, 64, 3), 0 if corner else 255, np.uint8)
    pixels[:24, :32] = 200
    left = 0.5 * np.sin(2 * np.pi * hz * np.arange(rate) / rate).astype(np.float32)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p')
        sound = container.add_stream('aac', rate=rate, layout='stereo', bit_rate=256_000)
        for k in range(25):
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        container.mux(list(mux.encode_sound(sound, np.stack([left, left / 2]))))
    return path


def rotate(path):
    """Writes a quarter turn to the right into an mp4 file, as phones do."""
    content = bytearray(path.read_bytes())
    matrix = content.index(b'tkhd') + 4 + 4 + 20 + 8 + 8
    one = 1 << 16
    content[matrix:matrix + 36] = struct.pack('>9i', 0, one, 0, -one, 0, 0, 48 * one, 0, 1 << 30)
    path.write_bytes(content)
    return path


def test_a_start_of_a_few_milliseconds_is_none(tmp_path):
    with av.open(str(tmp_path / 'a.mkv'), 'w') as container:
        stream = container.add_stream('ffv1', rate=25, width=64, height=48, pix_fmt='yuv420p')
        stream.codec_context.time_base = Fraction(1, 1000)
        for k in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * k, np.uint8), format='rgb24')
            frame.pts, frame.time_base = 40 * k + 3, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert media.duration_s(tmp_path / 'a.mkv') == pytest.approx(1.003, abs=0.0011)
    assert numbers(media.read_frames(tmp_path / 'a.mkv', [SMALL], 0.0, 1.0)[0]) == list(range(25))


def test_rotated_video_stands_upright(tmp_path):
    path = rotate(write_sound_and_video(tmp_path / 'a.mp4', corner=True))
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
    with pytest.raises(media.MediaError, match='not finite'):
        media.write_audio(tmp_path / 'a.wav', np.array([np.nan]), 16_000)
    with pytest.raises(media.MediaError, match='sound is written as .flac or .wav'):
        media.write_audio(tmp_path / 'a.mp3', tone(16, 16_000), 16_000)


def test_a_colon_is_no_protocol_and_an_address_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / 'file:a.mp4')
    assert media.duration_s('file:a.mp4') == 1.0
    mux.write_video('file:a.mp4', tone(16_000, 16_000), 16_000, '12:30.mp4')
    assert media.duration_s('12:30.mp4') == 1.0 and len(evaluation_media.read_sound('12:30.mp4')[0][0]) >= 16_000
    assert len(evaluation_media.synchformer_picture('12:30.mp4', 1.0)) == 25
    for path in ('https://example.com/a.mp4', 'https:/example.com/a.mp4', 'videos/http:/example.com/a.mp4', 'pipe://a'):
        with pytest.raises(media.MediaError, match=f'^{path}: is an address; download it first'):
            media.duration_s(path)


def test_a_folder_that_is_missing_is_named(tmp_path):
    folder, source = tmp_path / 'nodir' / 'x', write_video(tmp_path / 'a.mp4')
    with pytest.raises(media.MediaError, match='x/o.wav: no such folder .*nodir/x$'):
        media.write_audio(folder / 'o.wav', tone(16_000, 16_000), 16_000)
    with pytest.raises(media.MediaError, match='x/o.mp4: no such folder .*nodir/x$'):
        mux.write_video(source, tone(16_000, 16_000), 16_000, folder / 'o.mp4')


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv', '.webm', '.avi', '.ts', '.mov'])
def test_a_video_of_one_frame(tmp_path, suffix):
    path = write_video(tmp_path / f'one{suffix}', frames=1, codec='libvpx' if suffix == '.webm' else 'mpeg4')
    assert media.duration_s(path) == pytest.approx(0.04, abs=0.0011)  # Matroska counts in milliseconds
    frames, = media.read_frames(path, [SMALL], 0.0, 0.8, needed_s=0.04)
    assert frames.shape == (20, 48, 64, 3)
    with pytest.raises(media.MediaError, match='the video ends at 0.04'):
        media.read_frames(path, [SMALL], 0.0, 0.8)


@pytest.mark.parametrize('size,codec', [((33, 17), 'ffv1'), ((2, 2), 'ffv1'), ((5, 4), 'ffv1'), ((854, 480), 'libx264')])
def test_odd_sizes(tmp_path, size, codec):
    path = write_video(tmp_path / 'odd.mkv', frames=10, size=size, codec=codec)
    crop = FrameRequest(25.0, 24, 24, 'crop')
    squashed, cropped = media.read_frames(path, [SMALL, crop], 0.0, 0.4)
    assert numbers(squashed) == numbers(cropped) == list(range(10))


def test_variable_frame_rate_follows_the_timestamps(tmp_path):
    times_ms, path = [0, 40, 41, 200, 210, 590, 960], tmp_path / 'a.mkv'
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p')
        stream.codec_context.time_base = Fraction(1, 1000)
        for k, time_ms in enumerate(times_ms):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * k, np.uint8), format='rgb24')
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    expected = [next(k for k, time_ms in enumerate(times_ms) if time_ms >= 40 * i) for i in range(25)]
    assert numbers(media.read_frames(path, [SMALL], 0.0, 1.0)[0]) == expected


def test_the_first_stream_of_several_counts_and_cover_pictures_do_not(tmp_path):
    path = tmp_path / 'several.mkv'
    with av.open(str(path), 'w') as container:
        sounds = [container.add_stream('pcm_s16le', rate=16_000, layout='mono') for _ in range(2)]
        videos = [container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p') for _ in range(2)]
        for number, (sound, video) in enumerate(zip(sounds, videos)):
            for k in range(25):
                pixels = np.full((48, 64, 3), 8 * k if number == 0 else 255, np.uint8)
                frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
                frame.pts = k
                container.mux(video.encode(frame))
            container.mux(video.encode(None))
            frame = av.AudioFrame.from_ndarray(np.full((1, 16_000), 1_000 * (number + 1), np.int16), 's16', 'mono')
            frame.sample_rate = 16_000
            container.mux(sound.encode(frame))
    assert numbers(media.read_frames(path, [SMALL], 0.0, 1.0)[0]) == list(range(25))
    assert media.read_audio(path, 16_000, 0.0, 1.0).mean() == pytest.approx(1_000 / 32_768)
    covered = tmp_path / 'song.mp4'
    with av.open(str(covered), 'w') as container:
        sound = container.add_stream('aac', rate=16_000, layout='mono')
        cover = container.add_stream('mjpeg', rate=25, width=64, height=48, pix_fmt='yuvj420p')
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format='rgb24')))
        container.mux(list(mux.encode_sound(sound, tone(16_000, 16_000))))
    with pytest.raises(media.MediaError, match='song.mp4: has no video stream'):
        media.read_frames(covered, [SMALL], 0.0, 1.0)


def test_memory_does_not_grow_with_the_frames(tmp_path):
    """40 more frames of 6 MB each need no more memory than their scaled copies."""
    path = write_video(tmp_path / 'large.mp4', frames=50, codec='mpeg4', size=(1920, 1080))
    code = (f'import resource; from mmaudio_jax import media; media.read_frames({str(path)!r}, '
            "[media.FrameRequest(8.0, 384, 384, 'squash'), media.FrameRequest(25.0, 224, 224, 'crop')], 0.0, DURATION); "
            'print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)')
    peaks = [int(subprocess.run([sys.executable, '-c', code.replace('DURATION', duration)], check=True, capture_output=True,
                                cwd=GOLDEN.parents[1]).stdout) for duration in ('0.4', '2.0')]
    results = 1.6 * (8 * 384 * 384 * 3 + 25 * 224 * 224 * 3) / 2**20
    assert peaks[1] - peaks[0] < results + 40  # measured: 0 MB more


def test_files_that_were_cut_off(tmp_path):
    whole = write_video(tmp_path / 'whole.mp4', frames=60)
    front = {'movflags': 'faststart'}
    with av.open(str(tmp_path / 'front.mp4'), 'w', options=front) as container, av.open(str(whole)) as source:
        target = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = target
                container.mux(packet)
    webm = write_video(tmp_path / 'whole.webm', frames=60, codec='libvpx')
    for path, reason in ((whole, 'damaged or cut off'), (tmp_path / 'front.mp4', 'is cut off: its table of contents'),
                         (webm, r'is cut off: its header says 2.400 s, it ends at')):
        assert media.duration_s(path) == pytest.approx(2.4)
        path.write_bytes(path.read_bytes()[:path.stat().st_size * 2 // 3])
        with pytest.raises(media.MediaError, match=reason) as error:
            media.duration_s(path)
        assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_no_frames(tmp_path):
    with av.open(str(tmp_path / 'none.mp4'), 'w') as container:
        container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p')
        container.start_encoding()
    with pytest.raises(media.MediaError, match='none.mp4: '):
        media.duration_s(tmp_path / 'none.mp4')
    with pytest.raises(media.MediaError, match='none.mp4: '):
        media.read_frames(tmp_path / 'none.mp4', [SMALL], 0.0, 1.0)


def test_a_very_long_video_is_refused_without_reading_it(tmp_path):
    with av.open(str(tmp_path / 'long.mp4'), 'w') as container:
        stream = container.add_stream('mpeg4', rate=Fraction(1, 100), width=16, height=16, pix_fmt='yuv420p')
        for k in range(361):
            frame = av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format='rgb24')
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert media.duration_s(tmp_path / 'long.mp4') == 36_100
    message = r'long.mp4: lasts 36100 s, more than 120 s: set duration_s to take its beginning'
    with pytest.raises(media.MediaError, match=message):
        media.duration_s(tmp_path / 'long.mp4', at_most_s=120)


def test_no_permission(tmp_path, monkeypatch):
    path = write_video(tmp_path / 'a.mp4')

    def refuse(*_, **__):  # root may read everything, so that a file without permissions does not show it
        raise av.error.PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(av, 'open', refuse)
    with pytest.raises(media.MediaError, match='a.mp4: no permission'):
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


def test_a_converter_that_is_kept_changes_no_picture():
    """Also when size, scale and format change on the way."""
    rng, converter = np.random.default_rng(0), media.VideoReformatter()
    for size, divide in (((48, 64), 1), ((48, 64), 2), ((32, 96), 2), ((48, 64), 1)):
        for layout in ('yuv420p', 'rgb24'):
            pixels = rng.integers(0, 255, (*size, 3), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24').reformat(format=layout)
            kept, alone = (np.asarray(media.upright(frame, divide, used)) for used in (converter, None))
            assert kept.shape == (size[0] // divide, size[1] // divide, 3)
            np.testing.assert_array_equal(kept, alone)
            if layout == 'rgb24' and divide == 1:
                np.testing.assert_array_equal(kept, pixels)


def test_damaged_frames_are_refused_where_they_are_asked_to_be(tmp_path):
    """Extraction must not train on them; generation shows what players show."""
    path, rng = tmp_path / 'a.mp4', np.random.default_rng(0)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('mpeg4', rate=25, width=64, height=48, pix_fmt='yuv420p')
        for k in range(50):
            frame = av.VideoFrame.from_ndarray(rng.integers(0, 256, (48, 64, 3), np.uint8), format='rgb24')
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        packet = [packet for packet in container.demux(video=0) if packet.size][20]
        place, end = packet.pos + packet.size // 2, packet.pos + packet.size
    content = bytearray(path.read_bytes())
    content[place:end] = bytes(end - place)
    path.write_bytes(content)
    assert len(media.read_frames(path, [SMALL], 0.0, 1.5)[0]) == 37
    with pytest.raises(media.MediaError, match='the frame at 0.800 s is damaged'):
        media.read_frames(path, [SMALL], 0.0, 1.5, strict=True)


def test_a_name_as_long_as_names_can_be(tmp_path):
    path = tmp_path / ('a' * 250 + '.flac')
    media.write_audio(path, np.zeros(160, np.float32), 16_000)
    assert [path.name for path in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize('start_s', [0.0, 2.0])
def test_pictures_of_an_avi_are_read_in_the_order_in_which_they_are_shown(tmp_path, start_s):
    """It gives those of H.264 the times in which they are stored, so that the next ones but one came in their places."""
    requests, levels = [FrameRequest(25.0, 2, 2, 'squash', rule=rule) for rule in ('after', 'nearest')], []
    for name in ('a.mp4', 'a.avi'):
        with av.open(str(tmp_path / name), 'w') as container:
            stream = container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p',
                                          options={'bf': '3', 'sc_threshold': '0', 'x264-params': 'b-adapt=0'})
            for k in range(100):
                frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 2 * k, np.uint8), format='rgb24')
                frame.pts = k
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        levels.append([[frame.mean() for frame in part] for part in media.read_frames(tmp_path / name, requests, start_s, 1.0)])
    np.testing.assert_allclose(*levels, atol=3)
