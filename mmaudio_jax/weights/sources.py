"""From which official tensors a parameter comes, and how it is laid out: what the importers of transformers share.

A parameter of repeated blocks is a stack of one tensor a block. Leaves are made one after the other, so that tensors which are
read from a file on access never stand in memory all at once.
"""
from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from mmaudio_jax.weights import names

KeyPath = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Source:
    """The origin of one parameter.

    Attributes:
      official: names of the tensors, one for each layer of a stack, or the only one.
      shape: of each of them.
      layout: one official tensor → one layer of ours; a view is enough.
      stacked: whether the parameter has an axis of layers in front.
    """
    official: tuple[str, ...]
    shape: names.Shape
    layout: Callable[[np.ndarray], np.ndarray]
    stacked: bool


def transposed(tensor: np.ndarray) -> np.ndarray:
    """Official matrices are (out, in), ours (in, out)."""
    return tensor.T


def as_it_is(tensor: np.ndarray) -> np.ndarray:
    """For what both hold alike."""
    return tensor


def leaves(tensors: Mapping[str, Any], sources: Mapping[KeyPath, Source], ignored: Iterable[str],
           message: str) -> Iterator[tuple[KeyPath, np.ndarray]]:
    """Parameters from official tensors, one by one with their paths, float32 NumPy arrays.

    Args:
      tensors: anything with a shape that NumPy can read.
      sources: of every parameter.
      ignored: names of tensors that may be there and are not used; a name that ends in '.' stands for all that start with it.
      message: of the error.

    Raises:
      ValueError: before the first: `message`, then every missing, unexpected and misshapen tensor.
    """
    skipped = tuple(ignored)
    found = {name: tuple(np.shape(tensor)) for name, tensor in tensors.items() if not _is_in(name, skipped)}
    names.check({name: source.shape for source in sources.values() for name in source.official}, found, message)
    for path, source in sources.items():
        yield path, _leaf(tensors, source)


def _is_in(name: str, skipped: tuple[str, ...]) -> bool:
    return any(name == entry or entry.endswith('.') and name.startswith(entry) for entry in skipped)


def _leaf(tensors: Mapping[str, Any], source: Source) -> np.ndarray:
    def layer(name):
        return source.layout(np.asarray(tensors[name], np.float32))

    first = layer(source.official[0])
    if not source.stacked:
        return np.array(first, order='C')
    leaf = np.empty((len(source.official), *first.shape), np.float32)
    leaf[0] = first
    for index, name in enumerate(source.official[1:], 1):
        leaf[index] = layer(name)
    return leaf
