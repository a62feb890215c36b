"""Many items through a jitted function, in calls of one size, on one device or with each call split over several."""
from collections.abc import Callable
from collections.abc import Sequence
import functools
import threading
from typing import Any, TypeVar
import weakref

import jax
from jax.sharding import Mesh
import numpy as np

from mmaudio_jax import partitioning

_Shared = TypeVar('_Shared')
_SHARED: weakref.WeakValueDictionary[tuple[Any, ...], Any] = weakref.WeakValueDictionary()
_SHARING = threading.Lock()


def shared(kind: Callable[..., _Shared], *arguments: Any) -> _Shared:
    """kind(*arguments), the same object for the same arguments as long as somebody holds it."""
    with _SHARING:
        found = _SHARED.get((kind, *arguments))
        if found is None:
            found = _SHARED[kind, *arguments] = kind(*arguments)
    return found


class LoadedOnce(functools.cached_property):
    """functools.cached_property for weights: a second thread waits for the first one, and loads nothing itself."""

    def __init__(self, function: Callable[[Any], Any]):
        super().__init__(function)
        self._loading = threading.RLock()

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        with self._loading:
            return super().__get__(instance, owner)


def put(params: Any, mesh: Mesh | None) -> Any:
    """Parameters on the default device, or whole on each device of the mesh."""
    return jax.device_put(params, None if mesh is None else partitioning.replicated(mesh))


def in_calls(function: Callable[[Any], Any], items: np.ndarray | Sequence[np.ndarray], size: int, mesh: Mesh | None) -> Any:
    """function(items) in calls of one size, of which one runs while the next is handed over.

    Args:
      function: jitted; its results, a pytree, have the items' first dimension.
      items: at least one, of one shape. The last call is filled up with copies of its last one, and cut back.
      size: items a call, on each part of the mesh.
      mesh: splits each call by partitioning.batch_sharding; None: the default device.

    Returns:
      The results as NumPy arrays.
    """
    if mesh is not None:
        size *= partitioning.batch_shards(mesh)
    results: list[Any] = []
    for start in range(0, len(items), size):
        part = [*items[start:start + size]]
        stacked = np.stack(part + part[-1:] * (size - len(part)))
        results.append(function(stacked if mesh is None else jax.device_put(stacked, partitioning.batch_sharding(mesh))))
        if len(results) > 1:
            results[-2] = jax.tree.map(np.asarray, results[-2])
    return jax.tree.map(lambda *parts: np.concatenate([np.asarray(part) for part in parts])[:len(items)], *results)
