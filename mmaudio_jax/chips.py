"""TPU chips as the compiler knows them, and topologies of them that are described rather than there.

Figures: the maker's public pages (memory, bandwidths) and clock rates at which the compiler's cycles of a large matrix product
give the published peak. A link's bandwidth is one way.
"""
from collections.abc import Sequence
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
      clock_hz: of `estimated_cycles`.
      memory_bytes, memory_bandwidth: of its main memory, bytes and bytes a second.
      link_bandwidth: bytes a second of one link in one direction.
      ring: an axis of the torus closes to a ring when its size is a multiple of this.
      arrangements: of its slices. cubes: most chips of a slice of cubes of 4x4x4, which are the larger ones; 0: has none.
      options: what names the chip's usual configuration to libtpu.
    """
    clock_hz: float
    memory_bytes: float
    memory_bandwidth: float
    link_bandwidth: float
    ring: int
    arrangements: tuple[str, ...]
    cubes: int = 0
    options: dict[str, str] = dataclasses.field(default_factory=dict)


_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_DEEP = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')
CHIPS = {
    'v4': Chip(1.05e9, 32 * 2**30, 1.2e12, 45e9, 4, _DEEP, 4096, {'chip_config_name': 'megacore'}),
    'v5e': Chip(1.5e9, 16 * 2**30, 0.82e12, 45e9, 16, _FLAT),
    'v5p': Chip(1.75e9, 95 * 2**30, 2.77e12, 90e9, 4, _DEEP, 8960),
    'v6e': Chip(1.75e9, 32 * 2**30, 1.64e12, 90e9, 16, _FLAT),
}


def devices_of(topology: str, slices: int = 1) -> list[Any]:
    """The devices of a described topology such as 'v5e:16x16' or 'v5p:4x4x4'; programs can be compiled for them, not run.

    With `slices`, of so many slices of that kind.

    Raises:
      ValueError: there are no such slices, or libtpu is not installed or does not describe them.
    """
    name, _, shape = topology.partition(':')
    if name not in CHIPS or not re.fullmatch(r'\d+x\d+(x\d+)?', shape):
        raise ValueError(f'--topology is {topology!r}; it must be a chip and its arrangement, such as v5e:16x16 or v5p:4x4x4; '
                         f'chips are {", ".join(CHIPS)}')
    if slices < 1:
        raise ValueError(f'config.compile.slices is {slices}; it must be at least 1')
    if not _exists(CHIPS[name], shape):
        cubes = f', and multiples of 4x4x4 up to {CHIPS[name].cubes} chips' if CHIPS[name].cubes else ''
        raise ValueError(f'--topology is {topology!r}; {name} has {", ".join(CHIPS[name].arrangements)}{cubes}')
    if importlib.util.find_spec('libtpu') is None:
        raise ValueError("the TPU compiler is not installed; get it by pip install 'mmaudio_jax[tpu]' (a TPU is not needed)")
    # There is no TPU here to ask about: without these libtpu looks for one on the network.
    for variable, value in (('TPU_SKIP_MDS_QUERY', '1'), ('TPU_ACCELERATOR_TYPE', 'v5litepod-8'),
                            ('TPU_WORKER_HOSTNAMES', 'localhost'), ('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')):
        os.environ.setdefault(variable, value)
    from jax.experimental import topologies
    options = CHIPS[name].options | ({'num_slices': slices} if slices > 1 else {})
    try:
        return list(topologies.get_topology_desc(topology, platform='tpu', **options).devices)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise ValueError(f'--topology {topology!r} cannot be described by libtpu: {reason}') from error


def _exists(chip: Chip, shape: str) -> bool:
    """Whether there are slices of this arrangement, in whatever order of the axes."""
    in_order = lambda text: sorted(map(int, text.split('x')))
    sizes = in_order(shape)
    if any(sizes == in_order(arrangement) for arrangement in chip.arrangements):
        return True
    return len(sizes) == 3 and not any(size % 4 for size in sizes) and 0 < math.prod(sizes) <= chip.cubes


def collective_seconds(chip: Chip, sent: float, group: Sequence[Any], shape: Sequence[int]) -> float:
    """Time in which every device of a group sends so many bytes over the links between them.

    Each axis of the torus on which the group lies carries its share: in both directions when it is a ring, in one when not,
    because then the links of the ends carry everything.

    Args:
      sent: bytes a device sends.
      group: devices, with their coordinates.
      shape: of the topology.
    """
    coordinates = np.array([device.coords for device in group])
    extents = [len(set(column)) for column in coordinates.T]
    links = sum(1 if extent < size or size % chip.ring else 2 for extent, size in zip(extents, shape) if extent > 1)
    return sent / (chip.link_bandwidth * max(links, 1))


def torus(devices: Sequence[Any]) -> tuple[int, ...]:
    """Sizes of the topology's axes, of one slice."""
    slices = len({getattr(device, 'slice_index', 0) for device in devices})
    sizes = tuple(int(n) + 1 for n in np.array([device.coords for device in devices]).max(axis=0))
    assert math.prod(sizes) * slices == len(devices)
    return sizes
