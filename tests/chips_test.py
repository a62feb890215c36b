"""Described topologies and the bandwidth between their devices."""
import sys
import types

import pytest

from mmaudio_jax import chips


def devices(*shape):
    places = [(x, y, z) for z in range(shape[2]) for y in range(shape[1]) for x in range(shape[0])]
    return [types.SimpleNamespace(coords=place) for place in places]


def test_bandwidth_counts_axes_and_rings():
    chip = chips.CHIPS['v5e']
    square, pod = devices(8, 8, 1), devices(16, 16, 1)
    seconds = lambda group, shape: chips.collective_seconds(chip, 45e9, group, shape)
    assert seconds(square[:8], (8, 8, 1)) == 1  # a line
    assert seconds(square, (8, 8, 1)) == 1 / 2  # two lines
    assert seconds(pod, (16, 16, 1)) == 1 / 4  # two rings
    assert seconds(pod[:16], (16, 16, 1)) == 1 / 2
    assert seconds(pod[:8], (16, 16, 1)) == 1  # half of a ring is a line
    cube = devices(4, 4, 4)
    assert chips.collective_seconds(chips.CHIPS['v5p'], 90e9, cube, (4, 4, 4)) == 1 / 6


@pytest.mark.parametrize('topology', ['v5e', 'v5e:8', 'v9:2x2', 'v5e-64', 'v5e:axb'])
def test_a_mistake_in_the_topology_is_explained(topology):
    with pytest.raises(ValueError, match='v5e:16x16'):
        chips.devices_of(topology)


@pytest.mark.parametrize('topology', ['v5e:1x1', 'v5e:3x5', 'v5e:2x2x2', 'v5e:4x4x4', 'v5e:32x32', 'v6e:8x32', 'v5p:2x2',
                                      'v5p:2x4x8', 'v5p:4x4x6', 'v4:32x32x32', 'v4:0x4x4'])
def test_slices_that_do_not_exist_are_refused_with_those_that_do(topology):
    slices = ('2x2x1, 2x2x2, 2x2x4, 2x4x4, and multiples of 4x4x4 up to' if topology[1:3] in ('4:', '5p') else
              '2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16$')
    chip = topology.partition(':')[0]
    with pytest.raises(ValueError, match=f"^--topology is '{topology}'; {chip} has {slices}"):
        chips.devices_of(topology)


def test_any_other_failure_of_libtpu_is_told_without_advice(monkeypatch):
    pytest.importorskip('libtpu')

    def fail(*args, **options):
        raise RuntimeError('The TPU is already in use\nby another')
    monkeypatch.setattr('jax.experimental.topologies.get_topology_desc', fail)
    with pytest.raises(ValueError, match='cannot be described by libtpu: The TPU is already in use$'):
        chips.devices_of('v5e:2x2')


def test_without_libtpu_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, 'libtpu', None)
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'mmaudio_jax\[tpu\]'"):
        chips.devices_of('v5e:2x2')


def test_described_topologies():
    pytest.importorskip('libtpu')
    found = chips.devices_of('v5e:4x4')
    assert len(found) == 16 and chips.torus(found) == (4, 4, 1)
    found = chips.devices_of('v4:2x2x2')
    assert len(found) == 8 and found[0].num_cores == 2  # a device is a chip
    assert len(chips.devices_of('v5p:4x4x12')) == 192
    found = chips.devices_of('v5e:4x4', slices=2)
    assert len(found) == 32 and chips.torus(found) == (4, 4, 1) and {device.slice_index for device in found} == {0, 1}
    with pytest.raises(ValueError, match='config.compile.slices is 0; it must be at least 1'):
        chips.devices_of('v5e:4x4', slices=0)
