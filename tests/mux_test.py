"""Videos with new sound: copied bit for bit or encoded anew, in every container; the original's sound; a full disk."""
from fractions import Fraction
import itertools
import warnings

import av
import numpy as np
import pytest

from mmaudio_jax import media
from mmaudio_jax import mux
from mmaudio_jax.frames import FrameRequest
from mmaudio_jax.frames import Frames
from tests import full_disk
from tests.media_test import numbers
from tests.media_test import rotate
from tests.media_test import SMALL
from tests.media_test import tone
from tests.media_test import write_sound_and_video
from tests.media_test import write_video

RATE = 48_000


def packets(path, kind='video', index=0):
    """The bytes of every packet of a stream."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[index]
        return [bytes(packet) for packet in container.demux(stream) if packet.size]


def level(waveform, hz, rate):
    """Amplitude of a tone."""
    return 2 * abs(np.mean(waveform * np.exp(-2j * np.pi * hz * np.arange(waveform.shape[-1]) / rate)))


def leftovers(folder):
    return [entry.name for entry in folder.iterdir() if entry.name.endswith('.part')]


@pytest.mark.parametrize('suffix,codec', [('.mp4', 'libx264'), ('.mov', 'libx264'), ('.mkv', 'libx264'), ('.webm', 'libvpx')])
def test_the_video_is_copied_and_the_sound_is_exact(tmp_path, suffix, codec):
    source, out = write_video(tmp_path / f'in{suffix}', codec=codec), tmp_path / f'out{suffix}'
    sound = tone(50_237, RATE)
    sound[:10_000] = 0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        mux.write_video(source, sound, RATE, out)
    assert packets(out) == packets(source)
    read = media.read_audio(out, RATE, 0.0, None)
    assert len(read) == len(sound)
    lags = range(-200, 201)
    scores = [np.dot(read[9_000:30_000], sound[9_000 + lag:30_000 + lag]) for lag in lags]
    assert abs(lags[int(np.argmax(scores))]) <= 2  # encoder delay is cut: measured 0
    assert numbers(media.read_frames(out, [SMALL], 0.0, 1.0)[0]) == list(range(25))
    with av.open(str(out)) as container:
        assert container.streams.audio[0].layout.name == 'mono'
    assert not leftovers(tmp_path)


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_the_pictures_end_with_the_sound(tmp_path, suffix):
    source, out = write_video(tmp_path / f'in{suffix}'), tmp_path / f'out{suffix}'
    mux.write_video(source, tone(RATE // 2, RATE), RATE, out)
    kept = packets(out)
    assert kept == packets(source)[:len(kept)] and 13 <= len(kept) <= 16  # frames 0 to 12, and what these are decoded from
    frames, = media.read_frames(out, [SMALL], 0.0, 0.5)
    assert numbers(frames) == list(range(12))
    assert len(media.read_audio(out, RATE, 0.0, None)) == RATE // 2


def test_no_picture_before_the_end_is_lost_wherever_the_sound_ends(tmp_path):
    """Pictures are stored in another order than they are shown in: one that is shown later may come first."""
    source = write_video(tmp_path / 'in.mp4')
    for count in range(3, 25):
        mux.write_video(source, tone(count * RATE // 25, RATE), RATE, tmp_path / 'out.mp4')
        with av.open(str(tmp_path / 'out.mp4')) as container:
            times = [round(frame.time * 25) for frame in container.decode(video=0)]
        assert times[:count] == list(range(count)) and len(times) <= count + 3


@pytest.mark.parametrize('source_name,codec,out_name,found', [
    ('in.webm', 'libvpx', 'out.mp4', 'h264'),
    ('in.webm', 'libvpx', 'out.mov', 'h264'),
    ('in.mp4', 'libx264', 'out.webm', 'vp9'),
    ('in.avi', 'msmpeg4v2', 'out.mkv', 'h264'),
])
def test_what_a_container_cannot_hold_is_encoded_anew(tmp_path, source_name, codec, out_name, found):
    source = write_video(tmp_path / source_name, codec=codec, size=(66, 50), skip=(7, 8, 9))
    with pytest.warns(mux.MediaWarning, match=rf'{out_name}: \w+ cannot (hold \w+|take this) video: encoded anew'):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / out_name)
    with av.open(str(tmp_path / out_name)) as container:
        assert container.streams.video[0].codec_context.codec.canonical_name == found
    before, after = (media.read_frames(path, [SMALL], 0.0, 1.0)[0] for path in (source, tmp_path / out_name))
    assert numbers(after) == numbers(before)  # the gap is still there
    assert np.abs(after.astype(float) - before).mean() < 2
    assert len(media.read_audio(tmp_path / out_name, RATE, 0.0, None)) == RATE


def test_pictures_whose_times_step_back_are_encoded_all_the_same(tmp_path):
    source = write_video(tmp_path / 'in.avi', frames=50)  # H.264 in AVI: pictures have the times in which they are stored
    with av.open(str(source)) as container:
        stored = [frame.time for frame in container.decode(video=0)]
    assert stored != sorted(stored)
    with pytest.warns(mux.MediaWarning, match='webm cannot hold h264 video: encoded anew'):
        mux.write_video(source, tone(2 * RATE, RATE), RATE, tmp_path / 'out.webm')
    with av.open(str(tmp_path / 'out.webm')) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, sorted(stored)[:len(times)], atol=0.002)
    assert len(times) >= 48
    assert len(media.read_audio(tmp_path / 'out.webm', RATE, 0.0, None)) == 2 * RATE


@pytest.mark.parametrize('suffix', ['.mp4', '.mov', '.mkv'])
@pytest.mark.parametrize('between_keys', [250, 25])
def test_a_video_cut_behind_a_key_frame_is_shown_from_the_cut(tmp_path, suffix, between_keys):
    """A phone's trim keeps the pictures before the cut, which the others are made of, and hides them by an edit list."""
    source = tmp_path / 'cut.mp4'
    with av.open(str(source), 'w') as container:
        stream = container.add_stream('libx264', rate=25, width=64, height=48, pix_fmt='yuv420p',
                                      options={'g': str(between_keys), 'sc_threshold': '0', 'bf': '0'})
        pictures = [av.VideoFrame.from_ndarray(np.full((48, 64, 3), 20 + 2 * k, np.uint8), format='rgb24') for k in range(75)]
        for k, picture in enumerate(pictures):
            picture.pts = k
        for packet in [*itertools.chain.from_iterable(map(stream.encode, pictures)), *stream.encode(None)]:
            hidden = round(Fraction(3, 2) / packet.time_base)
            packet.pts, packet.dts = packet.pts - hidden, packet.dts - hidden
            container.mux(packet)
    with av.open(str(source)) as container:
        assert next(container.demux(video=0)).is_discard
    mux.write_video(source, np.zeros(24_000, np.float32), 16_000, tmp_path / f'out{suffix}')
    request = FrameRequest(5.0, 2, 2, 'squash')
    levels = [[frame.mean() for frame in media.read_frames(path, [request], 0.0, 1.2)[0]]
              for path in (source, tmp_path / f'out{suffix}')]
    assert len(levels[0]) == 6 and levels[0][0] > 90
    np.testing.assert_allclose(*levels, atol=3)
    assert abs(media.probe(tmp_path / f'out{suffix}').duration_s - 1.5) < 0.05


def test_a_repeated_time_is_encoded_once(tmp_path, monkeypatch):
    """As in MPEG program streams."""
    source, decode = write_video(tmp_path / 'in.webm', codec='libvpx'), media.decode
    monkeypatch.setattr(media, 'decode', lambda *arguments: (pair for pair in decode(*arguments) for _ in range(2)))
    with pytest.warns(mux.MediaWarning, match='encoded anew'):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / 'out.mp4')
    monkeypatch.undo()
    assert numbers(media.read_frames(tmp_path / 'out.mp4', [SMALL], 0.0, 1.0)[0]) == list(range(25))


def test_a_container_that_refuses_twice_is_said_in_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise mux._Refused('mp4 cannot take this video')
    monkeypatch.setattr(mux, '_interleave', refuse)
    source = write_video(tmp_path / 'in.mp4')
    with pytest.warns(mux.MediaWarning), pytest.raises(media.MediaError, match='out.mp4: cannot be written: mp4 cannot take'):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / 'out.mp4')
    assert [entry.name for entry in tmp_path.iterdir()] == ['in.mp4']


def test_rotation_stays(tmp_path):
    source = rotate(write_sound_and_video(tmp_path / 'a.mp4', corner=True))
    request = FrameRequest(25.0, 64, 48, 'squash')
    shown, = media.read_frames(source, [request], 0.0, 0.2)
    for name in ('copied.mp4', 'copied.mkv', 'encoded.webm'):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore' if 'encoded' in name else 'error')
            mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / name)
        again, = media.read_frames(tmp_path / name, [request], 0.0, 0.2)
        assert np.abs(again.astype(float) - shown).mean() < 3, name


def test_a_late_video_and_its_new_sound_start_together(tmp_path):
    source = write_video(tmp_path / 'late.ts', skip=(0, 1, 2))
    sound = np.where(np.arange(RATE) < RATE // 2, 0, tone(RATE, RATE))
    mux.write_video(source, sound, RATE, tmp_path / 'out.mp4')
    assert numbers(media.read_frames(tmp_path / 'out.mp4', [SMALL], 0.0, 0.8)[0])[:20] == list(range(3, 23))
    read = media.read_audio(tmp_path / 'out.mp4', RATE, 0.0, 1.0)
    assert np.abs(read[:RATE // 2 - 500]).max() < 0.05 and np.abs(read[RATE // 2:RATE // 2 + 500]).max() > 0.3


@pytest.mark.parametrize('suffix', ['.mp4', '.mov', '.mkv'])
def test_a_late_video_begins_at_zero_and_a_player_hears_the_sound_alone(tmp_path, suffix):
    source, out = write_video(tmp_path / 'late.ts', frames=50, skip=range(25)), tmp_path / f'out{suffix}'
    with av.open(str(source)) as container:
        assert container.streams.video[0].start_time * container.streams.video[0].time_base >= 1
    mux.write_video(source, tone(16_000, 16_000), 16_000, out)
    with av.open(str(out)) as container:
        starts = [(stream.start_time or 0) * stream.time_base for stream in container.streams]
        stream = container.streams.audio[0]
        ends = [(frame.pts + frame.duration) * frame.time_base for frame in container.decode(stream)]
        heard_s = ends[-1] - starts[1]
    assert max(starts) < 0.02 and abs(heard_s - 1) <= (0 if suffix != '.mkv' else 0.01)  # Matroska counts milliseconds


@pytest.mark.parametrize('suffix', ['.mp4', '.mov', '.mkv', '.webm'])
def test_a_codec_that_can_only_be_read_here_is_copied(tmp_path, suffix, monkeypatch):
    """As AV1, whose decoder has a name that no encoder has."""
    source, out = write_video(tmp_path / 'in.mkv', codec='libsvtav1'), tmp_path / f'out{suffix}'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore' if suffix == '.mov' else 'error')  # FFmpeg puts no AV1 into .mov
        mux.write_video(source, tone(RATE, RATE), RATE, out)
    if suffix != '.mov':
        assert packets(out) == packets(source)
    assert numbers(media.read_frames(out, [SMALL], 0.0, 1.0)[0]) == list(range(25))


@pytest.mark.parametrize('suffix', ['.mp4', '.mkv'])
def test_the_original_sound(tmp_path, suffix):
    source = write_sound_and_video(tmp_path / 'in.mp4', hz=1_000.0)  # 0.5 on the left, half as loud on the right
    new = 0.25 * tone(16_000, 16_000)  # 440 Hz at 0.125
    mux.write_video(source, new, 16_000, tmp_path / f'replace{suffix}')
    mux.write_video(source, new, 16_000, tmp_path / f'mix{suffix}', 'mix', original_db=-6.0)
    mux.write_video(source, new, 16_000, tmp_path / f'keep{suffix}', 'keep')
    with av.open(str(tmp_path / f'replace{suffix}')) as container:
        assert len(container.streams.audio) == 1
    mixture, rate, _ = media.read_track(tmp_path / f'mix{suffix}', 0.0, None, stereo=True)
    assert mixture.shape == (2, rate) and rate == (44_100 if suffix == '.mp4' else 48_000)
    levels = [[level(channel[4_000:40_000], hz, rate) for channel in mixture] for hz in (440.0, 1_000.0)]
    np.testing.assert_allclose(levels, [[0.125, 0.125], [0.25, 0.125]], rtol=0.05)
    with av.open(str(tmp_path / f'keep{suffix}')) as container:
        assert [stream.layout.name for stream in container.streams.audio] == ['mono', 'stereo']
    assert packets(tmp_path / f'keep{suffix}', 'audio', 1) == packets(source, 'audio')
    assert packets(tmp_path / f'keep{suffix}') == packets(source)
    with pytest.warns(mux.MediaWarning, match='webm cannot hold'):
        mux.write_video(source, new, 16_000, tmp_path / 'keep.webm', 'keep')
    with av.open(str(tmp_path / 'keep.webm')) as container:
        assert [stream.layout.name for stream in container.streams.audio] == ['mono', 'stereo']
    silent = write_video(tmp_path / 'silent.mp4')
    with pytest.warns(mux.MediaWarning, match='silent.mp4: has no sound of its own'):
        mux.write_video(silent, new, 16_000, tmp_path / 'alone.mp4', 'mix')


def test_a_mixture_does_not_clip():
    waveform, rate = mux.mixed((tone(16_000, 16_000), 16_000), (tone(8_000, 16_000), 16_000), 12.0)
    assert rate == 16_000 and waveform.shape == (16_000,)
    assert np.abs(waveform).max() == 1.0
    np.testing.assert_allclose(level(waveform[8_000:], 440.0, 16_000) / level(waveform[:8_000], 440.0, 16_000),
                               1 / (1 + 10**0.6), rtol=1e-3)


def test_frames_in_memory(tmp_path):
    pixels = np.broadcast_to(8 * np.arange(25, dtype=np.uint8)[:, None, None, None], (25, 49, 65, 3))
    mux.write_video(Frames(pixels, 25.0), tone(RATE, RATE), RATE, tmp_path / 'a.mp4')
    assert numbers(media.read_frames(tmp_path / 'a.mp4', [SMALL], 0.0, 1.0)[0]) == list(range(25))
    assert media.probe(tmp_path / 'a.mp4').duration_s == 1.0
    with pytest.warns(mux.MediaWarning, match='b.mp4: frames in memory have no sound of their own'):
        mux.write_video(Frames(pixels, 25.0), tone(RATE, RATE), RATE, tmp_path / 'b.mp4', 'mix')


def test_mistakes(tmp_path):
    source = write_video(tmp_path / 'a.mp4')
    with pytest.raises(media.MediaError, match='video is written as .mp4, .m4v, .mov, .mkv, .webm, not .avi'):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / 'b.avi')
    with pytest.raises(ValueError, match="original is 'both'; it must be one of replace, mix, keep"):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / 'b.mp4', 'both')
    with pytest.raises(media.MediaError, match='b.mp4: cannot be written: the waveform is not finite'):
        mux.write_video(source, np.full(RATE, np.nan), RATE, tmp_path / 'b.mp4')
    with pytest.raises(media.MediaError, match='nothing.mp4: no such file'):
        mux.write_video(tmp_path / 'nothing.mp4', tone(RATE, RATE), RATE, tmp_path / 'b.mp4')
    with pytest.raises(media.MediaError, match='no/b.mp4: '):
        mux.write_video(source, tone(RATE, RATE), RATE, tmp_path / 'no' / 'b.mp4')
    assert [entry.name for entry in tmp_path.iterdir()] == ['a.mp4']


@pytest.mark.parametrize('name', ['out.mp4', 'out.mkv', 'out.webm', 'out.wav', 'out.flac'])
def test_a_full_disk_leaves_nothing_behind(tmp_path, name):
    source, sound = write_video(tmp_path / 'in.mp4'), 0.5 * np.random.default_rng(0).normal(size=10 * RATE)
    with full_disk.after(4096), pytest.raises(media.MediaError, match=f'{name}: File too large'):
        if name.endswith(('wav', 'flac')):
            media.write_audio(tmp_path / name, sound, RATE)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')
                mux.write_video(source, sound, RATE, tmp_path / name)
    assert [entry.name for entry in tmp_path.iterdir()] == ['in.mp4']
