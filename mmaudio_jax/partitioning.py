"""Where every tensor lives: the mesh, and rules from parameter names to shardings. The only file that names mesh axes."""
import collections
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import functools
import math
import re
from typing import Any

import flax.linen as nn
import flax.struct
import jax
from jax.experimental import mesh_utils
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec
import numpy as np

# The order of the mesh's dimensions, slowest links first. The batch is split over data and fsdp. Parameters, moments and
# averages are split over fsdp and gathered block by block; heads and the width of the MLPs are split over tensor.
AXES = ('data', 'fsdp', 'tensor')
BATCH_AXES = ('data', 'fsdp')

# (regular expression searched in the tensor's name, mesh axis, or axes, of each of its last dimensions); the first that
# matches counts. Names are paths such as 'joint/latents/qkv/kernel', behind 'params/', 'ema/averages/0/' or nothing, so that a
# rule names no more than the path in the network. Dimensions before those of the rule, such as the layers of a scan, are not
# split. TPUs keep the last two dimensions in tiles of 16 rows of 128: fsdp splits the last but one, or the last, which is then
# turned before it is sent, so that sixteenths are whole tiles (896 / 16 is not, 2560 / 16 is).
RULES: tuple[tuple[str, tuple], ...] = (
    (r'/qkv/kernel$', ('fsdp', 'tensor')),  # [q|k|v, D, H · K]
    (r'/qkv/bias$', ('tensor', None)),  # [q|k|v, H, K]
    (r'/projection/kernel$', (('tensor', 'fsdp'), None)),  # [H · K, D]
    (r'/w[13]$', (None, ('tensor', 'fsdp'))),  # [taps, D, hidden]
    (r'/w2$', (('tensor', 'fsdp'), None)),  # [taps, hidden, D]
    (r'/modulation/kernel$', ('fsdp', None)),  # [6, D, D]
    (r'final_layer/conv/kernel$', ('fsdp', None)),  # [taps, D, C]
    (r'audio_input_proj/first/kernel$', (None, 'fsdp')),  # [taps, C, D], C is 20 or 40
    (r'(_input_proj/first|t_embed/first|t_embed/second|clip_cond_proj|text_cond_proj)/kernel$', ('fsdp', None)),
    (r'/bias$|_norm$|latent_mean$|latent_std$|empty_\w+_feat$|sync_pos_emb$', ()),
)

MATRICES = r'/kernel$|/w[123]$'  # names of the parameters that the network casts to its dtype and multiplies by, but those of
FLOAT32 = r'/t_embed/'  # which computes in float32


def make_mesh(mesh_config: Mapping[str, int], slice_axis: str = 'data', devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices of all processes.

    Args:
      mesh_config: config.mesh, axis name -> size; one of them may be -1 and takes the remaining devices. An axis that is
        not named has size 1; when none is, a batch is split over all devices and nothing else.
      slice_axis: config.sharding.slice_axis, the axis that goes over the slow links when the devices are several slices.
      devices: those of a described topology; None for the real ones.

    Raises:
      ValueError: an unknown axis, two axes of -1, sizes whose product is not the number of devices, an axis over slices
        that is not a multiple of their number, or hosts with unlike numbers of devices.
    """
    devices = jax.devices() if devices is None else devices
    counts = collections.Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        listed = ', '.join(f'process {index} {count}' for index, count in sorted(counts.items()))
        raise ValueError(f'the hosts have unlike numbers of devices ({listed}), but each reads an equal part of a batch: '
                         'start the run on hosts that are alike, or hide devices (CUDA_VISIBLE_DEVICES)')
    sizes, free = _sizes(mesh_config)
    if free:
        fixed = math.prod(size for size in sizes.values() if size != -1)
        if len(devices) % fixed:
            raise ValueError(_does_not_divide(sizes, len(devices)))
        sizes[free] = len(devices) // fixed
    shape = tuple(sizes[name] for name in AXES)
    if math.prod(shape) != len(devices):
        wanted = ' x '.join(f'{name} {sizes[name]}' for name in AXES)
        raise ValueError(f'config.mesh ({wanted}) does not cover the {len(devices)} devices; '
                         'set one axis to -1 to take what is left')
    return Mesh(_arrange(shape, slice_axis, devices), AXES)


def fitted(mesh_config: Mapping[str, int], devices: int) -> dict[str, int]:
    """The axes of config.mesh for that many devices, which it need not be for: sizes are cut to what divides what is left.

    tensor comes first, then fsdp; the axis of -1, or else data, takes the rest. Errors are those of make_mesh.
    """
    sizes, free = _sizes(mesh_config)
    free = free or 'data'
    for name in reversed(AXES):
        if name != free:
            sizes[name] = math.gcd(sizes[name], devices)
            devices //= sizes[name]
    return sizes | {free: devices}


def _sizes(mesh_config: Mapping[str, int]) -> tuple[dict[str, int], str | None]:
    """The size of every axis, checked; the axis of -1, if there is one."""
    mesh_config = mesh_config or {'data': -1}
    if not set(AXES).issuperset(mesh_config):
        raise ValueError(f'config.mesh has the axes {", ".join(sorted(mesh_config))}; those that exist are {", ".join(AXES)}')
    sizes = {name: 1 for name in AXES} | dict(mesh_config)
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(f'config.mesh.{name} is {size}; it must be at least 1, or -1 for the remaining devices')
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(f'config.mesh: only one axis can be -1, not {" and ".join(free)}')
    return sizes, next(iter(free), None)


def _does_not_divide(sizes: Mapping[str, int], devices: int) -> str:
    """Says that these axes leave no whole number of devices, and sizes that do."""
    split, better = [name for name, size in sizes.items() if size > 1], fitted(sizes, devices)
    given = ' x '.join(f'{name} {sizes[name]}' for name in split)
    flags = ' '.join(f'--config.mesh.{name}={better[name]}' for name in split)
    return (f'config.mesh: {given} does not divide the {devices} devices, so that the axis of -1 cannot take what is left; set '
            f'for example {flags}')


def _arrange(shape: tuple[int, ...], slice_axis: str, devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `shape`, neighbours on fast links; slices lie along slice_axis only."""
    if slice_axis not in BATCH_AXES:
        raise ValueError(f'config.sharding.slice_axis is {slice_axis!r}; it must be one of {", ".join(BATCH_AXES)}')
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    if slices == 1 or getattr(devices[0], 'platform', '') == 'gpu':  # whose slice_index is that of their host
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    over = tuple(slices if name == slice_axis else 1 for name in AXES)
    within, rest = zip(*(divmod(size, count) for size, count in zip(shape, over)))
    if any(rest):
        raise ValueError(f'config.mesh.{slice_axis} is {shape[AXES.index(slice_axis)]}, not a multiple of the {slices} slices; '
                         'change it, or config.sharding.slice_axis')
    return mesh_utils.create_hybrid_device_mesh(within, over, devices, allow_split_physical_axes=True)


def tensor_shardings(mesh: Mesh, tree: Any, rules: Sequence[tuple[str, tuple]] = RULES, whole_params: bool = False) -> Any:
    """A NamedSharding for every tensor of a tree, by its name.

    Args:
      mesh: from make_mesh.
      tree: any pytree of arrays or shapes (a whole TrainState, or parameters); scalars are on every device.
      rules: (regular expression, a mesh axis, several or None for each of the last dimensions) pairs; see rules_of.
      whole_params: config.sharding.whole_params: fsdp does not split parameters, only the rest of the state (ZeRO-1).

    Returns:
      The same tree with a NamedSharding at each leaf.

    Raises:
      ValueError: a tensor that no rule matches, more axes than dimensions, or an axis that does not divide its dimension.
    """
    def sharding(path, leaf):
        name = tensor_name(path)
        if not leaf.shape:
            return NamedSharding(mesh, PartitionSpec())
        axes = _first(rules, name)
        if axes is None:
            raise ValueError(f'no sharding rule matches the tensor {name} {tuple(leaf.shape)}; '
                             'add one to config.sharding.rules')
        spec = _spec(mesh, axes, leaf.shape, f'the tensor {name}', 'rules')
        if whole_params and not name.startswith(('opt_state/', 'ema/')):
            spec = _without_fsdp(spec)
        return NamedSharding(mesh, spec)
    return jax.tree_util.tree_map_with_path(sharding, tree)


def state_shardings(mesh: Mesh, tree: Any, config) -> Any:
    """tensor_shardings with what config.sharding says; errors as rules_of and tensor_shardings have them."""
    return tensor_shardings(mesh, tree, rules_of(config), config.sharding.whole_params)


def _first(rules: Sequence[tuple[str, tuple]], name: str) -> tuple | None:
    """The axes of the first rule that matches, or None."""
    return next((axes for pattern, axes in rules if re.search(pattern, f'/{name}')), None)


def _spec(mesh: Mesh, axes: tuple, shape: tuple[int, ...], what: str, field: str) -> PartitionSpec:
    """`axes` for the last dimensions of an array; if they do not fit, a ValueError names `what` and config.sharding.`field`."""
    if len(axes) > len(shape):
        raise ValueError(f'the sharding rule {axes} has more axes than {what} {tuple(shape)} has dimensions; '
                         f'change it in config.sharding.{field}')
    for dimension, used in zip(shape[len(shape) - len(axes):], map(_several, axes)):
        parts = math.prod(mesh.shape[axis] for axis in used)
        if dimension % parts:
            raise ValueError(f'the mesh axis {" and ".join(map(repr, used))} of size {parts} does not divide the dimension '
                             f'{dimension} of {what} {tuple(shape)}; change config.mesh.{used[-1]}, or put '
                             f'a rule other than {axes} into config.sharding.{field}')
    return PartitionSpec(*[None] * (len(shape) - len(axes)), *axes)


def _several(axes: Any) -> tuple[str, ...]:
    """The axes of one dimension, given as None, one, or several."""
    return axes if isinstance(axes, tuple) else () if axes is None else (axes,)


def _without_fsdp(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*(tuple(axis for axis in _several(axes) if axis != 'fsdp') for axes in spec))


def rules_of(config) -> tuple[tuple[str, tuple], ...]:
    """config.sharding.rules, then RULES.

    Raises:
      ValueError: one of the config's is no rule, or its regular expression is none.
    """
    return (*_checked_rules(config, 'rules', "('/w2$', ('fsdp', None))"), *RULES)


def _checked_rules(config, field: str, example: str) -> tuple[tuple[str, tuple], ...]:
    """Those of config.sharding.`field`."""
    for rule in config.sharding[field]:
        if not _is_rule(rule):
            raise ValueError(f'config.sharding.{field} has {rule!r}, which is not a pair of a regular expression and a tuple '
                             f'with one of {", ".join(AXES)}, a tuple of them, or None for each of the last dimensions, such '
                             f'as {example}')
        try:
            re.compile(rule[0])
        except re.error as error:
            raise ValueError(f'config.sharding.{field}: {rule[0]!r} is not a regular expression: {error}') from error
    return tuple((pattern, tuple(axes)) for pattern, axes in config.sharding[field])


def _is_rule(rule: Any) -> bool:
    """Whether it is (text, axes), with axes that exist, each at most once."""
    if not isinstance(rule, (tuple, list)) or len(rule) != 2:
        return False
    pattern, axes = rule
    if not isinstance(pattern, str) or not isinstance(axes, (tuple, list)):
        return False
    used = [axis for dimension in axes for axis in _several(dimension)]
    return all(axis in AXES for axis in used) and len(used) == len(set(used))


class OnMesh:
    """A network on a mesh, used like the network: each of its parameters is brought to where it is needed when it is read.

    A block of a scan so gathers its own slice of parameters that fsdp splits, again in the backward pass when blocks are
    recomputed, and its gradient is reduced and split at once. Without that the partitioner may move activations instead,
    which is cheaper at some sizes and never meant. Activations follow from the batch's place and the parameters'; rules of
    their own may put the results of modules elsewhere.

    Matrices travel in the dtype in which the network multiplies by them, and their gradients, which such products make in
    that dtype, are summed over the devices in it: in bfloat16 half the bytes of float32. The sums that a device then keeps,
    over microbatches and in the optimizer, are float32.

    Args:
      model: a flax module; attributes that are not here are its own.
      mesh, rules: as for tensor_shardings.
      exchange_dtype: config.sharding.exchange_dtype, 'compute' as above, or 'float32'.
      activations: like `rules`, but searched in the paths of modules, such as '/fused/latents/qkv', whose results (each
        array of them) are placed so. A module that no rule matches leaves its results where they come to be.

    Raises:
      ValueError: another exchange_dtype; from `apply`, a rule for activations that matches no module, or
        does not fit a result.
    """

    def __init__(self, model: nn.Module, mesh: Mesh, rules: Sequence[tuple[str, tuple]], exchange_dtype: str,
                 activations: Sequence[tuple[str, tuple]]):
        if exchange_dtype not in ('compute', 'float32'):
            raise ValueError(f"config.sharding.exchange_dtype is {exchange_dtype!r}; it must be 'compute' or 'float32'")
        self._model, self._mesh = model, mesh
        self._rules, self._exchange_dtype, self._activations = rules, exchange_dtype, activations

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def clone(self, **fields: Any) -> 'OnMesh':
        """The same with other fields of the module."""
        return OnMesh(self._model.clone(**fields), self._mesh, self._rules, self._exchange_dtype, self._activations)

    def apply(self, variables: Mapping[str, Any], *args, **kwargs) -> Any:
        """The module's apply."""
        params = variables['params']
        self._check_activations(params)
        kept = tensor_shardings(self._mesh, params, self._rules)
        used = jax.tree.map(lambda sharding: sharding.update(spec=_without_fsdp(sharding.spec)), kept)
        boxes = jax.tree.map(_Placed, params, used, kept, jax.tree_util.tree_map_with_path(self._dtype, params))
        with nn.intercept_methods(self._place_results):
            return self._model.apply({**variables, 'params': boxes}, *args, **kwargs)

    def _check_activations(self, params: Any) -> None:
        """Raises ValueError for a rule that is meant for no module of the network."""
        tensors = [tensor_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        modules = {tensor[:end.start()] for tensor in tensors for end in re.finditer('/', tensor)}
        for rule in self._activations:
            if all(_first([rule], module) is None for module in modules):
                raise ValueError(f'config.sharding.activations: {rule[0]!r} matches none of the modules, which are '
                                 f'{", ".join(f"/{module}" for module in sorted(modules))}')

    def _place_results(self, method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        """What a method of a module returns, placed by the rule for activations that its path matches."""
        results, name = method(*args, **kwargs), '/'.join(context.module.path)
        axes = _first(self._activations, name) if context.method_name == '__call__' else None
        if axes is None:
            return results
        place = lambda array: jax.lax.with_sharding_constraint(
            array, NamedSharding(self._mesh, _spec(self._mesh, axes, array.shape, f'the result of {name}', 'activations')))
        return jax.tree.map(place, results)

    def _dtype(self, path: tuple, leaf: jax.Array) -> Any:
        """In which a parameter travels."""
        name = f'/{tensor_name(path)}'
        narrow = self._exchange_dtype == 'compute' and re.search(MATRICES, name) and not re.search(FLOAT32, name)
        return self._model.dtype if narrow else leaf.dtype


def on_mesh(model: nn.Module, mesh: Mesh, config) -> OnMesh:
    """OnMesh with what config.sharding says; errors as rules_of and OnMesh have them."""
    activations = _checked_rules(config, 'activations', "('/fused$', (('data', 'fsdp'), 'tensor', None))")
    return OnMesh(model, mesh, rules_of(config), config.sharding.exchange_dtype, activations)


class _Placed(flax.struct.PyTreeNode, nn.meta.AxisMetadata):
    """A parameter with its places; flax takes it out of this box where the parameter is read, inside a scan layer by layer.

    Attributes:
      value: the parameter. used: its sharding where it is used. kept: that of its gradient. dtype: in which both travel.
    """
    value: Any
    used: NamedSharding = flax.struct.field(pytree_node=False)
    kept: NamedSharding = flax.struct.field(pytree_node=False)
    dtype: Any = flax.struct.field(pytree_node=False)

    def unbox(self):
        value = self.value.astype(self.dtype)
        if value.ndim > 1 and 'fsdp' in _several(self.kept.spec[-1]):  # columns travel as rows
            turn = lambda array: jnp.swapaxes(array, -1, -2)
            return turn(_place(_turned(self.used), _turned(self.kept), turn(value)))
        return _place(self.used, self.kept, value)

    def replace_boxed(self, val):
        return self.replace(value=val)

    def add_axis(self, index, params):
        del params
        return self.replace(used=_insert(self.used, index), kept=_insert(self.kept, index))

    def remove_axis(self, index, params):
        del params
        return self.replace(used=_remove(self.used, index), kept=_remove(self.kept, index))


def _turned(sharding: NamedSharding) -> NamedSharding:
    *others, rows, columns = sharding.spec
    return sharding.update(spec=PartitionSpec(*others, columns, rows))


def _insert(sharding: NamedSharding, index: int) -> NamedSharding:
    return sharding.update(spec=PartitionSpec(*sharding.spec[:index], None, *sharding.spec[index:]))


def _remove(sharding: NamedSharding, index: int) -> NamedSharding:
    return sharding.update(spec=PartitionSpec(*sharding.spec[:index], *sharding.spec[index + 1:]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _place(used: NamedSharding, kept: NamedSharding, value: jax.Array) -> jax.Array:
    """`value` placed as `used`; its gradient as `kept`, so that it is reduced into parts rather than whole."""
    del kept
    return jax.lax.with_sharding_constraint(value, used)


def _place_forward(used, kept, value):
    return _place(used, kept, value), None


def _place_backward(used, kept, residual, gradient):
    del used, residual
    return (jax.lax.with_sharding_constraint(gradient, kept),)


_place.defvjp(_place_forward, _place_backward)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of a batch: its first dimension over the axes data and fsdp."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def on_parts(function: Callable[[Any, jax.Array], jax.Array], mesh: Mesh) -> Callable[[Any, jax.Array], jax.Array]:
    """function(whole, batch) on every device with its part of the batch, when examples do not depend on each other."""
    batch = PartitionSpec(BATCH_AXES)
    return jax.shard_map(function, mesh=mesh, in_specs=(PartitionSpec(), batch), out_specs=batch, check_vma=False)


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of a value that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(mesh: Mesh, batch_size: int, field: str) -> None:
    """Raises ValueError, naming the config field, when the axes data and fsdp do not divide the batch size."""
    size = batch_shards(mesh)
    if batch_size < 1 or batch_size % size:
        nearest = max(size, round(batch_size / size) * size)
        raise ValueError(f'{field} is {batch_size}, which the {size} parts of the mesh axes data and fsdp do not share evenly; '
                         f'set it to a multiple of {size}, for example {nearest}')


def check_microbatches(mesh: Mesh, config) -> None:
    """Raises ValueError, naming the fields, when config.input.batch_size is no whole number of parts that the mesh shares."""
    size, parts = config.input.batch_size, config.train.microbatches
    if parts < 1 or size % parts:
        raise ValueError(f'config.train.microbatches is {parts}, which does not divide config.input.batch_size {size}')
    check_batch_size(mesh, size // parts, 'config.input.batch_size / config.train.microbatches')


def rounded_up(mesh: Mesh, batch_size: int, field: str) -> int:
    """The batch size, or the next one that the axes data and fsdp share evenly, for batches that may be filled up.

    Raises:
      ValueError: it is below 1; names the config field.
    """
    if batch_size < 1:
        raise ValueError(f'{field} is {batch_size}; it must be at least 1')
    parts = batch_shards(mesh)
    return -(-batch_size // parts) * parts


def abstract(tree: Any, shardings: Any) -> Any:
    """Shapes, dtypes and shardings of a tree without its values: what a restore needs."""
    shape = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(shape, tree, shardings)


def shardings_of(tree: Any) -> Any:
    """The sharding of every leaf of what `abstract` gives."""
    return jax.tree.map(lambda leaf: leaf.sharding, tree)


def spread(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole, the same on all, as global arrays; `shardings` is a tree like it, or one."""
    def place(leaf, sharding):
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
    if isinstance(shardings, jax.sharding.Sharding):
        return jax.tree.map(lambda leaf: place(leaf, shardings), tree)
    return jax.tree.map(place, tree, shardings)


def tensor_name(path: tuple) -> str:
    """'params/final/kernel' for the path of a leaf in a tree of dicts, dataclasses and tuples."""
    return jax.tree_util.keystr(path, simple=True, separator='/')
