"""The Pipeline of the official networks at a tiny size: what is loaded when, bfloat16, several devices, --mode=generate."""
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from mmaudio_jax import generate
from mmaudio_jax import pretrained
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import clip
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import synchformer
from mmaudio_jax.models import vae
from mmaudio_jax.pipeline import Pipeline
from mmaudio_jax.sequence import AUDIO_RATES
from tests import tiny_run
from tests.media_test import write_video
from tests.official_codec_test import VAE
from tests.official_codec_test import Vocoder

NETWORK = 'mmaudio_small_16k'


@pytest.fixture(name='loaded')
def fixture_loaded(monkeypatch):
    """Names and dtypes of what was loaded: tiny networks with random weights stand in for the official ones."""
    audio = AUDIO_RATES['16k']
    monkeypatch.setitem(clip.VARIANTS, 'vit_h_14_378',
                        dict(image_size=20, patch_size=6, image_width=8, image_heads=2, image_depth=1, vocabulary=49408,
                             text_length=77, text_width=1024, text_heads=2, text_depth=1, features=1024))
    monkeypatch.setitem(synchformer.VARIANTS, 'visual',
                        dict(image_size=8, patch_size=4, frames=16, frames_per_step=2, width=768, num_heads=2, depth=1))
    monkeypatch.setattr(mmaudio, 'build', lambda config, sequence: tiny_run.Network(sequence.latent_channels))
    monkeypatch.setattr(vae, 'build', lambda rate: VAE(audio.latent_channels, audio.mel_bins))
    monkeypatch.setattr(bigvgan, 'build', lambda rate: Vocoder(audio.hop_length))
    lengths = ((32, 20), (), (8, 1024), (16, 768), (77, 1024))
    models = {NETWORK: (tiny_run.Network(20), *(jnp.zeros((1, *shape)) for shape in lengths)),
              'clip_vit_h_14_378': (clip.build('vit_h_14_378', jnp.float32), jnp.zeros((1, 20, 20, 3)),
                                    jnp.zeros((1, 77), int)),
              'synchformer_visual': (synchformer.build('visual', jnp.float32), jnp.zeros((1, 16, 8, 8, 3)))}
    values, loaded = 0.05 * np.random.default_rng(0).standard_normal(99_991, np.float32), []

    def load(name, *, dtype, **_):
        loaded.append((name, dtype))
        if name not in models:
            return {'gain': np.float32(1), 'encoder': np.zeros(1), 'decoder': np.zeros(1)}
        shapes = jax.eval_shape(models[name][0].init, jax.random.key(0), *models[name][1:])['params']
        params = jax.tree.map(lambda leaf: np.resize(values, leaf.shape).astype(dtype), shapes)
        return {**params, 'latent_std': np.ones((1, 1, 20), dtype)} if name == NETWORK else params

    monkeypatch.setattr(pretrained.store, 'load', load)
    monkeypatch.setattr(pretrained.store, 'converted', lambda name, **_: pathlib.Path(f'{name}-md5-code.safetensors'))
    return loaded


def test_a_part_is_loaded_when_it_is_first_used(loaded, tmp_path, capsys):
    pipe = Pipeline.from_pretrained('small_16k', compilation_cache=False, verbose=True)
    assert [name for name, _ in loaded] == [NETWORK]
    clip_ = pipe(prompt='rain', num_steps=2, duration_s=1.0)
    assert [name for name, _ in loaded[1:]] == ['clip_vit_h_14_378', 'vae_16k', 'bigvgan_16k']
    assert len(clip_.audio) == 16_000 and clip_.sample_rate_hz == 16_000
    video = write_video(tmp_path / 'a.mp4', frames=30)
    assert len(pipe(video=video, num_steps=2).audio) == 19_200
    assert sorted(name for name, _ in loaded[4:]) == ['clip_vit_h_14_378', 'synchformer_visual']  # the image tower
    pipe(video=video, prompt='rain', num_steps=2)
    assert len(loaded) == 6
    printed = capsys.readouterr().out
    for stage in ('load (small_16k)', 'load (synchformer_visual)', 'frames (a.mp4)', 'text (1 clips)',
                  'CLIP (1 videos, 0 images)', 'Synchformer (1 videos)', 'flow and codec (1 sounds of 1.5 s, 2 steps)'):
        assert f'pipeline: {stage}: ' in printed


def test_defaults_and_controls_reach_the_network(loaded, tmp_path):
    pipe = Pipeline.from_pretrained('small_16k', compilation_cache=False)
    assert pipe.settings().num_steps == 25 and pipe.settings().guidance == 4.5 and pipe.step is None
    video = write_video(tmp_path / 'a.mp4')
    options = {'video': video, 'num_steps': 2}
    sounds = [pipe(**options, **more).latents for more in ({}, {'prompt': 'rain'}, {'negative_prompt': 'rain'}, {'seed': 1},
                                                           {'mask_clip': True})]
    for i, one in enumerate(sounds):
        assert all(np.abs(one - other).max() > 1e-4 for other in sounds[:i])
    np.testing.assert_array_equal(pipe(**options, seed=42, negative_prompt='', guidance=4.5).latents, sounds[0])
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    seen, unseen = (pipe(image=picture, duration_s=1.0, num_steps=2).latents for picture in (image, None))
    assert np.abs(seen - unseen).max() > 1e-4


def test_several_devices_give_the_same(loaded, tmp_path):
    videos = [write_video(tmp_path / f'{k}.mp4', frames=25, skip=range(k)) for k in range(3)]
    results = []
    for devices in (None, jax.devices()):
        pipe = Pipeline.from_pretrained('small_16k', compilation_cache=False, devices=devices)
        results.append(pipe(video=videos, prompt=['a', 'b', ''], num_steps=2, duration_s=0.8))
    for one, other in zip(*results, strict=True):
        np.testing.assert_allclose(one.latents, other.latents, atol=2e-5)
        np.testing.assert_allclose(one.audio, other.audio, atol=2e-5)


def test_bfloat16(loaded):
    exact, half = (Pipeline.from_pretrained('small_16k', compilation_cache=False, dtype=dtype)(prompt='rain', num_steps=2)
                   for dtype in ('float32', 'bfloat16'))
    assert {dtype for name, dtype in loaded if name.startswith(('vae', 'bigvgan'))} == {'float32'}
    assert {dtype for name, dtype in loaded if name == NETWORK} == {'float32', 'bfloat16'}
    difference = np.std(half.latents - exact.latents) / np.std(exact.latents)
    assert 1e-5 < difference < 2e-3  # measured 1.8e-4


def test_generate_with_an_official_network(loaded, tmp_path):
    video = write_video(tmp_path / 'a.mp4')
    config = base.get_config()
    config.generate.update(pretrained='small_16k', input=str(video), compilation_cache=False)
    config.sampling.num_steps = 2
    config.sharding.rules = tiny_run.RULES
    assert generate.generate(config, tmp_path / 'run') == 0
    record = json.loads((tmp_path / 'run' / 'generated' / 'a.json').read_text())
    assert record['settings']['weights'] == {'run': 'small_16k', 'step': None, 'digest': f'{NETWORK}-md5', 'codec': None,
                                             'pretrained': 'small_16k', 'dtype': 'float32'}
    assert record['files'] == ['a.flac', 'a.mp4', 'a.png']
