"""Meshes and rules; and the tiny network on eight devices: the same numbers, no tensor moved without need, bytes as counted."""
import functools
import math
import re
import types

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import optax
import pytest

from configs import base
from mmaudio_jax import hosts
from mmaudio_jax import optimizer
from mmaudio_jax import partitioning
from mmaudio_jax import train_step
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence


def test_minus_one_takes_all_devices():
    mesh = partitioning.make_mesh({'data': -1})
    assert dict(mesh.shape) == {'data': jax.device_count(), 'fsdp': 1, 'tensor': 1} and jax.device_count() == 8


@pytest.mark.parametrize('config, message', [
    ({'data': 3}, r'config.mesh \(data 3 x fsdp 1 x tensor 1\) does not cover the 8 devices'),
    ({'data': 0}, 'config.mesh.data is 0'),
    ({'data': 1, 'pipeline': 8}, 'data, pipeline'),
    ({'data': -1, 'fsdp': 16}, 'fsdp 16 does not divide the 8 devices.* set for example --config.mesh.fsdp=8$'),
    ({'data': -1, 'fsdp': 4, 'tensor': 6}, r'fsdp 4 x tensor 6 does not divide .*--config.mesh.fsdp=4 --config.mesh.tensor=2$'),
    ({'data': 2, 'fsdp': -1, 'tensor': 7}, '--config.mesh.data=2 --config.mesh.tensor=1$'),
])
def test_wrong_mesh_names_the_field(config, message):
    with pytest.raises(ValueError, match=message):
        partitioning.make_mesh(config)


@pytest.mark.parametrize('mesh, devices, expected', [
    ({'data': -1, 'fsdp': 16}, 4, (1, 4, 1)),
    ({'data': -1, 'fsdp': 2, 'tensor': 6}, 8, (2, 2, 2)),
    ({'data': 32, 'fsdp': -1}, 8, (8, 1, 1)),
    ({'data': 2, 'fsdp': 2, 'tensor': 1}, 8, (4, 2, 1)),  # without -1 data takes the rest
    ({'fsdp': 3, 'tensor': 2}, 1, (1, 1, 1)),
])
def test_a_mesh_is_fitted_to_other_devices(mesh, devices, expected):
    assert partitioning.fitted(mesh, devices) == dict(zip(partitioning.AXES, expected))
    with pytest.raises(ValueError, match='config.mesh.fsdp is 0; it must be at least 1'):
        partitioning.fitted({'fsdp': 0}, devices)


@pytest.mark.parametrize('axis, shape', [('data', (4, 2, 1)), ('fsdp', (1, 4, 2)), ('data', (2, 4, 1))])
def test_slices_lie_along_one_axis(axis, shape):
    """Two slices of four chips: neighbours along every other axis are of one slice."""
    devices = [types.SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 2, platform='cpu', device_kind='cpu')
               for i in range(8)]
    arranged = partitioning._arrange(shape, axis, devices)
    slices = np.vectorize(lambda device: device.slice_index)(arranged)
    along = partitioning.AXES.index(axis)
    assert slices.shape == shape and (slices == np.take(slices, [0], [a for a in range(3) if a != along][0])).all()
    assert sorted(np.moveaxis(slices, along, 0).reshape(shape[along], -1)[:, 0].tolist()) == [0] * (shape[along] // 2) + [1] * (
        shape[along] // 2)


def test_nodes_of_gpus_are_no_slices():
    """JAX gives the GPUs of every host a slice of their own: a mesh need not keep within one."""
    devices = [types.SimpleNamespace(id=i, slice_index=i // 4, process_index=i // 4, platform='gpu', device_kind='NVIDIA H100')
               for i in range(16)]
    arranged = partitioning._arrange((2, 8, 1), 'data', devices)
    assert np.vectorize(lambda device: device.id)(arranged)[..., 0].tolist() == [list(range(8)), list(range(8, 16))]


def test_without_axes_the_batch_is_split_over_all():
    assert dict(partitioning.make_mesh({}).shape) == {'data': jax.device_count(), 'fsdp': 1, 'tensor': 1}
    assert partitioning.fitted({}, 4) == {'data': 4, 'fsdp': 1, 'tensor': 1}


def test_slices_that_do_not_fit_are_refused():
    devices = [types.SimpleNamespace(id=i, slice_index=i // 4, process_index=0, platform='cpu', device_kind='cpu')
               for i in range(8)]
    with pytest.raises(ValueError, match='config.mesh.data is 1, not a multiple of the 2 slices'):
        partitioning._arrange((1, 8, 1), 'data', devices)
    with pytest.raises(ValueError, match="slice_axis is 'tensor'"):
        partitioning._arrange((1, 1, 8), 'tensor', devices)


def test_hosts_with_unlike_numbers_of_devices_are_refused():
    devices = [types.SimpleNamespace(id=i, process_index=int(i > 2), platform='gpu') for i in range(4)]
    with pytest.raises(ValueError, match=r'unlike numbers of devices \(process 0 3, process 1 1\)'):
        partitioning.make_mesh({'data': -1}, devices=devices)


def test_an_unknown_slice_axis_is_refused_on_one_slice_too():
    with pytest.raises(ValueError, match="config.sharding.slice_axis is 'nonsense'; it must be one of data, fsdp"):
        partitioning.make_mesh({'data': -1}, 'nonsense')


@pytest.mark.parametrize('rule, message', [
    (('w2$', ('model',)), 'is not a pair of a regular expression and a tuple'),
    (('w2$', 'fsdp'), 'is not a pair'),
    (('w2$',), 'is not a pair'),
    (('w2$', (['fsdp', 'tensor'], None)), 'is not a pair'),
    (('w2$', ('fsdp', 'fsdp')), 'is not a pair'),
    ('w2', 'is not a pair'),
    (('(w2$', ('fsdp', None)), r"config.sharding.rules: '\(w2\$' is not a regular expression"),
])
def test_what_is_no_rule_is_refused(rule, message):
    config = base.get_config()
    config.sharding.rules = (('/w1$', (('tensor', 'fsdp'), None)), rule)
    with pytest.raises(ValueError, match=message):
        partitioning.rules_of(config)


def test_every_tensor_of_a_state_has_a_sharding():
    mesh = partitioning.make_mesh({'data': -1})
    tree = {'params': {'dense': {'kernel': jnp.zeros((16, 3)), 'bias': jnp.zeros(3)}}, 'step': jnp.int32(0)}
    rules = ((r'kernel$', ('data', None)), (r'bias$', ()))
    shardings = partitioning.tensor_shardings(mesh, tree, rules)
    assert shardings['params']['dense']['kernel'].spec == PartitionSpec('data', None)
    assert shardings['params']['dense']['bias'].is_fully_replicated
    placed = jax.device_put(tree, shardings)
    assert placed['params']['dense']['kernel'].addressable_shards[0].data.shape == (2, 3)


@pytest.mark.parametrize('rules, message', [
    (((r'bias$', ()),), 'no sharding rule matches the tensor params/dense/kernel'),
    (((r'.*', (None, 'data')),), r'of size 8 does not divide the dimension 3 of the tensor params/dense/kernel \(16, 3\)'),
    (((r'.*', (None, None, 'data')),), 'more axes than the tensor params/dense/kernel'),
])
def test_errors_name_the_tensor(rules, message):
    mesh = partitioning.make_mesh({'data': -1})
    with pytest.raises(ValueError, match=message):
        partitioning.tensor_shardings(mesh, {'params': {'dense': {'kernel': jnp.zeros((16, 3))}}}, rules)


def test_rules_stand_for_the_last_dimensions_and_those_of_the_config_come_first():
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    tree = {'params': {'fused': {'mlp': {'w2': jnp.zeros((5, 3, 8, 4))}}}, 'ema': {'mlp': {'w2': jnp.zeros((3, 8, 4))}}}
    split = partitioning.tensor_shardings(mesh, tree)
    assert split['params']['fused']['mlp']['w2'].spec == PartitionSpec(None, None, ('tensor', 'fsdp'), None)
    whole = partitioning.tensor_shardings(mesh, tree, whole_params=True)
    assert whole['params']['fused']['mlp']['w2'].spec == PartitionSpec(None, None, 'tensor', None)
    assert whole['ema']['mlp']['w2'].spec == PartitionSpec(None, ('tensor', 'fsdp'), None)
    config = base.get_config()
    config.sharding.rules = (('w2$', (None, 'data')), )
    changed = partitioning.tensor_shardings(mesh, tree, partitioning.rules_of(config))
    assert changed['ema']['mlp']['w2'].spec == PartitionSpec(None, None, 'data')


@pytest.mark.parametrize('variant', ['small_16k', 'large_44k_v2'])
@pytest.mark.parametrize('fields', [{}, {'mlp': 'linear', 'sync_fusion': 'none'}], ids=str)
def test_the_rules_match_every_parameter_of_the_networks(variant, fields):
    """Each splits over fsdp 2; the widths of L also over tensor 2."""
    plain = {'dtype': 'float32', 'sync_fusion': 'modulate', 'rope': 'aligned', 'mlp': 'conv', 'remat': 'none',
             'convolution': 'matmul'}
    sequence = Sequence(variant.split('_')[1], 8.0)
    model = mmaudio.build({'variant': variant, **plain, **fields}, sequence)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (
        (1, 8, model.latent_channels), (1,), (1, 8, 1024), (1, 8, 768), (1, 77, 1024))]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    tensor = 2 if variant.startswith('large') else 1
    mesh = partitioning.make_mesh({'data': -1, 'fsdp': 2, 'tensor': tensor})
    shardings = partitioning.tensor_shardings(mesh, params)
    split = sum(math.prod(s.shard_shape(p.shape)) for p, s in zip(jax.tree.leaves(params), jax.tree.leaves(shardings)))
    assert 0.5 < split / (sum(p.size for p in jax.tree.leaves(params)) / 2) < 1.01  # measured 1.0004 to 1.0035
    if tensor == 1:
        with pytest.raises(ValueError, match="'tensor' of size 2 does not divide the dimension 7 of the tensor .*qkv/"):
            partitioning.tensor_shardings(partitioning.make_mesh({'data': -1, 'tensor': 2}), params)


def test_batch_is_split_over_the_data_axis():
    mesh = partitioning.make_mesh({'data': -1})
    batch = jax.device_put(np.arange(16.0), partitioning.batch_sharding(mesh))
    assert batch.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(hosts.to_host(batch), np.arange(16.0))
    partitioning.check_batch_size(mesh, 16, 'config.input.batch_size')
    with pytest.raises(ValueError, match='config.input.batch_size is 12.*multiple of 8'):
        partitioning.check_batch_size(mesh, 12, 'config.input.batch_size')
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'tensor': 2})
    assert jax.device_put(np.arange(16.0), partitioning.batch_sharding(mesh)).addressable_shards[0].data.shape == (4,)
    assert partitioning.batch_shards(mesh) == 4


B, N, V, S, T, C = 16, 30, 8, 24, 7, 8
LAYERS = 2  # of the scan, or one after the other where the mesh is 'unrolled', as on TPU slices with few clips a chip
STEPS = 5
MESHES = {  # name -> (mesh, whole_params)
    'data': ({'data': 8}, False),
    'fsdp': ({'data': 2, 'fsdp': 4}, False),
    'unrolled': ({'data': 2, 'fsdp': 4}, False),
    'zero': ({'data': 2, 'fsdp': 4}, True),
    'tensor': ({'data': 2, 'tensor': 4}, False),
    'mixed': ({'data': 2, 'fsdp': 2, 'tensor': 2}, False),
}
TOKENS = ({'data': 4, 'tensor': 2}, False)  # the mesh of 'tokens', on which ACTIVATIONS split them between blocks
ACTIVATIONS = (('/fused$', (('data', 'fsdp'), 'tensor', None)),)
# Largest difference to one device over 5 steps: losses, norms, all gradients by their norm, and the first by each tensor.
BOUND = 1e-5


class Lengths(types.SimpleNamespace):
    latent_length, clip_length, sync_length = N, V, S


def tiny_batch(seed: int) -> dict:
    draw = np.random.RandomState(seed).standard_normal
    normal = lambda *shape: draw(shape).astype(np.float32)
    return {'latent_mean': normal(B, N, C), 'latent_std': 0.1 * np.abs(normal(B, N, C)), 'clip_features': normal(B, V, 32),
            'sync_features': normal(B, S, 24), 'text_features': normal(B, T, 16), 'video_exists': np.arange(B) % 3 > 0,
            'text_exists': np.arange(B) % 4 > 0}


def tiny_model(name: str) -> mmaudio.MMAudio:
    return mmaudio.MMAudio(latent_channels=C, hidden_size=64, num_heads=4, joint_blocks=1, fused_blocks=LAYERS, version=1,
                           sync_fusion='modulate', rope='aligned', mlp='conv', dtype=jnp.float32,
                           convolution='xla_taps' if name == 'unrolled' else 'matmul',
                           remat='none' if name == 'unrolled' else 'blocks', clip_width=32, sync_width=24, text_width=16,
                           text_length=T, scan_layers=name != 'unrolled')


@functools.cache
def run(name: str):
    """Five steps: [(loss, norm, gradients)], the compiled text, its memory, the state's shapes, and bytes a device."""
    axes, whole = {**MESHES, 'tokens': TOKENS}.get(name, ({'data': 1}, False))
    config = base.get_config()
    config.optimizer.warmup_steps = 2
    config.sharding.activations = ACTIVATIONS if name == 'tokens' else ()
    model = tiny_model(name)
    init = lambda: train_step.init_state(config, model, Lengths(), (np.zeros(C), np.ones(C)), np.ones((T, 16)))
    shapes = jax.eval_shape(init)
    mesh = partitioning.make_mesh(axes, devices=jax.devices()[:math.prod(axes.values())])
    shardings = partitioning.tensor_shardings(mesh, shapes, whole_params=whole)
    batch_sharding, replicated = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
    tx, schedule = optimizer.make(config.optimizer, shapes.params)
    placed = partitioning.on_mesh(model, mesh, config)

    def step(state, batch):
        draws = train_step.sample_draws(jax.random.fold_in(jax.random.key(0), state.step), config, batch)
        return train_step.step_with_draws(state, placed, tx, schedule, 0.0, batch, draws)

    compiled = jax.jit(step, donate_argnums=0, in_shardings=(shardings, batch_sharding),
                       out_shardings=(shardings, replicated, (replicated, shardings.params))).lower(
                           shapes, tiny_batch(0)).compile({'xla_backend_optimization_level': 0})
    state, seen = jax.jit(init, out_shardings=shardings)(), []
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    for number in range(STEPS):
        state, metrics, (_, gradients) = compiled(state, jax.device_put(tiny_batch(number), batch_sharding))
        seen.append((float(metrics['loss']), float(metrics['grad_norm']), jax.tree.map(np.asarray, gradients)))
    return seen, compiled.as_text(), compiled.memory_analysis(), shapes, held


def _travels(exchange_dtype):
    """Name of each parameter of a bfloat16 network → the dtype in which it travels."""
    model = tiny_model('data').clone(dtype=jnp.bfloat16)
    placed = partitioning.OnMesh(model, partitioning.make_mesh({'data': -1}), partitioning.RULES, exchange_dtype, ())
    shapes = jax.eval_shape(lambda: train_step.init_state(base.get_config(), model, Lengths(), (np.zeros(C), np.ones(C)),
                                                          np.ones((T, 16)))).params
    return {partitioning.tensor_name(path): placed._dtype(path, leaf)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)}


def test_matrices_alone_travel_in_the_compute_dtype():
    narrow = {name for name, dtype in _travels('compute').items() if dtype == jnp.bfloat16}
    assert {'joint_last/latents/qkv/kernel', 'joint_last/latents/mlp/w1', 'joint_last/latents/mlp/w2'} <= narrow
    assert not any('t_embed' in name or name.endswith(('bias', '_norm', 'latent_mean')) for name in narrow)
    assert set(_travels('float32').values()) == {jnp.dtype('float32')}
    with pytest.raises(ValueError, match="exchange_dtype is 'bfloat16'; it must be 'compute' or 'float32'"):
        _travels('bfloat16')


def test_the_config_keeps_parameters_whole():
    config = base.get_config()
    mesh, tree = partitioning.make_mesh({'data': -1, 'fsdp': 2}), {'params': {'fused': {'latents': {'mlp': {
        'w2': jax.ShapeDtypeStruct((3, 8, 4), jnp.float32)}}}}}
    specs = []
    for config.sharding.whole_params in (False, True):
        specs += [sharding.spec for sharding in jax.tree.leaves(partitioning.state_shardings(mesh, tree, config))]
    assert 'fsdp' in str(specs[0]) and 'fsdp' not in str(specs[1])


@pytest.mark.slow  # 15 s a mesh, nearly all of it compilation
@pytest.mark.parametrize('name', [*MESHES, 'tokens'])
def test_five_steps_on_a_mesh_equal_those_on_one_device(name):
    worst = {'loss': 0.0, 'norm': 0.0, 'gradient': 0.0, 'tensor of the first gradient': 0.0}
    for step, (ours, expected) in enumerate(zip(run(name)[0], run('one')[0], strict=True)):
        worst['loss'] = max(worst['loss'], abs(ours[0] / expected[0] - 1))
        worst['norm'] = max(worst['norm'], abs(ours[1] / expected[1] - 1))
        difference = jax.tree.map(np.subtract, ours[2], expected[2])
        worst['gradient'] = max(worst['gradient'], float(optax.global_norm(difference)) / expected[1])
        if step == 0:  # later Adam has divided tiny gradients by tiny moments
            largest = [(np.abs(d).max(), np.abs(e).max()) for d, e in zip(*map(jax.tree.leaves, (difference, expected[2])))]
            worst['tensor of the first gradient'] = max(d / e for d, e in largest if e > 0)
    print(name, {key: f'{value:.1e}' for key, value in worst.items()})
    assert max(worst.values()) < BOUND, worst


def results(text: str, operation: str) -> list[tuple[int, ...]]:
    """Shapes that the operations of that kind make, without dimensions of 1."""
    found = re.findall(rf'= (\([^)]*\)|\S+) {operation}(?:-start)?\(', text)
    shapes = [shape for result in found for shape in re.findall(r'\w+\[([\d,]*)\]', result)]
    return [tuple(size for size in map(int, filter(None, shape.split(','))) if size > 1) for shape in shapes]


@pytest.mark.slow
@pytest.mark.parametrize('name', MESHES)
def test_nothing_is_gathered_but_what_the_rules_imply(name):
    """fsdp: single layers of its parameters, whole along fsdp. ZeRO-1: the new parameters too. Else nothing above a bias."""
    _, text, _, shapes, _ = run(name)
    axes, whole = MESHES[name]
    params = jax.tree_util.tree_leaves_with_path({'params': shapes.params})
    tensor, allowed, halves = axes.get('tensor', 1), set(), set()
    for path, leaf in params:
        tensor_name = partitioning.tensor_name(path)
        rule = next(axes for pattern, axes in partitioning.RULES if re.search(pattern, tensor_name))
        split = [axes if isinstance(axes, tuple) else (axes, ) for axes in rule]
        by_fsdp = next((place - len(split) for place, names in enumerate(split) if 'fsdp' in names), None)
        shape = list(leaf.shape)
        for place in range(len(split)):
            shape[place - len(split)] //= tensor if 'tensor' in split[place] else 1
        if by_fsdp is not None and axes.get('fsdp', 1) > 1:
            stacked = '/fused/' in tensor_name
            turned = [*shape[:-2], shape[-1], shape[-2]] if by_fsdp == -1 else shape  # on the way; XLA may turn it before
            allowed |= {tuple(size for size in sizes[stacked:] if size > 1) for sizes in (shape, turned)}
            if whole:
                allowed.add(tuple(size for size in shape if size > 1))
            shape[by_fsdp] //= 2
            halves.add(tuple(sorted(size for size in shape[stacked:] if size > 1)))
    gathered = {shape for shape in results(text, 'all-gather') if math.prod(shape) >= 256}
    assert gathered <= allowed, gathered - allowed
    assert bool(gathered) == ('fsdp' in axes)
    assert not results(text, 'all-to-all')
    # On a mixed mesh half a gradient of a layer may change places along tensor, which holds it twice; nothing larger moves.
    moved = {tuple(sorted(shape)) for shape in results(text, 'collective-permute')}
    assert not moved or name == 'mixed'
    assert moved <= halves, moved - halves


@pytest.mark.slow
def test_rules_for_activations_split_the_tokens_between_blocks():
    """The carry of the blocks then has half the tokens; without rules every device of a clip has all of them."""
    carry = (B // 4, N, 64)
    assert f'f32[{B // 4},{N // 2},64]' in run('tokens')[1] and f'f32[{B // 2},{N // 2},64]' not in run('tensor')[1]
    assert carry in results(run('tokens')[1], 'all-gather')
    assert not [shape for shape in results(run('tensor')[1], 'all-gather') if N in shape]


@pytest.mark.parametrize('rule, message', [
    (('/fusde$', (None, 'tensor', None)), "'/fusde\\$' matches none of the modules, .*/fused, .*/fused/latents/qkv,"),
    (('/fused$', ('tensor', None, 'fsdp', None)), r'more axes than the result of fused \(8, 30, 64\) has dimensions'),
    (('/text_input_proj$', ('tensor', None)), r"'tensor' of size 2 does not divide the dimension 7 of the result of text"),
    (('/fused$', 'tensor'), 'config.sharding.activations has .* is not a pair of a regular'),
])
def test_wrong_rules_for_activations_name_the_module(rule, message):
    config, model = base.get_config(), tiny_model('one')
    config.sharding.activations = (rule,)
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32)
              for shape in ((8, N, C), (8,), (8, V, 32), (8, S, 24), (8, T, 16))]
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(partitioning.on_mesh(model, partitioning.make_mesh({'data': -1, 'tensor': 2}), config).apply, params,
                       *inputs)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['one', *MESHES])
def test_bytes_of_the_state_are_as_counted(name):
    """Parameters, two moments of what is trained, two averages, float32; kernels over fsdp, heads and MLPs over tensor."""
    _, _, memory, shapes, held = run(name)
    axes, whole = MESHES.get(name, ({}, False))
    fsdp, tensor = axes.get('fsdp', 1), axes.get('tensor', 1)
    expected = 4 * 3  # the counters of step, averages, and below, Adam and schedule
    expected += 4
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes.params):
        tensor_name = partitioning.tensor_name(path)
        kernel, heads = re.search(r'kernel|/w\d', tensor_name), re.search(r'qkv|projection|/w\d', tensor_name)
        wide = tensor if heads and (kernel or 'qkv/bias' in tensor_name) else 1
        copies = 2 if tensor_name in mmaudio.FROZEN else 4  # averages, and moments
        parameter = leaf.size / wide / (fsdp if kernel and not whole else 1)
        expected += 4 * (parameter + copies * leaf.size / wide / (fsdp if kernel else 1))
    assert held == expected
    batch = sum(value.nbytes for value in tiny_batch(0).values()) / (axes.get('data', 1) * fsdp)
    assert abs(memory.argument_size_in_bytes - held - batch) < 4096  # padding of small arguments
    assert memory.alias_size_in_bytes >= held - 4096  # the whole state is updated in place
