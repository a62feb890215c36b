"""Synchformer's visual encoder against its definition at a tiny size, and against the golden at full size."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import synchformer
from mmaudio_jax.weights import synchformer as synchformer_weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.golden import synthetic_weights
from tests.transformer_test import loop_attention

TINY = synchformer.VisualEncoder(image_size=12, patch_size=4, frames=6, frames_per_step=2, width=8, num_heads=2, depth=2,
                                 dtype=jnp.float32)
# The official sizes and the tiny ones: 1 + 14 · 14 places become 1 + 3 · 3, 8 time steps become 3.
SIZES = {768: 8, 2304: 24, 3072: 32, 197: 10, 8: 3, 16: 4}
DEPTHS = {'vfeat_extractor.blocks.': 2}
_erf = np.vectorize(math.erf)


@functools.partial(jax.jit, static_argnames='model')
def apply(model, params, segments):
    return model.apply({'params': params}, segments)


@pytest.fixture(scope='module')
def tensors():
    return official_tensors.tiny('synchformer_visual', SIZES, DEPTHS)


@pytest.fixture(scope='module')
def params(tensors):
    return synchformer_weights.to_params(tensors, TINY)


def norm(tensors, name, x):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * tensors[name + '.weight'] + tensors[name + '.bias']


def linear(tensors, name, x, join='.'):
    return x @ tensors[f'{name}{join}weight'].T + tensors[f'{name}{join}bias']


def attend(qkv, visible):
    return loop_attention(*(part.reshape(len(part), 2, -1) for part in np.split(qkv, 3, axis=1)), visible).reshape(len(qkv), -1)


def gelu(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def expected_features(tensors, segment):
    """One segment `[6, 12, 12, 3]` → `[3, 8]`, with attention over all tokens under a mask of what each one sees."""
    tokens, time, place = [tensors['cls_token'][0, 0] + tensors['pos_embed'][0, 0]], [-1], [-1]
    for step in range(3):
        for cell in range(9):
            row, column = 4 * (cell // 3), 4 * (cell % 3)
            box = segment[2 * step:2 * step + 2, row:row + 4, column:column + 4]
            patch = np.einsum('TRCI,OITRC->O', box, tensors['patch_embed_3d.proj.weight']) + tensors['patch_embed_3d.proj.bias']
            tokens.append(patch + tensors['pos_embed'][0, 1 + cell] + tensors['temp_embed'][0, step])
            time.append(step)
            place.append(cell)
    x, time, place = np.stack(tokens), np.array(time), np.array(place)
    is_class = place == -1
    seen = {'timeattn': place[:, None] == place, 'attn': time[:, None] == time}
    for layer in range(2):
        for name, before in (('timeattn', 'norm3'), ('attn', 'norm1')):
            qkv = linear(tensors, f'blocks.{layer}.{name}.qkv', norm(tensors, f'blocks.{layer}.{before}', x))
            x = x + linear(tensors, f'blocks.{layer}.{name}.proj', attend(qkv, seen[name] | is_class | is_class[:, None]))
        hidden = gelu(linear(tensors, f'blocks.{layer}.mlp.fc1', norm(tensors, f'blocks.{layer}.norm2', x)))
        x = x + linear(tensors, f'blocks.{layer}.mlp.fc2', hidden)
    x = norm(tensors, 'norm', x[1:]).reshape(3, 9, 8)
    return np.stack([summary(tensors, step) for step in x])


def summary(tensors, patches):
    """`[9, 8]` → `[8]`: a pre-norm layer over a class token and the patches, of which the first result is taken."""
    prefix = 'spatial_attn_agg'
    x = np.concatenate([tensors[f'{prefix}.cls_token'][0], patches])
    qkv = linear(tensors, f'{prefix}.self_attn.in_proj', norm(tensors, f'{prefix}.norm1', x), '_')
    x = x + linear(tensors, f'{prefix}.self_attn.out_proj', attend(qkv, np.ones((10, 10))))
    return (x + linear(tensors, f'{prefix}.linear2', gelu(linear(tensors, f'{prefix}.linear1',
                                                                 norm(tensors, f'{prefix}.norm2', x)))))[0]


@pytest.mark.parametrize('places', [3, 9])
def test_encoder_is_its_definition(monkeypatch, tensors, params, places):
    """Also with all places of a time step, or some of them, in one product of attention over time."""
    monkeypatch.setattr(synchformer, '_PLACES_TOGETHER', places)
    apply = jax.jit(lambda params, segments: TINY.apply({'params': params}, segments))
    segments = np.random.default_rng(0).standard_normal((2, 6, 12, 12, 3)).astype(np.float32)
    ours = apply(params, segments)
    assert ours.shape == (2, 3, 8) and ours.dtype == jnp.float32
    double = {name.removeprefix('vfeat_extractor.'): tensor.astype(np.float64) for name, tensor in tensors.items()}
    for segment, features in zip(segments, ours):
        np.testing.assert_allclose(features, expected_features(double, segment), atol=1e-5)


def test_bfloat16_is_near(params):
    segments = np.random.default_rng(0).standard_normal((2, 6, 12, 12, 3)).astype(np.float32)
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact, ours = apply(TINY, params, segments), apply(TINY.clone(dtype=jnp.bfloat16), half, segments)
    assert ours.dtype == jnp.float32
    assert 1e-4 < np.abs(ours - exact).max() / exact.std() < 0.1


def test_normalisation():
    np.testing.assert_allclose(synchformer.normalize(np.array([0, 51, 255], np.uint8)), [-1, -0.6, 1], atol=1e-6)


def test_unknown_variant_names_the_known_ones():
    with pytest.raises(ValueError, match="Synchformer variant 'audio' is not one of visual"):
        synchformer.build('audio', jnp.float32)


@pytest.mark.slow
def test_golden():
    model = synchformer.build('visual', jnp.float32)
    params = synchformer_weights.to_params(official_tensors.full_size('synchformer_visual'), model)
    expected = np.load(GOLDEN / 'synchformer_visual.npz')['features'][0]
    video = synthetic_weights.example_input('sync_video', (1, 2, 16, 3, 224, 224), scale=0.5)[0].transpose(0, 1, 3, 4, 2)
    error = np.abs(apply(model, params, video) - expected).max() / expected.std()
    print(f'synchformer: {error:.1e}')
    assert error < 1e-4  # measured: 2.8e-6
