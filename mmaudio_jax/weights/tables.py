"""Importers of the evaluation networks as tables: our module → the official one, strict.

Layouts follow from the names of our parameters: kernels are transposed from (out, in, *window) to (*window, in, out), scale is
weight, mean and var are running_mean and running_var; what differs otherwise stands in the table.
"""
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import math
import re
from typing import Any

from flax import traverse_util
import numpy as np

from mmaudio_jax.weights import names
from mmaudio_jax.weights import sources

_LEAVES = {'kernel': 'weight', 'scale': 'weight', 'bias': 'bias', 'mean': 'running_mean', 'var': 'running_var'}
_PARTS = re.compile(r'\(([\w|]+)\)')


@dataclasses.dataclass(frozen=True)
class Table:
    """How the official tensors of one network are named.

    Attributes:
      modules: path of our module, joined by '/' → official module. '{}' is the index of a layer of a stack;
        '(query|key|value)' are official modules that are one of ours, side by side in this order.
      params: path of a parameter that is not a kernel, bias or statistic → official tensor and the shape that it has there,
        as a function of ours (without the axis of layers); the values are in the same order.
      matrices: path of a kernel → official tensor, where its name is not its module's and 'weight'.
      boxes: path of a kernel over boxes of pixels (transformer.patches) → frames and pixels of a box.
      unused: regular expressions of tensors that the published files may hold and that no score needs.
      message: of the error when the tensors are others.
    """
    modules: Mapping[str, str]
    message: str
    params: Mapping[str, tuple[str, Callable[[names.Shape], names.Shape]]] = dataclasses.field(default_factory=dict)
    matrices: Mapping[str, str] = dataclasses.field(default_factory=dict)
    boxes: Mapping[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()


def to_params(table: Table, model: Any, inputs: tuple, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Official tensors by name → parameters of `model`, float32 NumPy arrays.

    Args:
      table: of the network.
      model: the Flax module.
      inputs: shapes (jax.ShapeDtypeStruct) that it can be initialised with.
      tensors: as read from the file.

    Raises:
      ValueError: names every missing, unexpected and misshapen tensor.
    """
    origins = _origins(table, model, inputs)
    tensors = {name: tensor for name, tensor in tensors.items() if not any(re.fullmatch(p, name) for p in table.unused)}
    for source in origins.values():
        for name in source.official:
            parts = _parts(name)
            if len(parts) > 1 and all(part in tensors for part in parts):
                tensors[name] = np.concatenate([np.asarray(tensors.pop(part)) for part in parts])
    return traverse_util.unflatten_dict(dict(sources.leaves(tensors, origins, (), table.message)))


def shapes(table: Table, model: Any, inputs: tuple) -> dict[str, names.Shape]:
    """Names and shapes of the official tensors that `model` needs. Arguments are those of `to_params`."""
    result: dict[str, names.Shape] = {}
    for source in _origins(table, model, inputs).values():
        for name in source.official:
            parts = _parts(name)
            result |= {part: (source.shape[0] // len(parts), *source.shape[1:]) for part in parts}
    return result


def _parts(name: str) -> list[str]:
    found = _PARTS.search(name)
    return [name.replace(found.group(), part) for part in found.group(1).split('|')] if found else [name]


def _origins(table: Table, model: Any, inputs: tuple) -> dict[sources.KeyPath, sources.Source]:
    return {path: _source(table, path, shape) for path, shape in names.parameter_shapes(model, *inputs).items()}


def _source(table: Table, path: sources.KeyPath, shape: names.Shape) -> sources.Source:
    full, module, leaf = '/'.join(path), '/'.join(path[:-1]), path[-1]
    if full in table.params:
        name = table.params[full][0]
    else:
        name = table.matrices[full] if full in table.matrices else f'{table.modules[module]}.{_LEAVES[leaf]}'
    stacked = '{}' in name
    found = tuple(name.format(layer) for layer in range(shape[0])) if stacked else (name,)
    own = shape[1:] if stacked else shape
    if full in table.params:
        return sources.Source(found, table.params[full][1](own), lambda tensor: tensor.reshape(own), stacked)
    if full in table.boxes:
        frames, size = table.boxes[full]
        official = (own[1], own[0] // (frames * size * size), frames, size, size)
        assert math.prod(official) == math.prod(own), full
        return sources.Source(found, official, lambda tensor: tensor.transpose(2, 3, 4, 1, 0).reshape(own), stacked)
    if leaf == 'kernel':
        axes = (*range(2, len(own)), 1, 0)  # (out, in, *window) → (*window, in, out)
        return sources.Source(found, (own[-1], own[-2], *own[:-2]), lambda tensor: tensor.transpose(axes), stacked)
    return sources.Source(found, own, sources.as_it_is, stacked)
