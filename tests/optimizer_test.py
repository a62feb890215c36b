"""Schedules in closed form, AdamW against a plain numpy loop, frozen entries untouched."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base
from mmaudio_jax import optimizer


def section(**fields):
    config = base.get_config().optimizer
    config.update(fields)
    return config


@pytest.fixture(name='params')
def fixture_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        'layer': {'kernel': jax.random.normal(keys[0], (4, 3)), 'bias': jax.random.normal(keys[1], (3,))},
        'latent_mean': jax.random.normal(keys[2], (1, 1, 2)),
    }


def rates(schedule, steps):
    return [float(schedule(jnp.int32(step))) for step in steps]


def test_paper_schedule():
    schedule = optimizer.make_schedule(section())
    steps = [0, 1, 999, 1000, 240_999, 241_000, 270_999, 271_000, 299_999]
    expected = [1e-4 / 1001, 2e-4 / 1001, 1e-1 / 1001, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6]
    np.testing.assert_allclose(rates(schedule, steps), expected, rtol=1e-6)


def test_constant_schedule():
    schedule = optimizer.make_schedule(section(schedule='constant', learning_rate=2.0, warmup_steps=1))
    np.testing.assert_allclose(rates(schedule, [0, 1, 10**6]), [1, 2, 2])


def test_polynomial_schedule():
    schedule = optimizer.make_schedule(section(schedule='polynomial', learning_rate=2.0, warmup_steps=0, polynomial_steps=4))
    np.testing.assert_allclose(rates(schedule, range(6)), [2, 2 * 0.75**0.9, 2 * 0.5**0.9, 2 * 0.25**0.9, 0, 0], rtol=1e-6)


@pytest.mark.parametrize('fields, word', [({'schedule': 'cosine'}, 'optimizer.schedule'),
                                          ({'warmup_steps': -1}, 'optimizer.warmup_steps'),
                                          ({'schedule': 'polynomial', 'polynomial_steps': 0}, 'optimizer.polynomial_steps')])
def test_wrong_fields_are_named(fields, word):
    with pytest.raises(ValueError, match=word):
        optimizer.make_schedule(section(**fields))


def test_first_moment_in_bfloat16_is_computed_with_in_float32():
    """0.1 g is rounded between the steps, and 0.9 of it is not; optax's own mu_dtype would take 0.8984 of it, 1.7e-3 less."""
    params, gradient = {'kernel': jnp.ones(4)}, {'kernel': jnp.full(4, 0.3)}
    fields = {'warmup_steps': 0, 'schedule': 'constant', 'learning_rate': 1.0, 'weight_decay': 0.0, 'clip_norm': 1e9}
    tx, _ = optimizer.make(section(**fields, first_moment_dtype='bfloat16'), params)
    _, state = tx.update(gradient, tx.init(params), params)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, gradient), state, params)
    assert sorted(str(leaf.dtype) for leaf in jax.tree.leaves(state) if leaf.ndim) == ['bfloat16', 'float32']
    assert int(optimizer.updates_done(state)) == 2
    kept = np.float64(np.asarray(0.03, np.float32).astype(jnp.bfloat16))
    deviation = np.sqrt(0.95 * 0.05 * 0.3**2 / (1 - 0.95**2))
    expected = -0.9 * kept / (1 - 0.9**2) / (deviation + 1e-6)
    np.testing.assert_allclose(updates['kernel'], np.full(4, expected), rtol=1e-5)
    with pytest.raises(ValueError, match="config.optimizer.first_moment_dtype is 'float16'"):
        optimizer.make(section(first_moment_dtype='float16'), params)


def adamw(p, gradients, scales, rate, wd, b1=0.9, b2=0.95, eps=1e-8):
    """The textbook loop in float64, with the clipping factor of every step given."""
    p, m, v = np.float64(p), 0.0, 0.0
    for i, (g, scale) in enumerate(zip(gradients, scales), 1):
        g = np.float64(g) * scale
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * (m / (1 - b1**i) / (np.sqrt(v / (1 - b2**i)) + eps) + wd * p)
    return p


def test_adamw_with_clipping_over_trained_entries_only(params):
    config = section(schedule='constant', learning_rate=0.1, warmup_steps=0, weight_decay=0.5, eps=1e-8)
    tx, _ = optimizer.make(config, params)
    keys = jax.random.split(jax.random.key(1), 3)
    gradients = [jax.tree.map(lambda p, k=k: jax.random.normal(k, p.shape), params) for k in keys]
    gradients[2] = jax.tree.map(lambda g: 0.01 * g, gradients[2])  # one step below the clipping norm
    state, after = tx.init(params), params
    for g in gradients:
        updates, state = tx.update(g, state, after)
        after = optax.apply_updates(after, updates)
    norms = [np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(g['layer']))) for g in gradients]
    assert norms[0] > 1 > norms[2]
    scales = [min(1.0, 1 / norm) for norm in norms]
    for name in ('kernel', 'bias'):
        expected = adamw(params['layer'][name], [g['layer'][name] for g in gradients], scales, 0.1, 0.5)
        np.testing.assert_allclose(after['layer'][name], expected, atol=1e-6)  # measured 1.2e-7
    np.testing.assert_array_equal(after['latent_mean'], params['latent_mean'])


def test_frozen_entries_have_no_state(params):
    tx, _ = optimizer.make(section(), params)
    state = tx.init(params)
    sizes = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert sizes == 2 * (4 * 3 + 3)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(state) if leaf.ndim)


def test_gradient_stops_at_frozen_entries(params):
    total = lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(optimizer.stop_frozen(p)))
    gradient = jax.grad(total)(params)
    assert not np.any(gradient['latent_mean']) and np.all(gradient['layer']['bias'])


def test_parameters_must_be_float32(params):
    params['layer']['bias'] = params['layer']['bias'].astype(jnp.bfloat16)
    with pytest.raises(ValueError, match='bias.*float32'):
        optimizer.make(section(), params)
