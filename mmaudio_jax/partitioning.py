"""Where every tensor lives: the mesh, and rules from parameter names to shardings. The only file that names mesh axes."""
from collections.abc import Mapping
from collections.abc import Sequence
import math
import re
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

AXES = ('data',)  # the order of the mesh's dimensions

# (regular expression searched in the tensor's name, mesh axis of each dimension); the first that matches counts.
# Names are paths such as 'params/joint_blocks/latent/qkv/kernel'. Data parallel: every tensor is on every device.
RULES = ((r'.*', ()),)


def make_mesh(mesh_config: Mapping[str, int]) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      mesh_config: config.mesh, axis name -> size; one of them may be -1 and takes the remaining devices.

    Raises:
      ValueError: an unknown axis, two axes of -1, or sizes whose product is not the number of devices.
    """
    sizes = dict(mesh_config)
    if set(sizes) != set(AXES):
        raise ValueError(f'config.mesh has the axes {", ".join(sorted(sizes))}, but the mesh has exactly {", ".join(AXES)}')
    devices = jax.device_count()
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f'config.mesh.{name} is {size}; it must be at least 1, or -1 for the remaining devices')
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f'config.mesh: only one axis can be -1, not {" and ".join(free)}')
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free and devices % fixed == 0:
        sizes[free[0]] = devices // fixed
    shape = tuple(sizes[name] for name in AXES)
    if math.prod(shape) != devices:
        wanted = ' x '.join(f'{name} {sizes[name]}' for name in AXES)
        raise ValueError(f'config.mesh ({wanted}) does not cover the {devices} devices; '
                         'set one axis to -1 to take what is left')
    return Mesh(mesh_utils.create_device_mesh(shape), AXES)


def state_sharding(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, tuple]] = RULES) -> Any:
    """A NamedSharding for every tensor of a tree, by its name.

    Args:
      mesh: from make_mesh.
      tree: any pytree of arrays or shapes (a whole TrainState); scalars are on every device.
      rules: (regular expression, one mesh axis or None per dimension) pairs; missing dimensions are not split.

    Returns:
      The same tree with a NamedSharding at each leaf.

    Raises:
      ValueError: a tensor that no rule matches, more axes than dimensions, or an axis that does not divide its dimension.
    """
    def sharding(path, leaf):
        name = tensor_name(path)
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        axes = next((axes for pattern, axes in rules if re.search(pattern, name)), None)
        if axes is None:
            raise ValueError(f'no sharding rule matches the tensor {name} {tuple(leaf.shape)}; '
                             'add one to partitioning.RULES')
        if len(axes) > len(leaf.shape):
            raise ValueError(f'the sharding rule {axes} has more axes than the tensor {name} {tuple(leaf.shape)} '
                             'has dimensions')
        for dimension, axis in zip(leaf.shape, axes):
            if axis is not None and dimension % mesh.shape[axis]:
                raise ValueError(f'the mesh axis {axis!r} of size {mesh.shape[axis]} does not divide the dimension {dimension} '
                                 f'of the tensor {name} {tuple(leaf.shape)}; change config.mesh or the rule {axes}')
        return NamedSharding(mesh, PartitionSpec(*axes))
    return jax.tree_util.tree_map_with_path(sharding, tree)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first dimension over the data axis."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ValueError, naming the config field, when the data axis does not divide the batch size."""
    size = mesh.shape['data']
    if batch_size < 1 or batch_size % size:
        nearest = max(size, round(batch_size / size) * size)
        raise ValueError(f'{field} is {batch_size}, which the {size} devices of the mesh axis data do not share evenly; '
                         f'set it to a multiple of {size}, for example {nearest}')


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree without its values: what a restore needs."""
    shape = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(shape, tree, shardings)


def to_host(array: Any) -> np.ndarray:
    """A global array as numpy on every process, also when other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def tensor_name(path: tuple) -> str:
    """'params/final/kernel' for the path of a leaf in a tree of dicts, dataclasses and tuples."""
    return jax.tree_util.keystr(path, simple=True, separator='/')
