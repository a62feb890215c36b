"""The official encoder at a tiny size: cutting into calls, segments, laziness, sharing, dtype and errors."""
import concurrent.futures
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import encoders
from mmaudio_jax import official_encoder
from mmaudio_jax.frames import fit_frame
from mmaudio_jax.frames import FrameRequest
from mmaudio_jax.models import clip
from mmaudio_jax.models import synchformer
from mmaudio_jax.sequence import Sequence

SEQUENCE = Sequence('16k', 1.3)  # 10 CLIP frames, 32 sync frames, 3 segments
CALLS = official_encoder.CallSizes(frames=4, segments=2, texts=2)


@pytest.fixture(scope='module', autouse=True)
def tiny_variants():
    """The official networks, small: the real tokens, widths of the features and frames of a segment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(clip.VARIANTS, 'vit_h_14_378',
                      dict(image_size=20, patch_size=6, image_width=8, image_heads=2, image_depth=2, vocabulary=49408,
                           text_length=77, text_width=1024, text_heads=2, text_depth=1, features=1024))
        patch.setitem(synchformer.VARIANTS, 'visual',
                      dict(image_size=8, patch_size=4, frames=16, frames_per_step=2, width=768, num_heads=2, depth=1))
        yield


@pytest.fixture(scope='module')
def trees(tiny_variants):
    """Parameters by official name."""
    models = {'clip_vit_h_14_378': clip.build('vit_h_14_378', jnp.float32),
              'synchformer_visual': synchformer.build('visual', jnp.float32)}
    inputs = {'clip_vit_h_14_378': (jnp.zeros((1, 20, 20, 3)), jnp.zeros((1, 77), jnp.int32)),
              'synchformer_visual': (jnp.zeros((1, 16, 8, 8, 3)),)}
    values = 0.05 * np.random.default_rng(0).standard_normal(99_991, np.float32)  # repeated: 50 million take seconds to draw
    return {name: jax.tree.map(lambda leaf: np.resize(values, leaf.shape),
                               jax.eval_shape(model.init, jax.random.key(0), *inputs[name])['params'])
            for name, model in models.items()}


class Loader:
    """A load function that counts."""

    def __init__(self, trees, dtype=np.float32):
        self.trees, self.dtype, self.loaded = trees, dtype, []

    def __call__(self, name):
        self.loaded.append(name)
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), self.trees[name])


def encoder_of(load, calls=CALLS):
    return official_encoder.OfficialEncoder(SEQUENCE, official_encoder.shared_towers(load), calls)


def random_frames(batch):
    rng = np.random.default_rng(0)
    return (rng.integers(0, 256, (batch, 10, 20, 20, 3), np.uint8), rng.integers(0, 256, (batch, 32, 8, 8, 3), np.uint8))


def test_requests_are_those_of_the_networks():
    clip_request, sync_request = encoder_of(lambda name: None).frame_requests
    assert clip_request == FrameRequest(8.0, 20, 20, 'squash', rule='nearest')
    assert sync_request == FrameRequest(25.0, 8, 8, 'crop', rule='nearest')


def test_features_of_a_batch_are_those_of_its_frames_and_segments(trees):
    encoder = encoder_of(Loader(trees))
    clip_frames, sync_frames = random_frames(2)
    clip_features, sync_features = encoder.encode_video(clip_frames, sync_frames)
    assert clip_features.shape == (2, 10, 1024) and sync_features.shape == (2, 24, 768)
    assert clip_features.dtype == sync_features.dtype == np.float32
    pixels = (clip_frames[1, 7] / 255 - np.array(clip.MEAN)) / np.array(clip.STD)
    model = clip.build('vit_h_14_378', jnp.float32)
    alone = jax.jit(lambda params, x: model.apply({'params': params}, x, method='encode_image'))(
        trees['clip_vit_h_14_378'], pixels[None].astype(np.float32))[0]
    np.testing.assert_allclose(clip_features[1, 7], alone, atol=1e-5)
    model = synchformer.build('visual', jnp.float32)
    segment = (sync_frames[1, 8:24] / 127.5 - 1).astype(np.float32)  # the second of three
    alone = jax.jit(lambda params, x: model.apply({'params': params}, x))(trees['synchformer_visual'], segment[None])[0]
    np.testing.assert_allclose(sync_features[1, 8:16], alone, atol=1e-4)


def test_sizes_of_the_calls_do_not_matter(trees):
    load = Loader(trees)
    texts = ['rain', '', 'a dog barks', 'rain']
    results = []
    for size in (2, 7):
        encoder = encoder_of(load, official_encoder.CallSizes(size, size, size))
        results.append((*encoder.encode_video(*random_frames(2)), encoder.encode_text(texts)))
    for one, other in zip(*results):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_equal_texts_are_encoded_once(trees, monkeypatch):
    encoder = encoder_of(Loader(trees))
    seen = []
    monkeypatch.setattr(official_encoder, 'text_features', lambda params, tokens: seen.append(tokens) or
                        np.repeat(np.asarray(tokens, np.float32)[..., None], 1024, axis=2))
    features = encoder.encode_text(['rain', 'wind', 'rain', 'RAIN '])
    assert [len(tokens) for tokens in seen] == [2]
    assert features.shape == (4, 77, 1024)
    np.testing.assert_array_equal(features[[0, 0]], features[[2, 3]])
    assert features[0, 1, 0] != features[1, 1, 0]


def test_nothing_gives_nothing(trees):
    load = Loader(trees)
    encoder = encoder_of(load)
    assert encoder.encode_text([]).shape == (0, 77, 1024)
    assert encoder.encode_frames([]).shape == (0, 1024)
    clip_features, sync_features = encoder.encode_video(*random_frames(0))
    assert clip_features.shape == (0, 10, 1024) and sync_features.shape == (0, 24, 768)
    assert load.loaded == []


def test_a_tower_is_loaded_when_it_is_used(trees):
    load = Loader(trees)
    encoder = encoder_of(load)
    assert load.loaded == []
    encoder.encode_text(['rain'])
    encoder.encode_text(['wind'])
    assert load.loaded == ['clip_vit_h_14_378']
    towers = official_encoder.shared_towers(load)
    assert towers.__dict__.keys() == {'_load', 'mesh', 'text'} and towers.text.keys() == {'text'}
    encoder.encode_segments([np.zeros((16, 8, 8, 3), np.uint8)])
    assert load.loaded == ['clip_vit_h_14_378', 'synchformer_visual'] and 'image' not in towers.__dict__


def test_threads_load_the_same_weights_once():
    """Python 3.12 took the lock out of functools.cached_property."""
    loads = []

    def load(name):
        loads.append(name)
        time.sleep(0.2)
        return {'text': np.zeros(2)}

    towers = official_encoder.Towers(load)
    with concurrent.futures.ThreadPoolExecutor(3) as threads:
        for made in [threads.submit(lambda: towers.text) for _ in range(3)]:
            made.result()
    assert len(loads) == 1


def test_encoders_of_one_load_share_its_parameters(trees):
    load = Loader(trees)
    first = encoders.make('official', SEQUENCE, load)
    first.encode_text(['rain'])
    second = encoders.make('official', Sequence('16k', 2.0), load)
    second.encode_text(['rain'])
    assert load.loaded == ['clip_vit_h_14_378']
    del first, second
    encoders.make('official', SEQUENCE, load).encode_text(['rain'])
    assert load.loaded == ['clip_vit_h_14_378'] * 2  # nothing stays in memory without an encoder


def test_a_still_image_of_any_size(trees):
    encoder = encoder_of(Loader(trees))
    image = np.random.default_rng(0).integers(0, 256, (31, 47, 3), np.uint8)
    fitted = fit_frame(image, encoder.frame_requests[0])
    feature = encoder.encode_image(image)
    assert feature.shape == (1024,)
    np.testing.assert_allclose(feature, encoder.encode_frames([fitted, fitted])[1], atol=1e-6)


def test_parameters_in_bfloat16_compute_in_bfloat16(trees):
    exact, half = (encoder_of(Loader(trees, dtype)) for dtype in (np.float32, jnp.bfloat16))
    frames = random_frames(1)
    for ours, expected in zip(half.encode_video(*frames), exact.encode_video(*frames)):
        assert ours.dtype == np.float32
        assert 1e-5 < np.abs(ours - expected).max() < 0.1 * np.abs(expected).max()


def test_wrong_frames_are_named(trees):
    clip_frames, sync_frames = random_frames(2)
    encoder = encoder_of(Loader(trees))
    with pytest.raises(ValueError, match=r'frames are uint8 \[2, 31, 8, 8, 3\], not uint8 \[B, 32, 8, 8, 3\]'):
        encoder.encode_video(clip_frames, sync_frames[:, 1:])
    with pytest.raises(ValueError, match=r'frames are float32 \[2, 10, 20, 20, 3\]'):
        encoder.encode_video(clip_frames.astype(np.float32), sync_frames)
