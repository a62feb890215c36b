"""How the evaluation networks' inputs are cut, filled and sampled, against the protocol's own words."""
from fractions import Fraction

import av
import numpy as np
import pytest
import soundfile

from mmaudio_jax import evaluation_media
from mmaudio_jax.media import MediaError
from tests import broken_media
from tests.golden import evaluation_goldens as goldens

RATE = 16_000


def _write(path, samples, rate=RATE):
    soundfile.write(path, samples, rate, subtype='FLOAT' if path.suffix == '.wav' else 'PCM_16')
    return path


def test_mono_is_the_mean_without_the_mean_of_the_whole_file(tmp_path):
    random = np.random.default_rng(0)
    stereo = random.uniform(-0.4, 0.5, (RATE * 3, 2)).astype(np.float32)
    path = _write(tmp_path / 'clip.wav', stereo)
    waveform = evaluation_media.mono(path, RATE, 2.0)
    expected = stereo.mean(axis=1, dtype=np.float64)
    np.testing.assert_allclose(waveform, (expected - expected.mean())[:2 * RATE], atol=1e-6)
    assert len(evaluation_media.mono(path, RATE, 8.0)) == 3 * RATE  # its own length, and no silence after it


def test_passt_is_filled_with_zeros_and_clap_repeats_what_fits(tmp_path):
    short, long = _write(tmp_path / 'a.wav', goldens.signal(48_000, 3.0), 48_000), tmp_path / 'b.wav'
    _write(long, goldens.signal(48_000, 12.0), 48_000)
    clap = evaluation_media.clap(short, 8.0)
    assert clap.shape == (480_000,) and not clap[432_000:].any()
    np.testing.assert_array_equal(clap[:144_000], clap[288_000:432_000])
    passt = evaluation_media.passt(short, 8.0)
    assert passt.shape == (320_000,) and passt[95_000:96_000].any() and not passt[96_000:].any()
    assert evaluation_media.clap(long, 12.0).shape == (480_000,) and evaluation_media.passt(long, 12.0).shape == (320_000,)


def test_synchformer_keeps_the_mean_and_refuses_short_clips(tmp_path):
    waveform = 0.1 + 0.1 * goldens.signal(RATE)
    path = _write(tmp_path / 'a.wav', waveform)
    segments = evaluation_media.synchformer_sound(path, 8.0)
    assert segments.shape == (24, 10_240)
    np.testing.assert_allclose(segments[3], waveform[15_360:25_600], atol=1e-6)
    with pytest.raises(MediaError, match=r'a.wav: lasts 8.000 s; DeSync needs 10 s'):
        evaluation_media.synchformer_sound(path, 10.0)


def test_imagebind_hears_three_clips_of_the_first_channel(tmp_path):
    random = np.random.default_rng(1)
    stereo = random.uniform(-0.4, 0.6, (8 * RATE, 2)).astype(np.float32)
    clips = evaluation_media.imagebind_sound(_write(tmp_path / 'a.wav', stereo), 8.0)
    for clip, start in zip(clips, (0, 48_000, 96_000)):
        part = stereo[start:start + 32_000]
        np.testing.assert_allclose(clip, part[:, 0] - part.mean(), atol=1e-6)
    # Three seconds: the clips overlap, and the second one sees what was subtracted from the first.
    short = evaluation_media.imagebind_sound(_write(tmp_path / 'b.wav', stereo[:3 * RATE]), 8.0)
    seen = stereo[:3 * RATE].copy()
    for clip, start in zip(short, (0, 8_000, 16_000)):
        seen[start:start + 32_000] -= seen[start:start + 32_000].mean()
        np.testing.assert_allclose(clip, seen[start:start + 32_000, 0], atol=1e-6)
    with pytest.raises(MediaError, match='ImageBind needs 2 s'):
        evaluation_media.imagebind_sound(_write(tmp_path / 'c.wav', stereo[:RATE]), 8.0)


def _write_video(path, fps, count, size):
    """Frame i is grey of level 2 · (i mod 100) but for a bright left quarter."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('ffv1', rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, 'bgr0'
        for i in range(count):
            picture = np.full((size[1], size[0], 3), 2 * (i % 100), np.uint8)
            picture[:, :size[0] // 4] = 255
            frame = av.VideoFrame.from_ndarray(picture, format='rgb24')
            frame.pts, frame.time_base = i, Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(name='video', scope='module')
def fixture_video(tmp_path_factory):
    return _write_video(tmp_path_factory.mktemp('video') / 'v.mkv', 25, 101, (320, 240))  # a little over 4 s


def test_pictures_for_synchformer(video):
    frames = evaluation_media.synchformer_picture(video, 4.0)
    assert frames.shape == (100, 224, 224, 3) and frames.dtype == np.uint8
    assert [int(frame[100, 200, 0]) for frame in frames[:60]] == [2 * i for i in range(60)]  # every frame, in order
    with pytest.raises(MediaError, match='has frames for 101 of 125 samples at 25 a second'):
        evaluation_media.synchformer_picture(video, 5.0)


def test_a_part_stands_for_a_file(tmp_path, video):
    frames = evaluation_media.synchformer_picture(evaluation_media.Part(video, 1.0, 2.0), 2.0)
    assert [int(frame[100, 200, 0]) for frame in frames] == [2 * i for i in range(25, 75)]
    samples = np.random.default_rng(2).uniform(-0.4, 0.5, 5 * RATE).astype(np.float32)
    path, alone = _write(tmp_path / 'a.wav', samples), _write(tmp_path / 'b.wav', samples[RATE:4 * RATE])
    part = evaluation_media.Part(path, 1.0, 3.0)
    np.testing.assert_array_equal(evaluation_media.mono(part, RATE, 3.0), evaluation_media.mono(alone, RATE, 3.0))
    np.testing.assert_array_equal(evaluation_media.imagebind_sound(part, 3.0), evaluation_media.imagebind_sound(alone, 3.0))
    with pytest.raises(MediaError, match=r'a.wav: holds no sound from 5 s on'):
        evaluation_media.mono(evaluation_media.Part(path, 5.0, 3.0), RATE, 3.0)


def test_pictures_for_imagebind(video):
    views = evaluation_media.imagebind_picture(video, 4.0)
    assert views.shape == (3, 2, 224, 224, 3)
    # The last frames before 1 s and 3 s: 24 and 74.
    assert views[2, :, 100, 200, 0].tolist() == [48, 148]
    # Left, middle and right squares: the bright quarter is in the first, and a little of it in the second.
    bright = [int((view[0, 100, :, 0] == 255).sum()) for view in views]
    assert bright[0] > bright[1] > bright[2] == 0


@pytest.mark.parametrize('fps, expected', [(15, (14, 44)), (24, (23, 71)), (30, (29, 89))])
def test_frames_before_the_odd_seconds_at_any_rate(tmp_path, fps, expected):
    path = _write_video(tmp_path / 'v.mkv', fps, 4 * fps, (64, 48))
    views = evaluation_media.imagebind_picture(path, 4.0)
    assert views[2, :, 100, 200, 0].tolist() == [2 * (i % 100) for i in expected]


def test_a_track_that_changes_its_channels_is_named(tmp_path):
    for layout in ('stereo', 'mono'):
        broken_media.write_av(tmp_path / f'{layout}.aac', 0, video='', container='adts', layout=layout)
    (tmp_path / 'both.aac').write_bytes(b''.join((tmp_path / f'{layout}.aac').read_bytes() for layout in ('stereo', 'mono')))
    with pytest.raises(MediaError, match='both.aac: changes from 2 to 1 channels; write it anew with as many throughout'):
        evaluation_media.mono(tmp_path / 'both.aac', RATE, 8.0)


@pytest.mark.parametrize('fields', [{'suffix': '.mkv', 'container': 'matroska'}, {'suffix': '.mp4'}])
def test_what_was_cut_off_is_no_clip(tmp_path, fields):
    path = tmp_path / f'clip{fields.pop("suffix")}'
    broken_media.write_av(path, 0, seconds=3.0, **fields)
    assert len(evaluation_media.mono(path, RATE, 8.0)) >= 3 * RATE
    path.write_bytes(path.read_bytes()[:path.stat().st_size * 6 // 10])
    with pytest.raises(MediaError, match='cut off'):
        evaluation_media.mono(path, RATE, 8.0)


def test_cover_pictures_are_no_video(tmp_path):
    with av.open(str(tmp_path / 'song.mp4'), 'w') as container:
        stream = container.add_stream('mjpeg', rate=25, width=64, height=48, pix_fmt='yuvj420p')
        stream.disposition = av.stream.Disposition.attached_pic
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format='rgb24')))
    with pytest.raises(MediaError, match='song.mp4: has no video stream'):
        evaluation_media.imagebind_picture(tmp_path / 'song.mp4', 8.0)


def test_what_cannot_be_read_names_the_file(tmp_path, video):
    (tmp_path / 'broken.flac').write_bytes(b'nothing')
    (tmp_path / 'broken.mp3').write_bytes(b'nothing')
    _write(tmp_path / 'nan.wav', np.full(RATE, np.nan, np.float32))
    _write(tmp_path / 'empty.wav', np.zeros(0, np.float32))
    for name, words in (('broken.flac', 'Format not recognised'), ('nan.wav', 'not finite'), ('empty.wav', 'holds no sound'),
                        ('absent.wav', 'no such file'), ('broken.mp3', 'not a media file')):
        with pytest.raises(MediaError, match=f'{name}: .*{words}'):
            evaluation_media.mono(tmp_path / name, RATE, 8.0)
    with pytest.raises(MediaError, match='v.mkv: has no sound track'):
        evaluation_media.mono(video, RATE, 8.0)
    blip = _write(tmp_path / 'blip.wav', np.ones(2000, np.float32))
    for prepare in (evaluation_media.vggish, evaluation_media.panns):
        with pytest.raises(MediaError, match='blip.wav: is shorter than'):
            prepare(blip, 8.0)
