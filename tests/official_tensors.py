"""Synthetic official tensors that are made when they are read, so that a full-size file never stands in memory twice."""
import dataclasses
import re

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


def tiny(checkpoint: str, sizes: dict[int, int], depths: dict[str, int]) -> dict[str, np.ndarray]:
    """The tensors of a manifest with its sizes replaced, and as many blocks below each prefix as `depths` says."""
    found = {}
    for name, shape in synthetic_weights.load_manifest(checkpoint).items():
        layer = re.fullmatch(r'(.*blocks\.)(\d+)\..*', name)
        if layer is None or int(layer[2]) < depths[layer[1]]:
            found[name] = synthetic_weights.fill(name, tuple(sizes.get(size, size) for size in shape))
    return found
