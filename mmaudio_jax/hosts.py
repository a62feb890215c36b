"""What the processes of a run tell each other, and what one of them says for all."""
from typing import Any

import jax
from jax.experimental import multihost_utils
import numpy as np


def say(text: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(text, flush=True)


def agreed(value: Any) -> Any:
    """Process 0's bool, int or array on every process: they may see files at other moments, and round otherwise."""
    if jax.process_count() == 1:
        return value
    whole = multihost_utils.broadcast_one_to_all(value)
    return whole if isinstance(value, np.ndarray) else type(value)(whole)


def to_host(array: Any) -> np.ndarray:
    """A global array as numpy on every process, also when other processes hold parts of it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def own_rows(array: jax.Array) -> dict[int, np.ndarray]:
    """Row → its values, of those rows of a global array that are this process's; every row is of one process."""
    rows: dict[int, np.ndarray] = {}
    for shard in array.addressable_shards:
        if shard.replica_id == 0:
            rows |= enumerate(np.asarray(shard.data), shard.index[0].start or 0)
    return rows
