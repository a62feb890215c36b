"""The restricted unpickler: what is dangerous is refused by name before it runs, what is broken is an error."""
import io
import os
import pathlib
import pickle

import numpy as np
import pytest

from mmaudio_jax.weights import pickles


class Call:
    """Pickles as a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def load(data: bytes):
    return pickles.load(io.BytesIO(data))


@pytest.mark.parametrize('protocol', range(2, 6))
@pytest.mark.parametrize('wrap', [lambda x: x, lambda x: {'generator': {'conv.weight': [1, (x,)]}}], ids=['plain', 'nested'])
@pytest.mark.parametrize('function, name', [
    (os.system, f'{os.name}.system'),
    (eval, 'builtin.*eval'),
    (getattr, 'builtin.*getattr'),
    (pathlib.Path, 'pathlib.'),
], ids=lambda x: getattr(x, '__name__', x))
def test_a_call_is_refused_by_name_and_not_made(function, name, wrap, protocol, tmp_path):
    victim = tmp_path / 'made'
    argument = f'touch {victim}' if function is os.system else f'open({str(victim)!r}, "w")'
    with pytest.raises(pickles.Refused, match=name):
        load(pickle.dumps(wrap(Call(function, argument)), protocol))
    assert not victim.exists()


@pytest.mark.parametrize('program', [
    b"(S'true'\nios\nsystem\n.",  # INST
    b"cos\nsystem\n(S'true'\no.",  # GLOBAL
    b'\x80\x04\x8c\x02os\x8c\x06system\x93.',  # STACK_GLOBAL
    b'ctorch._utils\n_rebuild_tensor_v3\n.',
    b'ctorch\nnn.Module\n.',
    b'\x80\x04\x8c\x0ctorch._utils\x8c\x1b_rebuild_tensor.__globals__\x93.',  # an attribute of what is allowed
])
def test_other_spellings_are_refused(program):
    with pytest.raises(pickles.Refused):
        load(program)


@pytest.mark.parametrize('program', [
    b"ctorch._utils\n_rebuild_tensor_v2\n}S'__code__'\nNsb.",
    b"ctorch\nFloatStorage\n}S'name'\nS'LongStorage'\nsb.",
    b"ccollections\nOrderedDict\n(N}S'items'\nNstb.",
])
def test_what_the_table_gives_cannot_be_changed(program):
    with pytest.raises(pickles.Refused, match='a change of'):
        load(program)
    assert pickles.DTYPES['FloatStorage'] == np.float32


def test_an_ordered_dictionary_is_a_dictionary():
    loaded = load(b"ccollections\nOrderedDict\n)R(S'a'\nI1\nu}S'_metadata'\nNsb.")
    assert pickles.resolve(loaded, lambda storage: np.zeros(0)) == {'a': 1}


def test_objects_in_numpy_arrays_are_refused():
    with pytest.raises(pickles.Refused, match="numpy.dtype 'O8'"):
        load(pickle.dumps(np.array([os.system], object), 2))


@pytest.mark.parametrize('offset, shape, strides', [(0, (4, 6), (6, 2)), (1, (24,), (1,)), (-1, (2,), (1,)), (0, (2,), (-1,)),
                                                    (0, (2, 2), (1,)), (0, ('2',), (1,)), (25, (), ())])
def test_a_tensor_stays_in_its_storage(offset, shape, strides):
    storage = pickles.Storage('0', np.dtype('<f4'), 24)
    with pytest.raises(ValueError, match='a tensor'):
        pickles.resolve(pickles.Tensor(storage, offset, shape, strides), lambda _: np.zeros(24, np.float32))


def test_views_honour_offset_and_strides():
    flat = np.arange(24, dtype=np.float32)
    storage = pickles.Storage('0', flat.dtype, 24)
    view = pickles.resolve([pickles.Tensor(storage, 6, (3, 2), (2, 6))], lambda _: flat)[0]
    np.testing.assert_array_equal(view, flat.reshape(4, 6)[1:3, ::2].T)
    assert not view.flags.writeable
