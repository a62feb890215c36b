"""Generation through the public door: lengths, batches, seeds, files and what is refused."""
import dataclasses

import av
import jax
import numpy as np
from PIL import Image
import pytest
import soundfile

import mmaudio_jax
from mmaudio_jax import media
from mmaudio_jax import pipeline
from mmaudio_jax import record_sampler
from mmaudio_jax import sampler
from mmaudio_jax.frames import FrameRequest
from mmaudio_jax.frames import Frames
from mmaudio_jax.sequence import Sequence
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
    assert clip.latents.shape == (32, 20)
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


def test_sounds_at_once_are_those_of_the_run_unless_others_are_asked_for(pipe, workdir, monkeypatch):
    pairs = mmaudio_jax.Pipeline.from_pretrained(workdir, batch_size=2, compilation_cache=False)
    sizes = []
    for one in (pipe, pairs):
        made = lambda settings, sequence, noise, *_: sizes.append(len(noise)) or (noise, noise[..., 0])
        monkeypatch.setattr(one, '_sample', made)
        one(prompt=['a', 'b', 'c'])
    assert sizes == [3, 2, 1]
    with pytest.raises(ValueError, match='batch_size is 0; it must be at least 1'):
        mmaudio_jax.Pipeline.from_pretrained(workdir, batch_size=0, compilation_cache=False)


def test_frames_in_memory_are_a_video(pipe, workdir, tmp_path):
    with av.open(str(workdir / 'a.mp4')) as container:
        pixels = np.stack([frame.to_ndarray(format='rgb24') for frame in container.decode(video=0)])
    from_file = pipe(video=workdir / 'a.mp4', prompt='a glass')
    for video, fps in ((pixels, 25), (Frames(pixels, 25.0), None)):
        clip = pipe(video=video, fps=fps, prompt='a glass')
        np.testing.assert_array_equal(clip.audio, from_file.audio)
    clip.save(tmp_path / 'a.mp4')
    read, = media.read_frames(tmp_path / 'a.mp4', [FrameRequest(25.0, 64, 64, 'squash')], 0.0, 1.0)
    assert np.abs(read.astype(float) - pixels).mean() < 3
    first, second = pipe(video=[pixels, pixels[:20]], fps=25, prompt='a glass')
    assert len(first.audio) == RATE and len(second.audio) == round(0.8 * RATE)


def test_a_still_image(pipe, tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    encoder = pipe.encoder_and_codec(Sequence('16k', 1.0))[0]
    clip = pipe(image=image, prompt='a glass')
    assert len(clip.audio) == RATE and np.abs(clip.audio - pipe(prompt='a glass').audio).max() > 1e-3
    made = pipe.request(image=image)
    features = pipe.video_features(made.sequence, [pipe.read(made)], [image], encoder)
    np.testing.assert_array_equal(features[0][0], np.broadcast_to(encoder.encode_image(image), (8, 1024)))
    np.testing.assert_array_equal(features[1][0], np.broadcast_to(pipe._params['empty_sync_feat'], (16, 768)))
    clip.save(tmp_path / 'still.mp4')
    assert media.probe(tmp_path / 'still.mp4').duration_s == 1.0
    dataclasses.replace(clip, image=np.zeros((40, 17_000, 3), np.uint8)).save(tmp_path / 'wide.mp4')  # h264 has 16 384 at most
    with av.open(str(tmp_path / 'wide.mp4')) as container:
        assert container.streams.video[0].width == 4096


def test_the_programs_used_last_are_kept(pipe, monkeypatch):
    made = []

    def make(model, settings, mesh, decode):
        del model, mesh, decode
        made.append(settings.guidance)
        return lambda params, noise, *_: (noise,)

    monkeypatch.setattr(pipeline, 'PROGRAMS', 2)
    monkeypatch.setattr(pipeline.sampler, 'make_sampler', make)
    monkeypatch.setattr(pipe, '_programs', {})
    for guidance in (1.0, 2.0, 1.0, 3.0, 1.0, 2.0):
        pipe._sample(sampler.SamplerSettings('euler', 2, guidance), Sequence('16k', 1.0), np.zeros((1, 32, 20)))
    assert made == [1.0, 2.0, 3.0, 2.0] and len(pipe._programs) == 2


def test_masked_clip_leaves_the_timing(pipe, workdir):
    made = pipe.request(video=workdir / 'a.mp4', mask_clip=True)
    frames = pipe.read(made)
    assert len(frames) == 1
    encoder = pipe.encoder_and_codec(made.sequence)[0]
    clip, sync = pipe.video_features(made.sequence, [frames], [None], encoder)
    np.testing.assert_array_equal(clip[0], np.broadcast_to(pipe._params['empty_clip_feat'], (8, 1024)))
    np.testing.assert_array_equal(sync, encoder.encode_sync(frames[0][None]))
    plain, masked = (pipe(video=workdir / 'a.mp4', mask_clip=mask) for mask in (False, True))
    assert np.abs(plain.audio - masked.audio).max() > 1e-3


def test_takes_seeds_and_noise(pipe, workdir):
    takes = pipe(prompt='a glass', takes=3, seed=5)
    assert len(takes) == 3
    for take, clip in enumerate(takes):
        alone = pipe(prompt='a glass', seed=5 + take)
        assert np.std(clip.latents - alone.latents) / np.std(alone.latents) < 1e-5
    batch = pipe(video=[workdir / 'a.mp4', None], prompt='a glass', takes=2, seed=5)
    assert [len(clips) for clips in batch] == [2, 2]
    for take in range(2):
        alone = pipe(video=workdir / 'a.mp4', prompt='a glass', seed=5 + take)
        others = [np.std(clips[take].latents - alone.latents) / np.std(alone.latents) for clips in batch]
        assert others[0] < 0.02 < others[1]
    np.testing.assert_allclose(pipe(prompt=['a', 'a glass'], seed=[3, 6])[1].latents, takes[1].latents, atol=1e-5)
    noise = sampler.noise(6, [0], 32, 20)
    np.testing.assert_allclose(pipe(prompt='a glass', noise=noise).latents, takes[1].latents, atol=1e-5)
    np.testing.assert_allclose(pipe(prompt=['a glass', 'a'], noise=[noise, noise])[0].latents, takes[1].latents, atol=1e-5)


def test_each_clip_of_a_batch_has_its_own_negative_prompt(pipe):
    noise = sampler.noise(6, [0], 32, 20)
    make = lambda **options: pipe(prompt='a glass', guidance=3.0, noise=noise, **options)
    glass, metal = pipe(prompt=['a glass'] * 2, negative_prompt=['wood', 'metal'], guidance=3.0, noise=[noise, noise])
    for clip, words in ((glass, 'wood'), (metal, 'metal')):
        np.testing.assert_allclose(clip.latents, make(negative_prompt=words).latents, atol=1e-5)
    assert np.abs(glass.latents - metal.latents).max() > 1e-3


def test_frames_of_a_trained_network_are_those_of_its_records(pipe, workdir):
    """The released demonstration's way of counting, which takes other frames, is for the released networks."""
    made = pipe.request(video=workdir / 'a.mp4')
    wanted = pipe.encoder_and_codec(made.sequence)[0].frame_requests
    exact, summed = ([dataclasses.replace(one, rule=rule) for one in wanted] for rule in ('after', 'summed'))
    exact, summed = (media.read_frames(workdir / 'a.mp4', requests, 0.0, 1.0) for requests in (exact, summed))
    for stream, expected in zip(pipe.read(made), exact, strict=True):
        np.testing.assert_array_equal(stream, expected)
    assert np.any(exact[1] != summed[1])


def test_compiled_programs_are_kept_in_the_cache_folder_unless_they_are_kept_elsewhere(workdir, tmp_path):
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update('jax_compilation_cache_dir', None)
        mmaudio_jax.Pipeline.from_pretrained(workdir, cache=tmp_path, compilation_cache=False)
        assert jax.config.jax_compilation_cache_dir is None
        for cache in (tmp_path, tmp_path / 'other'):
            mmaudio_jax.Pipeline.from_pretrained(workdir, cache=cache)
            assert jax.config.jax_compilation_cache_dir == str(tmp_path / 'compiled')
    finally:
        jax.config.update('jax_compilation_cache_dir', before)


def test_one_device_that_is_not_the_first_is_used(workdir, pipe):
    other = mmaudio_jax.Pipeline.from_pretrained(workdir, devices=jax.devices()[2:3], compilation_cache=False)
    assert {device for leaf in jax.tree.leaves(other._params) for device in leaf.devices()} == {jax.devices()[2]}
    np.testing.assert_allclose(other(prompt='a').latents, pipe(prompt='a').latents, atol=1e-5)


def test_a_request_holds_the_name_of_its_image_not_the_pixels(workdir, pipe, tmp_path):
    """The images of a long table do not fit in memory."""
    Image.fromarray(np.full((20, 30, 3), 99, np.uint8)).save(tmp_path / 'i.png')
    assert pipe.request(image=tmp_path / 'i.png').image == tmp_path / 'i.png'
    clip = pipe(image=tmp_path / 'i.png')
    assert clip.image.shape == (20, 30, 3)
    np.testing.assert_array_equal(clip.latents, pipe(image=clip.image).latents)


def test_a_batch_over_several_devices(workdir, pipe):
    split = mmaudio_jax.Pipeline.from_pretrained(workdir, devices=jax.devices()[:4], compilation_cache=False)
    for prompts in (['a'], ['a', 'b', 'c', 'd', 'e']):
        for ours, alone in zip(split(prompt=prompts), pipe(prompt=prompts), strict=True):
            np.testing.assert_allclose(ours.latents, alone.latents, atol=1e-5)


@pytest.mark.parametrize('axes', [{'fsdp': 4}, {'data': 2, 'fsdp': 1, 'tensor': 2}])
def test_parameters_are_split_as_a_config_says(workdir, pipe, axes):
    config = trained_run.make_config()
    config.mesh.update(axes)
    split_by = 'fsdp' if axes['fsdp'] > 1 else 'tensor'
    config.sharding.rules = tuple((name, tuple(axis and split_by for axis in dims)) for name, dims in config.sharding.rules)
    split = mmaudio_jax.Pipeline.from_pretrained(workdir, devices=jax.devices()[:4], compilation_cache=False, placement=config)
    whole = sum(leaf.nbytes for leaf in jax.tree.leaves(pipe._params))
    first = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(split._params))
    assert whole / first > 1.5  # measured 2.07, 1.53
    wanted = {'video': [workdir / 'a.mp4', None, None], 'prompt': ['a', 'b', 'c']}
    for ours, alone in zip(split(**wanted), pipe(**wanted), strict=True):
        np.testing.assert_allclose(ours.latents, alone.latents, atol=1e-5)


def test_everything_that_is_asked_for_changes_the_sound(pipe, workdir):
    plain = pipe(video=workdir / 'a.mp4').audio
    np.testing.assert_array_equal(plain, pipe(video=workdir / 'a.mp4', seed=42).audio)
    for change in ({'prompt': 'a glass'}, {'negative_prompt': 'a glass'}, {'seed': 1}, {'num_steps': 3}, {'guidance': 1.0},
                   {'solver': 'midpoint'}, {'schedule': 'quadratic'}, {'video': None}):
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
    with pytest.raises(ValueError, match='o.mp3: a sound is saved as .flac or .wav, with its pictures as .mp4, .*, not .mp3'):
        clip.save(tmp_path / 'o.mp3')
    with pytest.raises(ValueError, match="a sound file holds the new sound alone; original='mix' needs a video file"):
        clip.save(tmp_path / 'mix.wav', original='mix')
    for level_db in (float('nan'), float('inf'), 1e6, '3'):
        with pytest.raises(ValueError, match='original_db is .*; a number of dB from -200 to 200 is needed'):
            clip.save(tmp_path / 'mix.mp4', original='mix', original_db=level_db)
    clip.save(tmp_path / 'kept.mkv', original='keep')
    with av.open(str(tmp_path / 'kept.mkv')) as container:
        assert len(container.streams.audio) == 2
    soundfile_info = soundfile.info(tmp_path / 'new.wav')
    assert (soundfile_info.channels, soundfile_info.subtype, soundfile_info.frames) == (1, 'PCM_16', RATE)


def test_mistakes(pipe, workdir, tmp_path):
    with pytest.raises(ValueError, match='different lengths'):
        pipe(video=[None, None], prompt=['a'])
    with pytest.raises(ValueError, match='prompt is of type NoneType; a text is needed'):
        pipe(prompt=None)
    with pytest.raises(ValueError, match='the video ends at 1.000 s, 2.000 s are needed'):
        pipe(video=workdir / 'a.mp4', duration_s=2.0)
    with pytest.raises(ValueError, match='frames in memory are float64'):
        pipe(video=np.zeros((25, 8, 8, 3)), fps=25)
    with pytest.raises(ValueError, match='too short'):
        pipe(prompt='a', duration_s=0.1)
    with pytest.raises(ValueError, match='nothing.mp4'):
        pipe(video=tmp_path / 'nothing.mp4')
    with pytest.raises(ValueError, match='train first'):
        pipeline.Pipeline.from_pretrained(tmp_path, compilation_cache=False)
    with pytest.raises(FileNotFoundError, match='codec'):
        pipeline.Pipeline.from_pretrained(workdir, data_dir=tmp_path, compilation_cache=False)


def test_weights_that_are_not_finite_are_named(workdir, monkeypatch):
    broken = mmaudio_jax.Pipeline.from_pretrained(workdir, compilation_cache=False)
    monkeypatch.setitem(broken._params['out'], 'kernel', broken._params['out']['kernel'].at[0, 0].set(np.nan))
    with pytest.raises(ValueError, match='the result is not finite: its weights hold NaN or infinity, first in out/kernel'):
        broken(prompt='a')


def test_a_guidance_that_is_too_large_is_named(pipe, monkeypatch):
    with pytest.raises(ValueError, match='weights are: guidance 1e[+]30 leads to numbers too large for float32; lower it$'):
        pipe(prompt='a', guidance=1e30)
    with pytest.raises(ValueError, match='guidance 1e[+]30 leads .* dopri5 may take; lower it$'):
        pipe(prompt='a', guidance=1e30, solver='dopri5')
    monkeypatch.setattr(pipe, '_model', dataclasses.replace(pipe._model, dtype='bfloat16'))
    with pytest.raises(ValueError, match="guidance 4.5 leads .* large for bfloat16; lower it, or take dtype='float32'"):
        pipe._check_finite(np.full(3, np.nan), np.zeros(3), pipe.settings(guidance=4.5))
    with pytest.raises(ValueError, match='large for bfloat16, or to more than the 4096 steps that dopri5 may take; lower it'):
        pipe._check_finite(np.full(3, np.nan), np.zeros(3), pipe.settings(solver='dopri5'))


def test_a_long_video_needs_a_duration(pipe, tmp_path):
    with av.open(str(tmp_path / 'long.mp4'), 'w') as container:
        stream = container.add_stream('mpeg4', rate=1, width=16, height=16, pix_fmt='yuv420p')
        for k in range(130):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), k, np.uint8), format='rgb24')
            frame.pts = k
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match='long.mp4: lasts 130 s, more than 120 s: set duration_s to take its beginning'):
        pipe(video=tmp_path / 'long.mp4')
    assert len(pipe(video=tmp_path / 'long.mp4', duration_s=1.0).audio) == RATE


def test_missing_modalities_get_the_learned_features(pipe):
    generator = np.random.default_rng(0)
    shapes = {'clip_features': (2, 8, 1024), 'sync_features': (2, 16, 768), 'text_features': (2, 77, 1024)}
    batch = {name: generator.normal(size=shape).astype(np.float16) for name, shape in shapes.items()}
    batch |= {'video_exists': np.array([True, False]), 'text_exists': np.array([False, True])}
    params = pipe._params
    clip, sync, text = record_sampler.with_empty_features(pipe._model, params, batch)
    np.testing.assert_array_equal(clip[0], batch['clip_features'][0])
    np.testing.assert_array_equal(text[1], batch['text_features'][1])
    np.testing.assert_array_equal(clip[1], np.broadcast_to(params['empty_clip_feat'], (8, 1024)))
    np.testing.assert_array_equal(sync[1], np.broadcast_to(params['empty_sync_feat'], (16, 768)))
    np.testing.assert_array_equal(text[0], params['empty_string_feat'])
