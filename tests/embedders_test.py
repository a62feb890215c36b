"""What stands between a clip's arrays and the networks, and between these and the embeddings; the networks are stand-ins."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import embedders
from mmaudio_jax import filterbanks
from mmaudio_jax.weights import torch_writer

RANDOM = np.random.default_rng(0)


@pytest.fixture(name='network')
def fixture_network(monkeypatch):
    """Puts a function in the networks' place, and takes any tensors for their parameters."""
    for module in (embedders.vggish_weights, embedders.synchformer_weights):
        monkeypatch.setattr(module, 'to_params', lambda *_: {})
    monkeypatch.setattr(embedders.offset_weights, 'sound_params', lambda *_: {})
    for name in ('audio_params', 'vision_params'):
        monkeypatch.setattr(embedders.imagebind_weights, name, lambda *_: {})
    return lambda function: monkeypatch.setattr(embedders, '_run', lambda model, params, *inputs: function(*inputs))


def test_offsets_are_of_the_first_and_of_the_last_fourteen_segments(network):
    """Picture and sound of the same segments; 24 of them, numbered, of two clips."""
    seen = []
    network(lambda picture, sound: seen.append((picture[:, :, 0, 0], sound[:, :, 0, 0]))
            or jax.nn.one_hot(picture[:, 0, 0, 0].astype(int), 21))
    numbers = np.arange(24)[None, :, None, None] + np.array([0, 1])[:, None, None, None]
    picture, sound = (np.broadcast_to(numbers, (2, 24, tokens, 5)).astype(np.float32) for tokens in (8, 6))
    assert np.asarray(embedders._offsets({}, picture, sound)).tolist() == [[0, 10], [1, 11]]
    for ours, theirs in seen:
        np.testing.assert_array_equal(ours, theirs)
        assert ours.shape == (2, 14)
    with pytest.raises(ValueError, match='DeSync compares 14 segments .4.8 s., the clips have 13'):
        jax.jit(embedders._offsets)({}, picture[:, :13], sound[:, :13])


def test_segments_of_pictures_are_sixteen_frames_every_eight(network):
    network(lambda frames: frames[:, ::2, 0, 0])
    _, apply = embedders._synchformer_picture({})
    frames = RANDOM.integers(0, 255, (1, 200, 2, 2, 3), np.uint8)
    segments = apply({}, jnp.asarray(frames))['segments']
    assert segments.shape == (1, 24, 8, 3)
    for segment, token in ((0, 0), (1, 0), (23, 7)):
        expected = (frames[0, 8 * segment + 2 * token, 0, 0] / 255 - 0.5) / 0.5
        np.testing.assert_allclose(segments[0, segment, token], expected, atol=1e-6)


def test_segments_of_sound_keep_their_order(network):
    network(lambda mel: mel[:, :6])
    _, apply = embedders._synchformer_sound({})
    segments = RANDOM.normal(size=(2, 3, filterbanks.SYNCHFORMER_SEGMENT)).astype(np.float32)
    expected = filterbanks.synchformer_mel(segments[1])[:, :6]
    np.testing.assert_allclose(apply({}, segments)['segments'][1], expected, atol=1e-5)


def test_patches_keep_their_order(network):
    network(lambda patches: patches[:, 0, :5])
    _, apply = embedders._vggish({})
    waveforms = RANDOM.normal(size=(2, 32_000)).astype(np.float32)
    expected = filterbanks.vggish_patches(waveforms)[:, :, 0, :5]
    assert expected.shape[:2] == (2, 2)
    np.testing.assert_allclose(apply({}, waveforms)['patches'], expected, atol=1e-5)


def test_imagebind_takes_the_mean_over_the_views_of_each_clip(network):
    network(lambda pixels: pixels[:, 0, 0, 0])
    _, apply = embedders._imagebind_picture({})
    views = RANDOM.integers(0, 255, (2, 9, 2, 4, 4, 3), np.uint8)
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]  # CLIP's
    expected = ((views[:, :, 0, 0, 0] / 255 - mean) / std).mean(axis=1)
    np.testing.assert_allclose(apply({}, jnp.asarray(views))['vector'], expected, atol=1e-5)
    network(lambda mel: mel[:, 0, :4])
    _, apply = embedders._imagebind_sound({})
    clips = RANDOM.normal(size=(2, 3, filterbanks.IMAGEBIND_CLIP)).astype(np.float32)
    expected = np.mean([filterbanks.imagebind_mel(clips[1, part:part + 1])[0, 0, :4] for part in range(3)], axis=0)
    np.testing.assert_allclose(apply({}, clips)['vector'][1], expected, atol=1e-4)


@pytest.mark.parametrize('name, keys', [('panns', ('model',)), ('passt', ()), ('vggish', ()), ('synchformer_sound', ()),
                                        ('imagebind_picture', ()), ('clap_sound', ('state_dict',)),
                                        ('clap_text', ('state_dict',))])
def test_tensors_are_found_where_the_published_files_have_them(tmp_path, name, keys):
    network = embedders.embedders(tmp_path)[name]
    network = dataclasses.replace(network, build=lambda tensors: (dict(tensors), lambda params: params))
    with pytest.raises(FileNotFoundError, match='nothing is downloaded'):
        network.load(tmp_path)
    torch_writer.write(tmp_path / network.file, {'one.weight': np.arange(3, dtype=np.float32)}, *keys)
    if network.kind == 'text':
        with pytest.raises(FileNotFoundError, match='vocab.json: the published weights of clap_text are missing'):
            network.load(tmp_path)
        for file in embedders.tokenizer_roberta.FILES:
            (tmp_path / file).touch()
    params, _ = network.load(tmp_path)
    assert list(params) == ['one.weight'] and params['one.weight'].tolist() == [0, 1, 2]
    if keys:
        torch_writer.write(tmp_path / network.file, {'one.weight': np.arange(3, dtype=np.float32)})
        with pytest.raises(ValueError, match=f"holds no '{keys[0]}'"):
            network.load(tmp_path)
