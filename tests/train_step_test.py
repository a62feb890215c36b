"""The golden training run of the official modules; masks, draws and metrics on a network small enough to see through."""
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from mmaudio_jax import ema
from mmaudio_jax import optimizer
from mmaudio_jax import train_step
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import mmaudio as weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.conftest import take_form_of_tpus
from tests.golden import synthetic_weights

GOLDEN_STEPS = 18
# Relative, on losses, gradient norms, first gradients by tensor and final parameters. Measured: 6.6e-6 (gradient norms).
GOLDEN_BOUND = 3e-5
B, N, V, S, T, C = 4, 30, 8, 24, 7, 8  # of the golden run


class Toy(nn.Module):
    """A velocity that adds up what it is given, so that a wrong mask shows in the loss; the interface of MMAudio."""
    latent_channels: int = 2
    clip_width: int = 3
    sync_width: int = 3
    text_width: int = 3
    text_length: int = 4

    def setup(self):
        constant = lambda name, shape, value: self.param(name, nn.initializers.constant(value), shape)
        self.latent_mean = constant('latent_mean', (1, 1, 2), 0.0)
        self.latent_std = constant('latent_std', (1, 1, 2), 1.0)
        self.empty_string_feat = constant('empty_string_feat', (4, 3), 300.0)
        self.empty_clip_feat = constant('empty_clip_feat', (1, 3), 100.0)
        self.empty_sync_feat = constant('empty_sync_feat', (1, 3), 200.0)
        self.scale = constant('scale', (), 1.0)

    def __call__(self, latents, t, clip, sync, text):
        conditions = sum(x.mean((1, 2)) for x in (clip, sync, text)) + t
        return self.scale * (latents + conditions[:, None, None])

    def empty_features(self, batch, clip_length, sync_length):
        return (jnp.broadcast_to(self.empty_clip_feat, (batch, clip_length, 3)),
                jnp.broadcast_to(self.empty_sync_feat, (batch, sync_length, 3)),
                jnp.broadcast_to(self.empty_string_feat, (batch, 4, 3)))

    def normalize(self, latents):
        return (latents - self.latent_mean) / self.latent_std


def toy_config(**flow):
    config = base.get_config()
    config.flow.update(flow)
    config.optimizer.update({'learning_rate': 1e-2, 'warmup_steps': 0, 'schedule': 'constant'})
    return config


def toy_state(config):
    statistics = (np.zeros(2, np.float32), np.ones(2, np.float32))
    return train_step.init_state(config, Toy(), Sequence('16k', 1.0), statistics, np.full((4, 3), 300.0, np.float32))


def toy_batch(size=4, seed=0, dtype=np.float16):
    rng = np.random.RandomState(seed)
    normal = lambda *shape: rng.standard_normal(shape).astype(dtype)
    return {
        'latent_mean': normal(size, 5, 2),
        'latent_std': np.abs(normal(size, 5, 2)),
        'clip_features': normal(size, 3, 3),
        'sync_features': normal(size, 8, 3),
        'text_features': normal(size, 4, 3),
        'video_exists': np.ones(size, bool),
        'text_exists': np.ones(size, bool),
    }


def quiet_draws(batch, **fields):
    """No noise, t = 1/2 and nothing dropped, but for `fields`."""
    shape = batch['latent_mean'].shape
    none, zeros = np.zeros(shape[:1], bool), np.zeros(shape, np.float32)
    defaults = {'posterior_noise': zeros, 'noise': zeros, 't': np.full(shape[:1], 0.5, np.float32)}
    return train_step.Draws(**{**defaults, 'drop_clip': none, 'drop_sync': none, 'drop_text': none, **fields})


def relative(ours, golden):
    """Largest difference over the golden value, element by element; a golden zero has to be met exactly."""
    ours, golden = np.asarray(ours, np.float64), np.asarray(golden, np.float64)
    zero = golden == 0
    assert np.all(ours[zero] == 0), ours[zero]
    return np.max(np.abs(ours - golden)[~zero] / np.abs(golden)[~zero])


def golden_model():
    return mmaudio.MMAudio(latent_channels=C, hidden_size=128, num_heads=2, joint_blocks=2, fused_blocks=1, version=1,
                           sync_fusion='modulate', rope='aligned', mlp='conv', dtype=jnp.float32, convolution='matmul',
                           remat='none', clip_width=32, sync_width=24, text_width=16, text_length=T)


def golden_inputs(step):
    """Batch and draws of one golden step (tests/golden: README of the goldens, row train_tiny)."""
    draw = lambda name, *shape: synthetic_weights.example_input(f'{name}{step}', shape)
    drop_video = np.array([step % 2 == 0, False, True, False])
    drop_text = np.array([False, step % 3 == 0, True, False])
    exists = np.ones(B, bool)
    batch = {
        'latent_mean': draw('mean', B, N, C),
        'latent_std': 0.1 * np.abs(draw('std', B, N, C)),
        'clip_features': draw('clip', B, V, 32),
        'sync_features': draw('sync', B, S, 24),
        'text_features': draw('text', B, T, 16),
        'video_exists': exists,
        'text_exists': exists,
    }
    t = 1 / (1 + np.exp(-draw('t', B)))
    return batch, train_step.Draws(draw('posterior_noise', B, N, C), draw('x0', B, N, C), t, drop_video, drop_video, drop_text)


def equations(jaxpr):
    """Every equation of a jaxpr, also of the inner ones."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from equations(inner)


def test_precision_of_a_step_in_bfloat16():
    """Products are bfloat16 but for the time embedding's; softmax, norms, loss, gradients and the update are float32."""
    config, model = base.get_config(), golden_model().clone(dtype=jnp.bfloat16)
    params = jax.eval_shape(lambda: official_tensors.params_of(weights, synthetic_weights.state_dict('train_tiny'), model))
    tx, schedule = optimizer.make(config.optimizer, params)
    make = lambda params: train_step.TrainState(jnp.int32(0), params, tx.init(params), ema.init(params, (0.05,)))
    step = lambda state, *inputs: train_step.step_with_draws(state, model, tx, schedule, 0.0, *inputs)
    traced, (state, metrics, (losses, gradients)) = jax.make_jaxpr(step, return_shape=True)(
        jax.eval_shape(make, params), *golden_inputs(0))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves((state, metrics, losses, gradients)))
    products, exact = [], {'exp': 0, 'rsqrt': 0, 'reduce_max': 0, 'cos': 0, 'sqrt': 0}
    for equation in equations(traced.jaxpr):
        name, operands = equation.primitive.name, [operand.aval for operand in equation.invars]
        if name == 'dot_general':
            products.append(operands)
        elif name in exact and (name != 'exp' or operands[0].ndim == 4):  # of the softmax: new versions of jax have one in SELU
            exact[name] += 1
            assert operands[0].dtype == jnp.float32, equation
    assert all(exact.values()) and len(products) > 100
    wide = [operands for operands in products if any(operand.dtype != jnp.bfloat16 for operand in operands)]
    # The time embedding's two products and the gradients of both matrices and of what is between them.
    assert sorted(sorted(operand.shape for operand in operands) for operands in wide) == [
        [(B, 128), (B, 128)], [(B, 128), (B, 256)], [(B, 128), (128, 128)], [(B, 128), (128, 128)], [(B, 256), (256, 128)]]


@pytest.mark.slow  # 30 s to 90 s, nearly all of it compilation
def test_golden_training_run():
    golden = np.load(GOLDEN / 'train_tiny.npz')
    model = golden_model()
    config = base.get_config()
    config.optimizer.update({'learning_rate': 1e-3, 'warmup_steps': 4, 'schedule_steps': (8, 10), 'weight_decay': 1e-2,
                             'eps': 1e-8})
    params = jax.tree.map(jnp.asarray, official_tensors.params_of(weights, synthetic_weights.state_dict('train_tiny'), model))
    tx, schedule = optimizer.make(config.optimizer, params)
    state = train_step.TrainState(jnp.int32(0), params, tx.init(params), ema.init(params, config.ema.sigma_rels))

    one_step = lambda state, *inputs: train_step.step_with_draws(state, model, tx, schedule, 0.0, *inputs)
    step = jax.jit(one_step, donate_argnums=0)

    seen = {'per_example_loss': [], 'loss': [], 'grad_norm': [], 'learning_rate': []}
    for i in range(GOLDEN_STEPS):
        state, metrics, (losses, gradients) = step(state, *golden_inputs(i))
        for name, value in {**metrics, 'per_example_loss': losses}.items():
            seen[name].append(value)
        if i == 0:
            first = weights.from_params(gradients, model)
    errors = {name: relative(values, golden[name]) for name, values in seen.items()}
    norms = [np.linalg.norm(first[name]) for name in golden['names']]
    errors['first_grad_norms'] = relative(norms, golden['first_grad_norms'])
    assert all(not first[name].any() for name in mmaudio.FROZEN)
    final = weights.from_params(state.params, model)
    assert set(final) == set(golden['final_names']) and int(state.step) == GOLDEN_STEPS
    norms = [np.linalg.norm(final[name]) for name in golden['final_names']]
    errors['final_param_norms'] = relative(norms, golden['final_param_norms'])
    assert max(errors.values()) < GOLDEN_BOUND, errors


def toy_loss(data, conditions):
    """Loss of one example under quiet_draws: velocity data / 2 + conditions + 1/2, target data."""
    return np.mean((conditions + 0.5 - 0.5 * data)**2)


@pytest.mark.parametrize('case, replaced', [
    ({}, ()),
    ({'video_exists': False}, ('clip_features', 'sync_features')),
    ({'text_exists': False}, ('text_features',)),
    ({'drop_clip': True}, ('clip_features',)),
    ({'drop_sync': True}, ('sync_features',)),
    ({'drop_text': True}, ('text_features',)),
    ({'video_exists': False, 'drop_text': True}, ('clip_features', 'sync_features', 'text_features')),
], ids=str)
@pytest.mark.parametrize('dtype', [np.float16, jnp.bfloat16])
def test_which_conditions_are_empty(case, replaced, dtype):
    batch = toy_batch(dtype=dtype)
    here = np.array([False, True, False, False])  # the case is that of example 1; the others keep everything
    drops = {name: here for name in case if name.startswith('drop_')}
    batch |= {name: ~here for name in case if name.endswith('_exists')}
    params = toy_state(toy_config()).params
    losses = train_step.per_example_loss(params, Toy(), 0.0, batch, quiet_draws(batch, **drops))
    empty = {'clip_features': 100.0, 'sync_features': 200.0, 'text_features': 300.0}
    for i in range(4):
        here_empty = replaced if i == 1 else ()
        conditions = sum(value if name in here_empty else np.float32(batch[name][i]).mean() for name, value in empty.items())
        np.testing.assert_allclose(losses[i], toy_loss(np.float32(batch['latent_mean'][i]), conditions), rtol=1e-5)


def test_latents_are_drawn_then_normalised():
    batch = toy_batch()
    statistics = (np.array([1.0, -2.0], np.float32), np.array([0.5, 3.0], np.float32))
    state = train_step.init_state(toy_config(), Toy(), Sequence('16k', 1.0), statistics, np.zeros((4, 3), np.float32))
    posterior_noise = np.random.RandomState(3).standard_normal(batch['latent_mean'].shape).astype(np.float32)
    losses = train_step.per_example_loss(state.params, Toy(), 0.0, batch, quiet_draws(batch, posterior_noise=posterior_noise))
    data = np.float32(batch['latent_mean']) + np.float32(batch['latent_std']) * posterior_noise
    data = (data - statistics[0]) / statistics[1]
    names = ('clip_features', 'sync_features', 'text_features')
    expected = [toy_loss(data[i], sum(np.float32(batch[name][i]).mean() for name in names)) for i in range(4)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize('independent', [False, True])
def test_condition_dropout(independent):
    config = toy_config(video_dropout=0.1, text_dropout=0.3, independent_video_dropout=independent)
    batch = {'latent_mean': np.zeros((20_000, 1, 1))}
    draws = train_step.sample_draws(jax.random.key(0), config, batch)
    rates = [float(jnp.mean(drop)) for drop in (draws.drop_clip, draws.drop_sync, draws.drop_text)]
    np.testing.assert_allclose(rates, [0.1, 0.1, 0.3], atol=0.01)
    both = float(jnp.mean(draws.drop_clip & draws.drop_sync))
    assert both == pytest.approx(0.01 if independent else rates[0], abs=0.004)
    assert float(jnp.mean(draws.drop_clip & draws.drop_text)) == pytest.approx(0.03, abs=0.005)


def test_draws_belong_to_the_key_and_to_the_name():
    batch = toy_batch()
    a, b, other = (train_step.sample_draws(jax.random.key(seed), toy_config(), batch) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.noise, b.noise)
    assert not np.any(a.noise == other.noise) and not np.any(a.noise == a.posterior_noise)
    assert a.t.shape == (4,) and np.all((a.t > 0) & (a.t < 1))


def test_step_moves_what_is_trained_and_is_repeatable():
    config = toy_config(video_dropout=1.0)  # every video dropped: its empty features get a gradient
    batch = toy_batch()
    state = toy_state(config)
    tx, schedule = optimizer.make(config.optimizer, state.params)
    step = jax.jit(train_step.make_train_step(config, Toy(), tx, schedule))
    first, metrics = step(state, batch)
    again, _ = step(state, batch)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert int(first.step) == 1 and int(first.ema.count) == 1
    assert set(metrics) == {'loss', 'grad_norm', 'learning_rate'}
    assert all(value.shape == () and value.dtype == jnp.float32 and np.isfinite(value) for value in metrics.values())
    for name, before in state.params.items():
        assert np.array_equal(before, first.params[name]) == (name in mmaudio.FROZEN), name
    jax.tree.map(np.testing.assert_array_equal, first.ema.averages[0], first.params)
    _, later = step(state.replace(step=jnp.int32(1)), batch)
    assert later['loss'] != metrics['loss']  # another step, other draws
    config.seed += 1
    _, other = jax.jit(train_step.make_train_step(config, Toy(), tx, schedule))(state, batch)
    assert other['loss'] != metrics['loss']  # another seed, other draws
    assert float(metrics['learning_rate']) == np.float32(1e-2)


def test_a_step_that_is_not_finite_is_left_out():
    """Parameters, moments and their place in the schedule stay, the step counts, and the averages see the same again."""
    config, batch = toy_config(), toy_batch()
    config.optimizer.warmup_steps = 10
    spoilt = {**batch, 'latent_mean': batch['latent_mean'].copy()}
    spoilt['latent_mean'][2, 0, 0] = np.nan
    state = toy_state(config)
    step = jax.jit(train_step.make_train_step(config, Toy(), *optimizer.make(config.optimizer, state.params)))
    before, metrics = step(state, batch)
    after, bad = step(before, spoilt)
    assert not np.isfinite(bad['loss']) and not np.isfinite(bad['grad_norm'])
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))
    assert (int(after.step), int(after.ema.count), int(optimizer.updates_done(after.opt_state))) == (2, 2, 1)
    jax.tree.map(lambda average: np.testing.assert_array_equal(np.isfinite(average), True), after.ema.averages)
    third, good = step(after, batch)
    assert good['learning_rate'] == bad['learning_rate'] > metrics['learning_rate'] and np.isfinite(good['loss'])
    assert int(optimizer.updates_done(third.opt_state)) == 2 and int(third.step) == 3


@jax.custom_vjp
def _overflowing(array):
    """Itself, with an infinite gradient."""
    return array


_overflowing.defvjp(lambda array: (array, None), lambda _, gradient: (gradient * jnp.inf,))


class Overflowing(Toy):
    def __call__(self, *args):
        return _overflowing(super().__call__(*args))


@pytest.mark.parametrize('tpu', [False, True])
def test_an_overflow_of_the_gradient_alone_is_left_out(monkeypatch, tpu):
    if tpu:
        take_form_of_tpus(monkeypatch)
    config = toy_config()
    state = toy_state(config)
    step = jax.jit(train_step.make_train_step(config, Overflowing(), *optimizer.make(config.optimizer, state.params)))
    after, metrics = step(state, toy_batch())
    assert np.isfinite(metrics['loss']) and not np.isfinite(metrics['grad_norm'])
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (state.params, state.opt_state))


def test_fields_of_the_config_reach_the_step():
    config, batch = toy_config(), toy_batch()
    config.flow.min_sigma = 0.3
    state = toy_state(config)
    made = optimizer.make(config.optimizer, state.params)
    _, metrics = jax.jit(train_step.make_train_step(config, Toy(), *made))(state, batch)
    draws = train_step.sample_draws(jax.random.fold_in(jax.random.key(config.seed), 0), config, batch)
    x1 = batch['latent_mean'].astype(np.float32) + batch['latent_std'].astype(np.float32) * draws.posterior_noise
    t = draws.t[:, None, None]
    x_t = (1 - (1 - 0.3) * t) * draws.noise + t * x1
    read = lambda name, empty, drop: np.where(drop, empty, batch[name].astype(np.float32).mean((1, 2)))
    velocity = x_t + (read('clip_features', 100.0, draws.drop_clip) + read('sync_features', 200.0, draws.drop_sync) +
                      read('text_features', 300.0, draws.drop_text) + draws.t)[:, None, None]
    expected = np.mean(np.square(velocity - (x1 - (1 - 0.3) * draws.noise)))
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
    other = toy_config()
    other.seed += 1
    _, changed = jax.jit(train_step.make_train_step(other, Toy(), *made))(state, batch)
    assert changed['loss'] != metrics['loss']
    config.train.microbatches = 2
    text = str(jax.make_jaxpr(train_step.make_train_step(config, Toy(), *made))(state, batch))
    assert 'scan[' in text


def test_draws_of_a_step_are_independent():
    config, batch = toy_config(), toy_batch(64)
    draws = train_step.sample_draws(jax.random.key(0), config, batch)
    logits = np.log(draws.t) - np.log1p(-draws.t)
    noise, posterior_noise = np.ravel(draws.noise), np.ravel(draws.posterior_noise)
    # A key gives the same numbers first, however many are asked for.
    for first, second in ((noise, posterior_noise), (logits, noise[:64]), (logits, posterior_noise[:64])):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.4


@pytest.mark.parametrize('microbatches', [2, 4])
def test_microbatches_give_the_mean_over_the_batch(microbatches):
    config, batch = toy_config(video_dropout=0.5), toy_batch(8)
    params = {**toy_state(config).params, 'scale': jnp.float32(0.7)}
    draws = train_step.sample_draws(jax.random.key(3), config, batch)
    whole = train_step.loss_and_gradients(params, Toy(), 0.0, batch, draws, 1)
    parts = train_step.loss_and_gradients(params, Toy(), 0.0, batch, draws, microbatches)
    np.testing.assert_allclose(parts[1], whole[1], rtol=1e-6)  # in the order of the rows
    jax.tree.map(lambda ours, expected: np.testing.assert_allclose(ours, expected, rtol=2e-6), parts, whole)


def test_features_of_a_missing_video_are_not_read():
    config, batch = toy_config(), toy_batch()
    batch['video_exists'][:] = False
    batch['clip_features'][:] = np.nan
    state = toy_state(config)
    _, metrics = train_step.make_train_step(config, Toy(), *optimizer.make(config.optimizer, state.params))(state, batch)
    assert np.isfinite(metrics['loss']) and np.isfinite(metrics['grad_norm'])


def test_validation_loss_belongs_to_the_example():
    config, batch = toy_config(video_dropout=1.0, text_dropout=1.0), toy_batch()  # dropout must not act here
    params = toy_state(config).params
    validate = train_step.make_validation_step(config, Toy())
    whole = validate(params, batch, jnp.arange(4))
    order = np.array([2, 0])
    part = validate(params, {name: value[order] for name, value in batch.items()}, jnp.asarray(order))
    np.testing.assert_allclose(part, whole[order], rtol=1e-6)
    assert np.all(whole < 20)  # with an empty condition, 100 and more, it would be above 1 000
    same = {name: np.repeat(value[:1], 4, axis=0) for name, value in batch.items()}
    assert len(set(np.asarray(validate(params, same, jnp.arange(4))).tolist())) == 4


def test_state_can_be_made_abstractly():
    abstract = jax.eval_shape(lambda: toy_state(toy_config()))
    state = toy_state(toy_config())
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    np.testing.assert_array_equal(state.params['empty_string_feat'], np.full((4, 3), 300.0))


@pytest.mark.parametrize('mean, std, text, word', [
    (np.zeros(3), np.ones(3), np.zeros((4, 3)), 'latent_mean has shape'),
    (np.zeros(2), np.zeros(2), np.zeros((4, 3)), 'latent_std has a channel without spread'),
    (np.full(2, np.nan), np.ones(2), np.zeros((4, 3)), 'latent_mean is not finite'),
    (np.zeros(2), np.ones(2), np.zeros((3, 4)), 'empty_string_feat has shape'),
])
def test_wrong_constants_are_named(mean, std, text, word):
    with pytest.raises(ValueError, match=word):
        train_step.init_state(toy_config(), Toy(), Sequence('16k', 1.0), (mean, std), text)


def test_only_tpus_are_told_how_to_compile():
    v5e, v5p = (types.SimpleNamespace(platform='tpu', device_kind=kind) for kind in ('TPU v5 lite', 'TPU v5'))
    config = base.get_config()
    given = dict(config.train.compiler_options)
    assert train_step.compiler_options(config, jax.devices('cpu')[0]) is None
    assert train_step.compiler_options(config, v5e) == train_step.compiler_options(config, v5p) == given
    config.train.async_gradients = True
    assert train_step.compiler_options(config, v5e) == train_step.ASYNC_GRADIENTS | given
    assert train_step.compiler_options(config, v5p) == train_step.ASYNC_GRADIENTS_SPARSE | given
    with pytest.raises(ValueError, match="config.train.async_gradients has no options for 'TPU v4'"):
        train_step.compiler_options(config, types.SimpleNamespace(platform='tpu', device_kind='TPU v4'))
    config.train.compiler_options += (('xla_tpu_scoped_vmem_limit_kib', '32768'),)
    assert train_step.compiler_options(config, v5e)['xla_tpu_scoped_vmem_limit_kib'] == '32768'
