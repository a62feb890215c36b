import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np
import pytest

from mmaudio_jax import partitioning


def test_minus_one_takes_all_devices():
    mesh = partitioning.make_mesh({'data': -1})
    assert dict(mesh.shape) == {'data': jax.device_count(), 'fsdp': 1, 'tensor': 1} and jax.device_count() == 8


@pytest.mark.parametrize('config, message', [
    ({'data': 3}, r'config.mesh \(data 3 x fsdp 1 x tensor 1\) does not cover the 8 devices'),
    ({'data': 0}, 'config.mesh.data is 0'),
    ({'data': 1, 'pipeline': 8}, 'data, pipeline'),
])
def test_wrong_mesh_names_the_field(config, message):
    with pytest.raises(ValueError, match=message):
        partitioning.make_mesh(config)


def test_every_tensor_of_a_state_has_a_sharding():
    mesh = partitioning.make_mesh({'data': -1})
    tree = {'params': {'dense': {'kernel': jnp.zeros((16, 3)), 'bias': jnp.zeros(3)}}, 'step': jnp.int32(0)}
    rules = ((r'kernel$', ('data', None)), (r'bias$', ()))
    shardings = partitioning.state_sharding(mesh, tree, rules)
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
        partitioning.state_sharding(mesh, {'params': {'dense': {'kernel': jnp.zeros((16, 3))}}}, rules)


def test_batch_is_split_over_the_data_axis():
    mesh = partitioning.make_mesh({'data': -1})
    batch = jax.device_put(np.arange(16.0), partitioning.batch_sharding(mesh))
    assert batch.addressable_shards[0].data.shape == (2,)
    np.testing.assert_array_equal(partitioning.to_host(batch), np.arange(16.0))
    partitioning.check_batch_size(mesh, 16, 'config.input.batch_size')
    with pytest.raises(ValueError, match='config.input.batch_size is 12.*multiple of 8'):
        partitioning.check_batch_size(mesh, 12, 'config.input.batch_size')
