"""The solvers against closed forms, guidance against its algebra, seeds against their batch, the mesh against one device."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import partitioning
from mmaudio_jax import sampler
from mmaudio_jax.models import mmaudio

N, V, S, T = 10, 4, 8, 3
EULER = sampler.SamplerSettings(solver='euler', num_steps=3, guidance=4.5)


@pytest.fixture(scope='module')
def network():
    """A small network, none of its parameters zero, smooth enough that rounding does not grow; features for eight examples."""
    model = mmaudio.MMAudio(latent_channels=2, hidden_size=16, num_heads=1, joint_blocks=1, fused_blocks=0, version=1,
                            sync_fusion='modulate', rope='aligned', mlp='linear', dtype=jnp.float32, convolution='matmul',
                            remat='none', clip_width=3, sync_width=5, text_width=6, text_length=T)
    features = tuple(np.random.RandomState(0).standard_normal((8, length, width)).astype(np.float32)
                     for length, width in ((V, 3), (S, 5), (T, 6), (T, 6)))
    latents = sampler.noise(0, range(8), N, 2)
    shapes = jax.eval_shape(model.init, jax.random.key(0), latents, jnp.zeros(8), *features[:3])['params']
    random = np.random.RandomState(1)
    params = jax.tree.map(lambda leaf: (0.1 * random.standard_normal(leaf.shape)).astype(np.float32), shapes)
    params['latent_std'] = 1 + np.abs(params['latent_std'])
    return model, params, latents, features


@functools.partial(jax.jit, static_argnums=0)
def velocity(model, params, latents, t, features):
    return model.apply({'params': params}, latents, jnp.full(len(latents), t, jnp.float32), *features)


def assert_near(result, expected, bound):
    """Largest error over the deviation of what is expected."""
    error = np.abs(np.asarray(result) - expected).max() / np.std(expected)
    assert error < bound, f'error {error:.2g} of the deviation'


@pytest.mark.parametrize('schedule', sampler.SCHEDULES)
@pytest.mark.parametrize('solver, order', [('euler', 1), ('midpoint', 2), ('heun', 2)])
def test_order(solver, order, schedule):
    """dx/dt = x (1 + t), x(1) = x(0) e^1.5: halving the step divides the error by 2^order."""
    errors = []
    for steps in (32, 64):
        settings = sampler.SamplerSettings(solver=solver, num_steps=steps, guidance=1.0, schedule=schedule)
        result = sampler.integrate(lambda x, t: x * (1 + t), jnp.ones((1, 1, 1)), settings)
        errors.append(abs(float(result.squeeze()) - np.exp(1.5)))
    np.testing.assert_allclose(np.log2(errors[0] / errors[1]), order, atol=0.1)  # measured below: 0.04, 0.04, 0.04


def test_schedules_run_from_noise_to_data():
    np.testing.assert_allclose(sampler.edges('uniform', 4), [0, 0.25, 0.5, 0.75, 1])
    # torch.linspace(0, 1, 26), where it is not what NumPy's float64 rounds to
    assert sampler.edges('uniform', 25)[[5, 9, 10, 21]].tolist() == [
        0.19999998807907104, 0.35999998450279236, 0.3999999761581421, 0.8400000333786011]
    np.testing.assert_allclose(sampler.edges('quadratic', 4), [0, 1 / 16, 1 / 4, 9 / 16, 1])
    np.testing.assert_allclose(sampler.edges('cosine', 4), [0, 0.1464466, 0.5, 0.8535534, 1], rtol=1e-6)


def test_heun_is_the_formula():
    settings = sampler.SamplerSettings(solver='heun', num_steps=1, guidance=1.0)
    result = sampler.integrate(lambda x, t: x * (1 + t), jnp.full((1, 1, 1), 2.0), settings)
    np.testing.assert_allclose(result, 2 + (2 + (2 + 2) * 2) / 2)


def test_decoding_is_part_of_the_program(network):
    """Latents stay on the device: one program from features to what the decoder makes of them."""
    model, params, latents, features = network
    decode = lambda gain, x: gain * jnp.tanh(x.sum(-1))
    gain = jnp.float32(2)
    sample = sampler.make_sampler(model, EULER, decode=decode)
    expected = sampler.make_sampler(model, EULER)(params, latents, *features)
    for result, wanted in zip(sample(params, latents, *features, gain), (expected, decode(gain, expected)), strict=True):
        assert_near(result, wanted, 1e-5)  # measured: below 1e-6
    text = sample.lower(params, latents, *features, gain).compile().as_text()
    assert 'tanh' in text and not any(word in text for word in ('callback', 'infeed', 'outfeed', 'host-transfer'))


def test_adaptive_solver_gives_up(monkeypatch):
    monkeypatch.setattr(sampler, 'DOPRI5_MAX_STEPS', 1)
    settings = sampler.SamplerSettings(solver='dopri5', num_steps=4, guidance=1.0)
    assert np.isnan(sampler.integrate_adaptive(lambda x, t: x * (1 + t), jnp.ones((1, 1, 1)), settings)).all()


@pytest.mark.parametrize('broken', ['from the start', 'later', 'infinite', 'growing'])
def test_adaptive_solver_ends_soon_when_the_velocity_is_not_finite(broken):
    """And its neighbours in the batch are as they are alone."""
    calls = []
    velocities = {'from the start': lambda x, t: x * jnp.nan, 'later': lambda x, t: jnp.where(t > 0.5, jnp.nan, x),
                  'infinite': lambda x, t: x * jnp.inf, 'growing': lambda x, t: 1e30 * x}

    def velocity_of(one, x, t):
        jax.debug.callback(lambda _: calls.append(1), t)
        return jnp.where(one, velocities[broken](x, t), x)

    settings = sampler.SamplerSettings(solver='dopri5', num_steps=4, guidance=1.0)
    run = jax.jit(jax.vmap(lambda x, one: sampler.integrate_adaptive(lambda *a: velocity_of(one, *a), x[None], settings)[0]))
    result = run(jnp.ones((2, 3, 4)), jnp.array([True, False]))
    assert np.isnan(result[0]).all()
    np.testing.assert_allclose(result[1], np.e, rtol=1e-4)
    jax.effects_barrier()
    assert len(calls) < 700  # of two examples; it were 4096 steps of 6 evaluations each


def test_a_solver_that_finds_its_own_steps_takes_no_schedule():
    with pytest.raises(ValueError, match="config.sampling.schedule is 'cosine', but 'dopri5' chooses its steps itself"):
        dataclasses.replace(EULER, solver='dopri5', schedule='cosine')


def test_adaptive_solver():
    settings = sampler.SamplerSettings(solver='dopri5', num_steps=4, guidance=1.0)
    result = sampler.integrate_adaptive(lambda x, t: x * (1 + t), jnp.ones((1, 1, 1)), settings)
    np.testing.assert_allclose(result.squeeze(), np.exp(1.5), rtol=1e-4)  # measured 3.8e-5


def test_two_euler_steps_with_guidance_are_the_formula(network):
    model, params, latents, features = network
    settings = sampler.SamplerSettings(solver='euler', num_steps=2, guidance=3.0)
    empty = (*model.apply({'params': params}, 8, V, S, method='empty_features')[:2], features[3])
    x = latents
    for t in (0.0, 0.5):
        x = x + 0.5 * (3.0 * velocity(model, params, x, t, features[:3]) - 2.0 * velocity(model, params, x, t, empty))
    expected = x * params['latent_std'] + params['latent_mean']
    result = sampler.make_sampler(model, settings)(params, latents, *features)
    assert_near(result, expected, 2e-5)  # measured 1.2e-6


@pytest.mark.parametrize('guidance', [0.5, 1.0])
def test_weak_guidance_is_the_condition_alone(network, guidance):
    model, params, latents, features = network
    settings = sampler.SamplerSettings(solver='euler', num_steps=1, guidance=guidance)
    expected = (latents + velocity(model, params, latents, 0.0, features[:3])) * params['latent_std'] + params['latent_mean']
    result = sampler.make_sampler(model, settings)(params, latents, *features)
    assert_near(result, expected, 2e-5)  # measured 3.4e-7


def test_no_negative_text_is_the_empty_string(network):
    model, params, latents, features = network
    sample = sampler.make_sampler(model, EULER)
    empty_string = np.broadcast_to(params['empty_string_feat'], features[3].shape)
    np.testing.assert_array_equal(sample(params, latents, *features[:3], None),
                                  sample(params, latents, *features[:3], empty_string))
    assert np.abs(sample(params, latents, *features) - sample(params, latents, *features[:3], None)).max() > 0.01


@pytest.mark.parametrize('solver, num_steps, accuracy, bound', [('midpoint', 20, 5e-3, 1e-5), ('dopri5', 10, 1e-3, 1e-3)])
def test_solvers_agree_and_do_not_mix_examples(network, solver, num_steps, accuracy, bound, monkeypatch):
    """A solver nears fine Euler steps; an example's result does not depend on its batch (adaptive: but for the tolerance)."""
    monkeypatch.setattr(sampler, 'DOPRI5_TOLERANCE', 1e-6)  # at its own 1e-4 it ends 5e-3 off on this network
    model, params, latents, features = network
    sample = sampler.make_sampler(model, sampler.SamplerSettings(solver=solver, num_steps=num_steps, guidance=2.0))
    fine = sampler.make_sampler(model, sampler.SamplerSettings(solver='euler', num_steps=2000, guidance=2.0))
    expected = fine(params, latents, *features)
    result = sample(params, latents, *features)
    assert_near(result, expected, accuracy)  # measured 1.2e-3, 1.9e-3
    part = sample(params, latents[2:4], *(feature[2:4] for feature in features))
    assert_near(part, result[2:4], bound)  # measured 0, 0


def test_noise_depends_on_seed_and_index_alone():
    np.testing.assert_array_equal(sampler.noise(3, [5, 1], N, 2)[1], sampler.noise(3, [0, 4, 1], N, 2)[2])
    assert np.abs(sampler.noise(3, [1], N, 2) - sampler.noise(4, [1], N, 2)).max() > 0.1
    many = sampler.noise(0, range(100), 50, 4)
    assert abs(float(many.mean())) < 0.03 and abs(float(many.std()) - 1) < 0.03  # 20 000 values: 4 deviations of their mean


@pytest.mark.parametrize('solver', ['euler', pytest.param('dopri5', marks=pytest.mark.slow)])
def test_mesh_gives_the_same(network, solver):
    model, params, latents, features = network
    settings = dataclasses.replace(EULER, solver=solver)
    mesh = partitioning.make_mesh({'data': -1})
    sample = sampler.make_sampler(model, settings, mesh)
    expected = sampler.make_sampler(model, settings)(params, latents, *features)
    result = sample(params, latents, *features)
    assert len(result.sharding.device_set) == jax.device_count()
    assert_near(result, expected, 1e-5)  # measured 1.1e-6, 1.6e-6
    if jax.device_count() > 1:
        with pytest.raises(ValueError, match='batch of 3 cannot be split'):
            sample(params, latents[:3], *(feature[:3] for feature in features))


@pytest.mark.parametrize('field, value, message', [('solver', 'rk4', 'sampling.solver'),
                                                   ('schedule', 'linear', 'sampling.schedule'),
                                                   ('num_steps', 0, 'sampling.num_steps'),
                                                   ('num_steps', 2.5, 'config.sampling.num_steps is 2.5; it must be a whole'),
                                                   ('guidance', float('nan'), 'sampling.guidance is nan'),
                                                   ('guidance', '4', 'config.sampling.guidance is .4.; it must be a number')])
def test_settings_are_checked(field, value, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(EULER, **{field: value})
