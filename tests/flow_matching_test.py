"""The path runs from noise to data, the target is its derivative, losses are per example."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import flow_matching


@pytest.fixture(name='ends')
def fixture_ends():
    noise, data = jax.random.normal(jax.random.key(0), (2, 3, 5, 4))
    return noise, data


@pytest.mark.parametrize('min_sigma', [0.0, 0.1])
def test_path_starts_at_noise_and_ends_at_data(ends, min_sigma):
    noise, data = ends
    start = flow_matching.interpolate(noise, data, jnp.zeros(3), min_sigma)
    end = flow_matching.interpolate(noise, data, jnp.ones(3), min_sigma)
    np.testing.assert_allclose(start, noise, atol=1e-6)
    np.testing.assert_allclose(end, data + min_sigma * noise, atol=1e-6)


@pytest.mark.parametrize('min_sigma', [0.0, 0.1])
def test_target_is_the_derivative_of_the_path(ends, min_sigma):
    noise, data = ends
    t = jnp.array([0.1, 0.5, 0.9])
    _, derivative = jax.jvp(lambda t: flow_matching.interpolate(noise, data, t, min_sigma), (t,), (jnp.ones(3),))
    np.testing.assert_allclose(derivative, flow_matching.target(noise, data, min_sigma), atol=1e-6)


def test_following_the_target_forwards_leads_to_the_data(ends):
    noise, data = ends
    x = noise
    for _ in range(10):
        x += flow_matching.target(noise, data, 0.0) / 10
    np.testing.assert_allclose(x, data, atol=1e-5)


def test_every_example_has_its_own_time_and_loss(ends):
    noise, data = ends
    x = flow_matching.interpolate(noise, data, jnp.array([0.0, 1.0, 0.0]), 0.0)
    losses = flow_matching.loss(x, noise)
    assert losses.shape == (3,) and losses.dtype == jnp.float32
    np.testing.assert_allclose(losses, [0, jnp.mean((data[1] - noise[1])**2), 0], rtol=1e-6)


def test_loss_is_taken_in_float32():
    big = jnp.full((1, 64, 4), 300.0, jnp.float16)  # its square overflows float16
    np.testing.assert_allclose(flow_matching.loss(big, jnp.zeros_like(big)), [90_000.0])


def test_times_are_logit_normal():
    t = np.asarray(flow_matching.sample_times(jax.random.key(1), 20_000))
    assert t.min() > 0 and t.max() < 1
    logits = np.log(t / (1 - t))
    assert abs(logits.mean()) < 0.03 and abs(logits.std() - 1) < 0.03
