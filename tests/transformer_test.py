"""Patches, LayerNorm, activations and attention by definition."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax.models import transformer
from tests.conftest import take_form_of_tpus


def test_a_patch_is_a_box_of_the_video():
    video = np.random.default_rng(0).standard_normal((2, 4, 6, 9, 3), np.float32)
    patches = np.asarray(transformer.patches(video, 2, 3))
    assert patches.shape == (2, 2 * 2 * 3, 2 * 3 * 3 * 3)
    for time, row, column in ((0, 0, 0), (1, 0, 2), (1, 1, 1)):
        box = video[:, 2 * time:2 * time + 2, 3 * row:3 * row + 3, 3 * column:3 * column + 3]
        np.testing.assert_array_equal(patches[:, (time * 2 + row) * 3 + column], box.reshape(2, -1))


@pytest.mark.parametrize('eps', [1e-5, 1e-2])
def test_layer_norm(eps):
    rng = np.random.default_rng(0)
    x = 3 + 0.1 * rng.standard_normal((2, 5, 64))
    scale, bias = rng.standard_normal((2, 64))
    expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias
    ours = transformer.LayerNorm(eps, jnp.float32).apply({'params': {'scale': scale, 'bias': bias}}, x.astype(np.float32))
    np.testing.assert_allclose(ours, expected, atol=2e-5)  # measured: 3.4e-6


def test_activations():
    x = np.linspace(-9, 9, 2001)
    phi = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x])
    np.testing.assert_allclose(transformer.gelu(x.astype(np.float32)), x * phi, atol=1e-6)
    np.testing.assert_allclose(transformer.quick_gelu(x.astype(np.float32)), x / (1 + np.exp(-1.702 * x)), atol=1e-6)


def loop_attention(q, k, v, visible):
    """One query and head after the other: `[N, H, K]`, `[M, H, K]`, `[M, H, K]`, `[N, M]` → `[N, H, K]`."""
    mixed = np.zeros_like(q)
    for query in range(len(q)):
        seen = np.flatnonzero(visible[query])
        for head in range(q.shape[1]):
            logits = k[seen, head] @ q[query, head] / math.sqrt(q.shape[2])
            weights = np.exp(logits - logits.max())
            mixed[query, head] = weights / weights.sum() @ v[seen, head]
    return mixed


@pytest.mark.parametrize('causal', [False, True])
def test_attention(causal):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 4))
    visible = np.tri(7, dtype=bool) if causal else np.ones((7, 7), bool)
    ours = transformer.attention(*(jnp.asarray(part, jnp.float32) for part in (q, k, v)), visible if causal else None)
    for batch in range(2):
        np.testing.assert_allclose(ours[batch], loop_attention(q[batch], k[batch], v[batch], visible), atol=1e-5)


def test_a_mask_of_each_example():
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 4))
    real = np.array([[True] * 7, [True] * 4 + [False] * 3])
    ours = transformer.attention(*(jnp.asarray(part, jnp.float32) for part in (q, k, v)), real[:, None, None])
    for batch in range(2):
        expected = loop_attention(q[batch], k[batch], v[batch], np.broadcast_to(real[batch], (7, 7)))
        np.testing.assert_allclose(ours[batch], expected, atol=1e-5)


@pytest.mark.parametrize('most, part', [(1, 1), (35 * 4, 3), (10**6, 6)])
def test_parts_of_the_heads_make_the_whole(monkeypatch, most, part):
    """Of 2 · 3 products of 5 by 7 logits, the largest divisor that fits is taken at a time."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 4))
    q, mask = q[:, :5], np.tri(5, 7, k=2, dtype=bool)
    sizes = []
    mix = transformer._mix
    monkeypatch.setattr(transformer, '_CACHED_LOGITS', most)
    monkeypatch.setattr(transformer, '_mix', lambda arrays: sizes.append(len(arrays['q'])) or mix(arrays))
    ours = transformer.attention(*(jnp.asarray(array, jnp.float32) for array in (q, k, v)), mask)
    assert part in sizes
    for batch in range(2):
        np.testing.assert_allclose(ours[batch], loop_attention(q[batch], k[batch], v[batch], mask), atol=1e-5)


def test_an_extra_token_is_seen_by_all():
    """Also where its logit is far above or below all others."""
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, 7, 3, 4))
    k[:, -1] *= np.array([1, 100, -100])[:, None]
    mask = np.concatenate([np.tri(7, 6, dtype=bool), np.ones((7, 1), bool)], axis=1)
    extra = [jnp.asarray(part[:, -1], jnp.float32) for part in (k, v)]
    ours = transformer.attention(*(jnp.asarray(part, jnp.float32) for part in (q, k[:, :-1], v[:, :-1])), mask[:, :-1], extra)
    for batch in range(2):
        np.testing.assert_allclose(ours[batch], loop_attention(q[batch], k[batch], v[batch], mask), atol=1e-5)


def test_first_only_is_the_first_of_all():
    fields = (2, 16, 1e-6, transformer.gelu, jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, 5, 8))
    params = jax.jit(transformer.Block(*fields).init)(jax.random.key(1), x)
    params = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), params)  # biases too
    whole, _ = transformer.Block(*fields).apply(params, x)
    first, _ = transformer.Block(*fields, first_only=True).apply(params, x)
    np.testing.assert_allclose(first, whole[:, :1], atol=2e-6)
    with pytest.raises(ValueError, match='first_only must be False'):
        transformer.Block(*fields, first_only=True, extra_key=True).init(jax.random.key(1), x)


def test_a_causal_block_does_not_see_what_comes():
    block = transformer.Block(2, 16, 1e-6, transformer.gelu, jnp.float32, causal=True)
    x = np.array(jax.random.normal(jax.random.key(0), (1, 6, 8)))
    params = block.init(jax.random.key(1), x)
    before = np.asarray(block.apply(params, x)[0])
    x[0, 4, 0] += 1
    after = np.asarray(block.apply(params, x)[0])
    np.testing.assert_array_equal(after[0, :4], before[0, :4])
    assert np.abs(after[0, 4:] - before[0, 4:]).max(axis=1).min() > 1e-4


def test_heads_as_on_tpus(monkeypatch):
    x, kernel, bias = (np.random.default_rng(0).standard_normal(shape, np.float32) for shape in ((2, 5, 12), (12, 36), (36,)))
    plain = transformer.heads(x, kernel, bias, 3)
    take_form_of_tpus(monkeypatch)
    for part, expected in zip(transformer.heads(x, kernel, bias, 3), plain, strict=True):
        assert part.shape == (2, 5, 3, 4)
        np.testing.assert_allclose(part, expected, atol=1e-5)
