"""Synthetic official tensors that are made when they are read, so that a full-size file never stands in memory twice."""
from collections.abc import Mapping
import dataclasses
import re
from typing import Any

from flax import traverse_util
import numpy as np

from tests.golden import synthetic_weights


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its shape is known, its values are made on access."""
    name: str
    shape: tuple[int, ...]

    def __array__(self, dtype=None, copy=None):
        return synthetic_weights.fill(self.name, self.shape).astype(dtype or np.float32, copy=False)


def full_size(checkpoint: str) -> dict[str, Tensor]:
    """All tensors of a manifest."""
    return {name: Tensor(name, shape) for name, shape in synthetic_weights.load_manifest(checkpoint).items()}


def params_of(mapping: Any, tensors: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """The parameters that a module of weights/ makes of all tensors of a file."""
    return traverse_util.unflatten_dict(dict(mapping.leaves(tensors, model)))


def tiny(checkpoint: str, sizes: dict[int, int], depths: dict[str, int]) -> dict[str, np.ndarray]:
    """The tensors of a manifest with its sizes replaced, and as many blocks below each prefix as `depths` says."""
    found = {}
    for name, shape in synthetic_weights.load_manifest(checkpoint).items():
        layer = re.fullmatch(r'(.*blocks\.)(\d+)\..*', name)
        if layer is None or int(layer[2]) < depths[layer[1]]:
            found[name] = synthetic_weights.fill(name, tuple(sizes.get(size, size) for size in shape))
    return found
