"""How a clip is read: levels, lengths, rejections, several windows and rates in one pass."""
import dataclasses
import tracemalloc

import numpy as np
import pytest
import soundfile

from data_pipelines import clips
from data_pipelines import impacts
from data_pipelines import reading
from mmaudio_jax import media
from mmaudio_jax.resampling import resample

REQUEST = reading.Request((), 1.0, ((16_000, 16_384),))
TONE = 0.2 * np.sin(np.arange(32_768) / 20).astype(np.float32)


@pytest.fixture(autouse=True)
def fixture_forget_files():
    reading._PEAKS.clear()  # pylint: disable=protected-access


def make(path, split='train', start_s=0.0, **fields):
    return clips.Clip('a', None, path, '', split, start_s, **fields)


def load(tmp_path, waveform, split='train', start_s=0.0, **fields):
    media.write_audio(tmp_path / 'sound.wav', waveform, 16_000)
    result, = reading.load([make(tmp_path / 'sound.wav', split, start_s, **fields)], REQUEST)
    return result


def test_training_sound_is_scaled_to_its_peak(tmp_path):
    assert np.abs(load(tmp_path, TONE).waveforms[0]).max() == pytest.approx(0.95, abs=1e-6)
    kept = load(tmp_path, TONE, 'test').waveforms[0]
    np.testing.assert_allclose(kept, TONE[:16_384], atol=1e-4)  # measured: 3e-5, the file has 16 bits
    np.testing.assert_allclose(load(tmp_path, TONE, 'test', 0.5).waveforms[0], TONE[8_000:24_384], atol=1e-4)


def test_channels_are_averaged(tmp_path):
    """In training, where the whole file is read, as elsewhere."""
    left, right = 0.5 * TONE[:20_000], np.random.default_rng(0).uniform(-0.1, 0.1, 20_000).astype(np.float32)
    soundfile.write(tmp_path / 'a.wav', np.stack([left, right], axis=1), 16_000, 'FLOAT')
    mean = (left + right) / 2
    for split, scale in (('test', 1.0), ('train', 0.95 / np.abs(mean).max())):
        (result,) = reading.load([make(tmp_path / 'a.wav', split)], REQUEST)
        np.testing.assert_allclose(result.waveforms[0], scale * mean[:16_384], atol=1e-6)


def test_the_peak_is_that_of_the_whole_file(tmp_path):
    louder = TONE.copy()
    louder[30_000] = 0.8  # behind the clip
    assert np.abs(load(tmp_path, louder).waveforms[0]).max() == pytest.approx(0.95 * 0.2 / 0.8, abs=1e-4)


@pytest.mark.parametrize('waveform, message', [(np.zeros(32_768), 'silent (peak 0.0e+00)'),
                                               (np.ones(8_000) / 2, 'the sound ends at 0.500 s, 1.024 s are needed')])
def test_unusable_sound_is_rejected_with_the_reason(tmp_path, waveform, message):
    result = load(tmp_path, waveform)
    assert result.rejected == message and not result.waveforms


def test_a_silent_piece_of_a_sound_is_rejected_in_training_alone(tmp_path):
    silent_end = np.concatenate([TONE[:16_000], np.zeros(17_000, np.float32)])
    assert load(tmp_path, silent_end, start_s=1.0).rejected == 'silent (peak 0.0e+00)'
    kept = load(tmp_path, silent_end, 'test', start_s=1.0)
    assert kept.rejected is None and not kept.waveforms[0].any() and kept.measures['loudness_db'] == -120


@pytest.mark.parametrize('name, reason', [('no.mp4', 'no such file'), ('n' * 300 + '.wav', 'File name too long'),
                                          ('\ud800.wav', 'the file name is no text in any encoding')])
def test_a_file_that_cannot_be_opened_is_rejected(tmp_path, name, reason):
    (result,) = reading.load([make(tmp_path / name)], REQUEST)
    assert result.rejected == reason


def test_a_short_sound_is_filled(tmp_path):
    piece = TONE[:6_000]
    silent = load(tmp_path, piece, 'test', fill='silence').waveforms[0]
    np.testing.assert_allclose(silent, np.pad(piece, (0, 10_384)), atol=1e-4)
    repeated = load(tmp_path, piece, 'test', fill='repeat').waveforms[0]
    np.testing.assert_allclose(repeated, np.resize(piece, 16_384), atol=1e-4)
    assert load(tmp_path, np.zeros(6_000), fill='repeat').rejected == 'silent (peak 0.0e+00)'


def test_windows_of_one_file_are_read_in_one_pass_like_each_alone(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    media.write_audio(tmp_path / 'long.flac', np.clip(0.1 * rng.standard_normal(5 * 22_050), -0.5, 0.5), 22_050)
    group = [dataclasses.replace(make(tmp_path / 'long.flac', start_s=start_s), id=str(start_s)) for start_s in (0.0, 1.3, 3.5)]
    together = reading.load(group, REQUEST)
    opened, read = [], media.read_track
    monkeypatch.setattr(media, 'read_track', lambda *args, **kwargs: opened.append(args) or read(*args, **kwargs))
    for clip, result in zip(group, together):
        alone, = reading.load([clip], REQUEST)  # the peak is known by now: these seek
        np.testing.assert_array_equal(alone.waveforms[0], result.waveforms[0])
        assert alone.measures == result.measures
    assert [start_s for _, start_s, _ in opened] == [0.0, 1.3, 3.5]


def test_a_test_clip_is_the_same_whatever_was_read_before(tmp_path):
    path = tmp_path / 'long.flac'
    media.write_audio(path, np.tile(TONE, 10), 16_000)
    first, = reading.load([make(path, 'test')], REQUEST)
    trained, = reading.load([make(path)], REQUEST)
    again, = reading.load([make(path, 'test')], REQUEST)
    assert again.measures == first.measures and trained.measures['file_s'] == 20.48 > first.measures['file_s']
    np.testing.assert_array_equal(again.waveforms[0], first.waveforms[0])


def test_two_rates_are_those_of_each_alone(tmp_path):
    both = dataclasses.replace(REQUEST, sounds=((16_000, 16_384), (44_100, 45_056)))
    media.write_audio(tmp_path / 'a.wav', TONE, 16_000)
    result, = reading.load([make(tmp_path / 'a.wav')], both)
    alone, = reading.load([make(tmp_path / 'a.wav')], REQUEST)
    np.testing.assert_array_equal(result.waveforms[0], alone.waveforms[0])
    assert [len(waveform) for waveform in result.waveforms] == [16_384, 45_056]
    read = media.read_track(tmp_path / 'a.wav', 0.0, None)[0]
    expected = resample(read * np.float32(0.95 / np.abs(read).max()), 16_000, 44_100)[:45_000]
    np.testing.assert_allclose(result.waveforms[1][:45_000], expected, atol=1e-6)  # measured: 0: the margin hides the edge


def test_loudness_and_silence_are_measured(tmp_path):
    half = np.concatenate([0.5 * np.ones(8_192, np.float32), np.zeros(9_000, np.float32)])
    measures = load(tmp_path, half).measures
    assert measures['loudness_db'] == pytest.approx(20 * np.log10(0.5) + 10 * np.log10(8_192 / 16_000), abs=0.02)
    assert measures['silent_share'] == pytest.approx(0.5, abs=0.06) and measures['file_s'] == pytest.approx(1.07, abs=0.01)


def test_memory_does_not_grow_with_the_length_of_a_file(tmp_path):
    """A training file is read whole, for its peak; ten minutes as float32 would be 38 MB."""
    path = tmp_path / 'long.wav'
    with soundfile.SoundFile(path, 'w', 16_000, 1) as file:
        for _ in range(60):
            file.write(np.tile(TONE[:16_000], 10))
    windows = [make(path, start_s=start_s) for start_s in (0.0, 300.0, 598.0)]
    tracemalloc.start()
    try:
        loaded = reading.load(windows, REQUEST)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert all(result.rejected is None for result in loaded) and loaded[2].measures['file_s'] == 600.0
    assert peak < 2e6  # measured 0.6e6


def test_a_clip_of_a_video_starts_where_it_says(tmp_path):
    """Pictures and sound from start_s on, together."""
    impacts.write_clip(impacts.Job(str(tmp_path / 'a.mp4'), 5, 2.5, 64, 25))
    request = dataclasses.replace(REQUEST, frames=(media.FrameRequest(25.0, 16, 16, 'squash'),))
    whole = dataclasses.replace(request, duration_s=2.0, sounds=((16_000, 32_768),))
    clip = clips.Clip('a', tmp_path / 'a.mp4', None, '', 'test', 1.0)
    (part,), (all_of_it,) = reading.load([clip], request), reading.load([dataclasses.replace(clip, start_s=0.0)], whole)
    assert part.rejected is None and len(part.frames[0]) == 25
    np.testing.assert_array_equal(part.frames[0], all_of_it.frames[0][25:])
    np.testing.assert_allclose(part.waveforms[0], all_of_it.waveforms[0][16_000:16_000 + 16_384], atol=2e-3)


def test_groups_are_neighbours_of_one_sound_file(tmp_path):
    a, b = make(tmp_path / 'a.wav'), make(tmp_path / 'b.wav')
    video = clips.Clip('v', tmp_path / 'a.mp4', None, '', 'train', 0.0)
    assert [len(group) for group in reading.groups([a, a, b, a, video, video] + [b] * 9)] == [2, 1, 1, 1, 1, 8, 1]


def test_coarse_frames_are_nearly_those_that_are_fitted_at_full_size(tmp_path):
    """Frames of 448 pixels are divided by 4 first for a request of 32; small ones are left as they are."""
    for size in (448, 64):
        impacts.write_clip(impacts.Job(str(tmp_path / f'{size}.mp4'), 3, 1.1, size, 25))
    exact = [media.FrameRequest(25.0, 32, 32, 'crop'), media.FrameRequest(8.0, 32, 32, 'squash')]
    coarse = [dataclasses.replace(request, coarse=True) for request in exact]
    for size, bound in ((448, 1.0), (64, 0.0)):
        path = tmp_path / f'{size}.mp4'
        pairs = zip(media.read_frames(path, coarse, 0.0, 1.0), media.read_frames(path, exact, 0.0, 1.0))
        errors = [np.abs(quick.astype(float) - slow) for quick, slow in pairs]
        assert max(error.mean() for error in errors) <= bound  # grey levels; measured 0.67 (at most 4 anywhere) and 0
