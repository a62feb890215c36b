"""The flow network: parity with the official modules at full size, published sizes, ablations, precision and remat."""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmaudio_jax import partitioning
from mmaudio_jax import sampler
from mmaudio_jax.models import layers
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import mmaudio as weights
from tests import official_tensors
from tests.conftest import GOLDEN
from tests.conftest import QUICK
from tests.golden import synthetic_weights

FIELDS = {'sync_fusion': 'modulate', 'rope': 'aligned', 'mlp': 'conv', 'dtype': 'float32', 'convolution': 'matmul',
          'remat': 'none'}
# Largest error over the golden's standard deviation: the bound, what was measured (flow, Euler result).
BOUNDS = {
    'small_16k': (1e-4, 5e-4),  # 2.5e-5, 4.8e-5; at 5.3 s 3.2e-5, 5.2e-5
    'small_44k': (1e-4, 5e-4),  # 3.0e-5, 6.1e-5
    'large_44k_v2': (5e-4, 5e-4),  # 1.6e-4, 1.1e-4
}
PARITY = [('small_16k_8s', 'matmul'), ('small_16k_8s', 'winograd'), ('small_16k_5.3s', 'matmul'), ('small_44k_8s', 'matmul'),
          ('small_44k_8s', 'winograd')]  # those of one variant after each other: they share its weights
LARGE = pytest.param('large_44k_v2_8s', 'matmul', marks=pytest.mark.slow)


def build(variant: str, **fields) -> mmaudio.MMAudio:
    rate = variant.split('_')[1]
    return mmaudio.build({'variant': variant, **FIELDS, **fields}, Sequence(rate, 8.0))


def error(result, expected) -> float:
    return float(np.abs(np.asarray(result) - expected).max() / expected.std())


@functools.lru_cache(maxsize=1)
def params_of(variant: str):
    """The synthetic weights, through the importer."""
    tensors = synthetic_weights.state_dict(f'mmaudio_{variant}')
    return jax.device_put(official_tensors.params_of(weights, tensors, build(variant)))


@pytest.mark.parametrize('name, convolution', [*PARITY, LARGE])
def test_parity_with_the_official_network(name, convolution):
    golden = np.load(GOLDEN / f'net_{name}.npz')
    variant, _ = name.rsplit('_', 1)
    model, params = build(variant, convolution=convolution), params_of(variant)
    length, frames, tokens = (int(golden[k]) for k in ('latent_seq_len', 'clip_seq_len', 'sync_seq_len'))
    shapes = {'clip': (2, frames, 1024), 'sync': (2, tokens, 768), 'text': (2, 77, 1024), 'negative_text': (2, 77, 1024),
              'x0': (2, length, model.latent_channels)}
    inputs = {key: synthetic_weights.example_input(key, shape) for key, shape in shapes.items()}
    features = [inputs[key] for key in ('clip', 'sync', 'text')]

    @jax.jit
    def conditions_of(params, *features):
        return model.apply({'params': params}, *features, length, method='preprocess_conditions')

    @jax.jit
    def velocity(params, conditions):
        return model.apply({'params': params}, inputs['x0'], golden['t'], conditions, method='velocity')

    conditions = conditions_of(params, *features)
    empty = conditions_of(params, *model.apply({'params': params}, 2, frames, tokens, method='empty_features'))
    means = {'clip_f_mean': conditions.clip.mean(1), 'sync_f_mean': conditions.sync.mean(1),
             'text_f_mean': conditions.text.mean(1), 'clip_f_c': conditions.clip_global, 'text_f_c': conditions.text_global}
    flow_bound, euler_bound = BOUNDS[variant]
    errors = {key: error(value, golden[key]) for key, value in means.items()}
    errors['flow'] = error(velocity(params, conditions), golden['flow'])
    errors['flow_empty'] = error(velocity(params, empty), golden['flow_empty'])
    if convolution == 'matmul':  # the sampler knows nothing of it
        settings = sampler.SamplerSettings('euler', int(golden['num_steps']), float(golden['cfg_strength']))
        sample = sampler.make_sampler(model, settings)
        x1 = sample(params, inputs['x0'], *features, np.broadcast_to(params['empty_string_feat'], (2, 77, 1024)))
        errors['x1_unnormalized'] = error(x1, golden['x1_unnormalized'])
        errors['x1'] = error((x1 - params['latent_mean']) / params['latent_std'], golden['x1'])
        negative = sample(params, inputs['x0'], *features, inputs['negative_text'])
        negative = (negative - params['latent_mean']) / params['latent_std']
        errors['x1_negative'] = error(negative, golden['x1_negative'])
    print(name, {key: f'{value:.1e}' for key, value in errors.items()})
    for key, value in errors.items():
        assert value < (euler_bound if key.startswith('x1') else flow_bound), f'{key}: {value:.2g}'


@pytest.mark.parametrize('variant, millions', [('small_16k', 157.28), ('small_44k', 157.41), ('medium_44k', 621.81),
                                               ('large_44k', 1030.00), ('large_44k_v2', 1030.58)])
def test_published_sizes(variant, millions):
    manifest = json.loads((GOLDEN / 'manifests' / f'mmaudio_{variant}.json').read_text())
    count = sum(np.prod(shape) for shape in weights.shapes(build(variant)).values())
    assert count == manifest['parameters']
    assert round(count / 1e6, 2) == millions


def test_sync_upsampling_rounds_as_the_official_code():
    """192 → 345: exact arithmetic would pick the next token at latents 57 and 172, where the tie rounds down in float32."""
    indices = mmaudio.upsampling_indices(192, 345)
    exact = (2 * np.arange(345) + 1) * 192 // (2 * 345)
    assert np.flatnonzero(indices != exact).tolist() == [57, 172]
    assert (indices[[57, 172]] == exact[[57, 172]] - 1).all()
    assert mmaudio.upsampling_indices(88, 125)[[0, 124]].tolist() == [0, 87]


TINY = {'hidden_size': 64, 'num_heads': 2, 'joint_blocks': 2, 'fused_blocks': 1}


@functools.cache
def tiny_features(batch: int = 2):
    shapes = {'x0': (batch, 25, 20), 'clip': (batch, 6, 1024), 'sync': (batch, 16, 768), 'text': (batch, 77, 1024)}
    return {key: synthetic_weights.example_input(key, shape) for key, shape in shapes.items()}


def tiny_program(**fields):
    """A tiny network's apply with its inputs: fn(variables), and the shapes of the variables."""
    model = build('small_16k', **{**TINY, **fields})
    features = tiny_features()
    inputs = (features['x0'], jnp.array([0.2, 0.7]), features['clip'], features['sync'], features['text'])
    return lambda variables: model.apply(variables, *inputs), jax.eval_shape(model.init, jax.random.key(0), *inputs)


@functools.cache
def tiny_velocity(**fields):
    """Velocity of a tiny network whose parameters are all random, and the gradient of its mean square."""
    program, shapes = tiny_program(**fields)
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: (0.1 * random.standard_normal(leaf.shape)).astype(np.float32), shapes['params'])

    def mean_square(params):
        velocity = program({'params': params})
        return jnp.mean(jnp.square(velocity)), velocity

    gradient, velocity = jax.jit(jax.grad(mean_square, has_aux=True), compiler_options=QUICK)(params)
    return velocity, gradient


def assert_changes_no_number(fields, **changes):
    """The tiny network with and without `changes`: velocity and gradient."""
    velocity, gradient = tiny_velocity(**fields)
    other, other_gradient = tiny_velocity(**fields, **changes)
    np.testing.assert_allclose(other, velocity, atol=1e-6)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(other_gradient), strict=True):
        np.testing.assert_allclose(two, one, atol=2e-5 * max(1e-3, float(np.abs(one).max())))


@pytest.mark.parametrize('remat', ['blocks', 'dots'])
def test_remat_changes_memory_and_not_the_gradient(remat):
    assert_changes_no_number({}, remat=remat)
    program, shapes = tiny_program(remat=remat)
    assert 'remat' in str(jax.make_jaxpr(program)(shapes))  # it is really on


def test_dots_keeps_the_products_that_blocks_computes_again():
    products = {}
    for remat in ('none', 'blocks', 'dots'):
        program, shapes = tiny_program(remat=remat)
        gradient = jax.grad(lambda variables, program=program: jnp.square(program(variables)).sum())
        products[remat] = jax.jit(gradient).lower(shapes).as_text('hlo').count(' dot(')
    assert products['none'] < products['dots'] < products['blocks'], products


def test_a_new_network_gives_nothing_yet():
    """adaLN-zero: modulation and the last convolution begin at zero, the matrices of the time embedding small."""
    model = build('small_16k', hidden_size=32, num_heads=2, joint_blocks=2, fused_blocks=1)
    inputs = [jax.random.normal(jax.random.key(n), shape) for n, shape in enumerate(
        ((1, 250, 20), (1,), (1, 64, 1024), (1, 192, 768), (1, 77, 1024)))]
    params = jax.jit(model.init)(jax.random.key(9), *inputs)['params']
    assert not np.any(model.apply({'params': params}, *inputs))
    leaves = {partitioning.tensor_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    zero = {name for name, leaf in leaves.items() if not np.any(leaf)}
    assert {name for name in leaves if '/modulation/' in name or name.startswith('final_layer/')} <= zero
    assert {'empty_clip_feat', 'empty_sync_feat', 'sync_pos_emb'} <= zero and 'joint/latents/qkv/kernel' not in zero
    for part in ('first', 'second'):
        np.testing.assert_allclose(np.std(params['t_embed'][part]['kernel']), 0.02, rtol=0.1)


def test_layers_without_a_loop_compute_the_same():
    fields = {'remat': 'dots', 'joint_blocks': 3, 'fused_blocks': 2}
    assert_changes_no_number(fields, scan_layers=False)
    for scan_layers in (True, False):
        program, shapes = tiny_program(**fields, scan_layers=scan_layers)
        assert (' while(' in jax.jit(program).lower(shapes).as_text('hlo')) == scan_layers


def test_bfloat16_computes_near_float32_with_float32_parameters():
    velocity, _ = tiny_velocity()
    rounded, gradient = tiny_velocity(dtype='bfloat16')
    assert rounded.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(gradient)} == {jnp.dtype('float32')}
    assert 1e-4 < error(rounded, np.asarray(velocity)) < 0.2


@pytest.mark.parametrize('fields', [{'sync_fusion': 'sum_with_visual'}, {'sync_fusion': 'none'}, {'rope': 'unaligned'},
                                    {'rope': 'none'}, {'mlp': 'linear'}, {'version': 2}, {'joint_blocks': 1}],
                         ids=str)
def test_ablations_are_other_networks(fields):
    velocity, _ = tiny_velocity()
    other, gradient = tiny_velocity(**fields)
    assert other.shape == velocity.shape and np.isfinite(other).all()
    assert error(other, np.asarray(velocity)) > 3e-4  # the least, rope unaligned or none: 1.2e-3
    unused = {'latent_mean', 'latent_std', 'empty_string_feat', 'empty_clip_feat', 'empty_sync_feat'}
    for name, leaf in gradient.items():
        assert name in unused or any(float(np.abs(part).max()) > 0 for part in jax.tree.leaves(leaf)), f'{name} has no effect'


def test_sum_with_visual_is_the_sum_at_the_times_of_the_sync_tokens():
    model, features = build('small_16k', **TINY, sync_fusion='sum_with_visual'), tiny_features()
    inputs = [features[name] for name in ('clip', 'sync', 'text')]
    shapes = jax.eval_shape(model.init, jax.random.key(0), features['x0'], jnp.zeros(2), *inputs)['params']
    random = np.random.RandomState(0)
    params = jax.tree.map(lambda leaf: (0.1 * random.standard_normal(leaf.shape)).astype(np.float32), shapes)
    bound = model.bind({'params': params})
    conditions = bound.preprocess_conditions(*inputs, 25)
    clip = bound.clip_input_proj(features['clip'])
    tokens = bound.sync_input_proj(features['sync'] + jnp.tile(bound.sync_pos_emb[0], (1, 2, 1)))
    at = [0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 5, 5]  # of 6 frames, the one shown in the middle of each of 16 tokens
    np.testing.assert_allclose(conditions.clip, clip[:, np.array(at)] + tokens, atol=1e-5)
    assert not np.any(conditions.sync)


@pytest.mark.parametrize('rope, scales', [('aligned', [1.0, 25 / 6]), ('unaligned', [1.0, 1.0]), ('none', [])])
def test_angles_of_frames(rope, scales, monkeypatch):
    asked, rotation = [], layers.rotation
    monkeypatch.setattr(layers, 'rotation', lambda *args: asked.append(args) or rotation(*args))
    model, features = build('small_16k', **TINY, rope=rope), tiny_features()
    inputs = (features['x0'], jnp.zeros(2), features['clip'], features['sync'], features['text'])
    jax.eval_shape(model.init, jax.random.key(0), *inputs)
    assert asked == [(length, 32, scale) for length, scale in zip((25, 6), scales)]


@pytest.mark.parametrize('fields, message', [({'rope': 'allinged'}, 'rope'), ({'joint_blocks': 0}, 'joint_blocks'),
                                             ({'num_heads': 5}, 'num_heads'),
                                             ({'variant': 'small_44k'}, 'channels.* choose one of small_16k$'),
                                             ({'variant': 'huge'}, 'huge'), ({'dtype': 'floaty'}, "model.dtype is 'floaty'"),
                                             ({'dtype': 'float16'}, 'must be one of')])
def test_impossible_networks_are_refused(fields, message):
    features = tiny_features()
    with pytest.raises(ValueError, match=message):
        model = mmaudio.build({'variant': 'small_16k', **FIELDS, **TINY, **fields}, Sequence('16k', 8.0))
        jax.eval_shape(model.init, jax.random.key(0), features['x0'], jnp.zeros(2), features['clip'], features['sync'],
                       features['text'])
