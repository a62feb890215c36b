"""CLIP's towers against their definition at a tiny size, and against the golden at full size."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import clip
from mmaudio_jax.weights import clip as clip_weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.golden import synthetic_weights
from tests.transformer_test import loop_attention

TINY = clip.CLIP(image_size=20, patch_size=6, image_width=8, image_heads=2, image_depth=3, vocabulary=11, text_length=5,
                 text_width=6, text_heads=2, text_depth=2, features=6, dtype=jnp.float32)
# The official sizes and the tiny ones; 730 = 1 + 27 · 27 positions become 1 + 3 · 3.
SIZES = {1280: 8, 3840: 24, 5120: 32, 1024: 6, 3072: 18, 4096: 24, 49408: 11, 77: 5, 730: 10, 14: 6}
DEPTHS = {'visual.transformer.resblocks.': 3, 'transformer.resblocks.': 2}


@functools.partial(jax.jit, static_argnames=('model', 'method'))
def apply(model, params, inputs, method):
    return model.apply({'params': params}, inputs, method=method)


@pytest.fixture(scope='module')
def tensors():
    return official_tensors.tiny('clip_vit_h_14_378', SIZES, DEPTHS)


@pytest.fixture(scope='module')
def params(tensors):
    return official_tensors.params_of(clip_weights, tensors, TINY)


def norm(tensors, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * tensors[name + '.weight'] + tensors[name + '.bias']


def block(tensors, name, x, causal):
    """One block on one sequence `[N, D]`, two heads."""
    qkv = norm(tensors, f'{name}.ln_1', x) @ tensors[f'{name}.attn.in_proj_weight'].T + tensors[f'{name}.attn.in_proj_bias']
    visible = np.tri(len(x)) if causal else np.ones((len(x), len(x)))
    mixed = loop_attention(*(part.reshape(len(x), 2, -1) for part in np.split(qkv, 3, axis=1)), visible)
    x = x + mixed.reshape(x.shape) @ tensors[f'{name}.attn.out_proj.weight'].T + tensors[f'{name}.attn.out_proj.bias']
    hidden = norm(tensors, f'{name}.ln_2', x) @ tensors[f'{name}.mlp.c_fc.weight'].T + tensors[f'{name}.mlp.c_fc.bias']
    hidden = hidden / (1 + np.exp(-1.702 * hidden))
    return x + hidden @ tensors[f'{name}.mlp.c_proj.weight'].T + tensors[f'{name}.mlp.c_proj.bias']


def test_image_tower_is_its_definition(tensors, params):
    frames = np.random.default_rng(0).standard_normal((2, 20, 20, 3)).astype(np.float32)
    ours = apply(TINY, {'image': params['image']}, frames, 'encode_image')
    assert ours.dtype == jnp.float32
    double = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for frame, feature in zip(frames, ours):
        tokens = [double['visual.class_embedding']]
        for row in range(3):
            for column in range(3):
                patch = frame[6 * row:6 * row + 6, 6 * column:6 * column + 6]
                tokens.append(np.einsum('RCI,OIRC->O', patch, double['visual.conv1.weight']))
        x = norm(double, 'visual.ln_pre', np.stack(tokens) + double['visual.positional_embedding'])
        for layer in range(3):
            x = block(double, f'visual.transformer.resblocks.{layer}', x, causal=False)
        expected = norm(double, 'visual.ln_post', x[0]) @ double['visual.proj']
        np.testing.assert_allclose(feature, expected / np.linalg.norm(expected), atol=1e-5)


def test_text_tower_is_its_definition(tensors, params):
    tokens = np.array([[9, 3, 4, 10, 0], [9, 10, 0, 0, 0]], np.int32)
    ours = apply(TINY, {'text': params['text']}, tokens, 'encode_text')
    assert ours.dtype == jnp.float32
    double = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    for row, features in zip(tokens, ours):
        x = double['token_embedding.weight'][row] + double['positional_embedding']
        for layer in range(2):
            x = block(double, f'transformer.resblocks.{layer}', x, causal=True)
        expected = norm(double, 'ln_final', x)
        np.testing.assert_allclose(features, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=1e-5)


def test_the_rest_of_a_frame_is_not_seen(params):
    frames = np.random.default_rng(0).standard_normal((1, 20, 20, 3)).astype(np.float32)
    other = frames.copy()
    other[:, 18:] = other[:, :, 18:] = 7
    np.testing.assert_array_equal(*(apply(TINY, params, x, 'encode_image') for x in (frames, other)))


def test_bfloat16_is_near(params):
    model = TINY.clone(dtype=jnp.bfloat16)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    frames = np.random.default_rng(0).standard_normal((4, 20, 20, 3)).astype(np.float32)
    tokens = np.array([[9, 3, 4, 10, 0]], np.int32)
    for method, inputs in (('encode_image', frames), ('encode_text', tokens)):
        exact, ours = apply(TINY, params, inputs, method), apply(model, half, inputs, method)
        assert ours.dtype == jnp.float32
        assert 1e-4 < np.abs(ours - exact).max() < 0.05


def test_normalisation():
    frames = np.array([[[[0, 0, 0], [255, 255, 255]]]], np.uint8)
    expected = [[-1.79226, -1.75210, -1.48022], [1.93034, 2.07488, 2.14590]]
    np.testing.assert_allclose(clip.normalize(frames)[0, 0], expected, atol=1e-5)


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="CLIP variant 'b' is not one of vit_h_14_378"):
        clip.build('b', jnp.float32)


@pytest.mark.slow
def test_golden():
    model = clip.build('vit_h_14_378', jnp.float32)
    params = official_tensors.params_of(clip_weights, official_tensors.full_size('clip_vit_h_14_378'), model)
    golden = np.load(GOLDEN / 'clip_vit_h_14_378.npz')
    image = synthetic_weights.example_input('clip_image', (2, 3, 384, 384)).transpose(0, 2, 3, 1)
    inputs = {'image': image, 'text': golden['tokens'][:3].astype(np.int32)}
    for tower, array in inputs.items():
        expected = golden[f'{tower}_features']
        ours = apply(model, {tower: params.pop(tower)}, array, f'encode_{tower}')
        error = np.abs(ours - expected).max() / expected.std()
        print(f'clip {tower}: {error:.1e}')
        assert error < 1e-4  # measured: image 5.2e-6, text 6.0e-6
