"""Generation through the public door: lengths, batches, seeds, files and what is refused."""
import av
import numpy as np
import pytest

import mmaudio_jax
from mmaudio_jax import media
from mmaudio_jax import pipeline
from tests import trained_run

RATE = 16_000


@pytest.fixture(name='small_network', scope='module', autouse=True)
def fixture_small_network():
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        yield


@pytest.fixture(name='workdir', scope='module')
def fixture_workdir(tmp_path_factory, small_network):
    workdir = tmp_path_factory.mktemp('run')
    trained_run.make(workdir)
    trained_run.write_video(workdir / 'a.mp4', 1)
    trained_run.write_video(workdir / 'long.mp4', 2, 1.4)
    return workdir


@pytest.fixture(name='pipe', scope='module')
def fixture_pipe(workdir):
    return mmaudio_jax.Pipeline.from_pretrained(workdir, compilation_cache=False)


def test_loads_the_last_step(pipe):
    assert pipe.step == trained_run.STEP and pipe.config['model']['hidden_size'] == 64


def test_a_sound_is_as_long_as_its_video_or_as_asked(pipe, workdir):
    assert len(pipe(video=workdir / 'a.mp4').audio) == RATE
    assert len(pipe(video=workdir / 'long.mp4').audio) == round(1.4 * RATE)
    assert len(pipe(video=workdir / 'long.mp4', duration_s=0.8).audio) == round(0.8 * RATE)
    clip = pipe(prompt='a glass strikes')
    assert clip.audio.dtype == np.float32 and clip.sample_rate_hz == RATE and clip.duration_s == 1.0
    assert np.isfinite(clip.audio).all() and np.abs(clip.audio).max() > 0


def test_a_batch_is_its_clips_one_by_one(pipe, workdir):
    videos = [workdir / 'a.mp4', None, workdir / 'long.mp4', workdir / 'a.mp4']
    clips = pipe(video=videos, prompt=['one', 'two', 'three', 'one'])
    assert [len(clip.audio) for clip in clips] == [RATE, RATE, round(1.4 * RATE), RATE]
    assert [clip.prompt for clip in clips] == ['one', 'two', 'three', 'one'] and clips[1].video is None
    alone = pipe(video=videos[:1], prompt='one')[0]
    difference = np.std(clips[0].audio - alone.audio) / np.std(alone.audio)
    assert difference < 0.02  # measured 4e-4: Griffin-Lim enlarges rounding
    assert np.std(clips[0].audio - clips[3].audio) / np.std(alone.audio) > 0.5  # each has noise of its own
    assert pipe(video=[]) == []


def test_everything_that_is_asked_for_changes_the_sound(pipe, workdir):
    plain = pipe(video=workdir / 'a.mp4').audio
    np.testing.assert_array_equal(plain, pipe(video=workdir / 'a.mp4', seed=42).audio)
    for change in ({'prompt': 'a glass'}, {'negative_prompt': 'a glass'}, {'seed': 1}, {'num_steps': 3}, {'guidance': 1.0},
                   {'solver': 'midpoint'}, {'video': None}):
        other = pipe(**{'video': workdir / 'a.mp4', **change}).audio
        assert np.abs(plain - other).max() > 1e-3, change


def test_files(pipe, workdir, tmp_path):
    clip = pipe(video=workdir / 'a.mp4')
    for name in ('new.flac', 'new.wav', 'new.mp4'):
        clip.save(tmp_path / name)
        assert media.read_audio(tmp_path / name, RATE, 0.0, 1.0).std() > 0
    packets = []
    for path in (workdir / 'a.mp4', tmp_path / 'new.mp4'):
        with av.open(str(path)) as container:
            packets.append([bytes(packet) for packet in container.demux(container.streams.video[0]) if packet.size])
    assert packets[0] == packets[1]  # copied, not encoded again
    with pytest.raises(ValueError, match='without a video'):
        pipe(prompt='rain').save(tmp_path / 'rain.mp4')


def test_mistakes(pipe, workdir, tmp_path):
    with pytest.raises(ValueError, match='different lengths'):
        pipe(video=[None, None], prompt=['a'])
    with pytest.raises(ValueError, match='too short'):
        pipe(prompt='a', duration_s=0.1)
    with pytest.raises(ValueError, match='nothing.mp4'):
        pipe(video=tmp_path / 'nothing.mp4')
    with pytest.raises(ValueError, match='train first'):
        pipeline.Pipeline.from_pretrained(tmp_path, compilation_cache=False)
    with pytest.raises(FileNotFoundError, match='codec'):
        pipeline.Pipeline.from_pretrained(workdir, data_dir=tmp_path, compilation_cache=False)


def test_missing_modalities_get_the_learned_features(pipe):
    generator = np.random.default_rng(0)
    shapes = {'clip_features': (2, 8, 1024), 'sync_features': (2, 16, 768), 'text_features': (2, 77, 1024)}
    batch = {name: generator.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    batch |= {'video_exists': np.array([True, False]), 'text_exists': np.array([False, True])}
    params = pipe._params
    clip, sync, text = pipeline.with_empty_features(pipe._model, params, batch)
    np.testing.assert_array_equal(clip[0], batch['clip_features'][0])
    np.testing.assert_array_equal(text[1], batch['text_features'][1])
    np.testing.assert_array_equal(clip[1], np.broadcast_to(params['empty_clip_feat'], (8, 1024)))
    np.testing.assert_array_equal(sync[1], np.broadcast_to(params['empty_sync_feat'], (16, 768)))
    np.testing.assert_array_equal(text[0], params['empty_string_feat'])
