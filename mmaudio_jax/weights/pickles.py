"""The pickle inside a file of torch.save, read by an unpickler that knows tensors, dictionaries and numbers only.

Nothing of the file is executed: every name that a pickle asks for is looked up in the table below, and a name that is not
there is refused. What the table gives are inert records, which `resolve` turns into arrays.
"""
from collections.abc import Callable
import dataclasses
import pickle
import re
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

DTYPES = {
    'DoubleStorage': np.dtype('<f8'),
    'FloatStorage': np.dtype('<f4'),
    'HalfStorage': np.dtype('<f2'),
    'BFloat16Storage': np.dtype(ml_dtypes.bfloat16),
    'LongStorage': np.dtype('<i8'),
    'IntStorage': np.dtype('<i4'),
    'ShortStorage': np.dtype('<i2'),
    'CharStorage': np.dtype('i1'),
    'ByteStorage': np.dtype('u1'),
    'BoolStorage': np.dtype('?'),
    'ComplexFloatStorage': np.dtype('<c8'),
    'ComplexDoubleStorage': np.dtype('<c16'),
}


class Refused(Exception):
    """A pickle that asks for more than tensors, dictionaries and numbers; the text names it."""


class _Closed:
    """Takes no state: a pickle cannot change what it was given."""

    def __setstate__(self, state):
        raise Refused(f'a change of {type(self).__name__}')


@dataclasses.dataclass
class StorageType(_Closed):
    """A storage class of torch, by name."""
    name: str


@dataclasses.dataclass
class Storage(_Closed):
    """Elements that stand elsewhere in the file under `key`."""
    key: str
    dtype: np.dtype
    numel: int


@dataclasses.dataclass
class Tensor(_Closed):
    """A view of a storage; offset and strides count elements."""
    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Dict(dict):
    """collections.OrderedDict, without the attributes (module versions) that torch hangs on it."""

    def __setstate__(self, state):
        pass


class _Dtype:
    """numpy.dtype of a plain number; anything else is refused."""

    def __init__(self, name: str, *_: Any):
        if not re.fullmatch(r'[biufc]\d{1,2}', str(name)):
            raise Refused(f'an array of numpy.dtype {str(name)!r}')
        self.order, self.name = '<', name

    def __setstate__(self, state):
        self.order = '>' if state[1] == '>' else '<'

    @property
    def value(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array:
    """numpy.ndarray of plain numbers."""
    value = np.zeros(0)

    def __setstate__(self, state):
        _, shape, dtype, fortran, data = state
        self.value = np.frombuffer(data, dtype.value).reshape(shape, order='F' if fortran else 'C')


def _tensor(storage, offset, size, stride, *_):
    return Tensor(storage, offset, tuple(size), tuple(stride))


def _array(*_):
    return _Array()


def _scalar(dtype, data):
    return np.frombuffer(data, dtype.value)[0]


# What a pickle may ask for. protocol 2 spells bytes as _codecs.encode; numpy.ndarray is only an argument.
_NAMES: dict[str, Callable] = {
    'collections.OrderedDict': _Dict,
    'torch.Size': tuple,
    'torch._utils._rebuild_tensor': _tensor,
    'torch._utils._rebuild_tensor_v2': _tensor,
    'torch._utils._rebuild_parameter': lambda data, *_: data,
    '_codecs.encode': lambda text, *_: text.encode('latin1'),
    'numpy.ndarray': _array,
    'numpy.dtype': _Dtype,
    'numpy.core.multiarray._reconstruct': _array,
    'numpy._core.multiarray._reconstruct': _array,
    'numpy.core.multiarray.scalar': _scalar,
    'numpy._core.multiarray.scalar': _scalar,
}


class _Name(_Closed):
    """A function of the table, which a pickle may call and do nothing else with."""
    __slots__ = ('function',)

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, *arguments):
        return self.function(*arguments)


class _Unpickler(pickle.Unpickler):

    def find_class(self, module, name):
        if module == 'torch' and name in DTYPES:
            return StorageType(name)
        if f'{module}.{name}' not in _NAMES:
            raise Refused(f'{module}.{name}')
        return _Name(_NAMES[f'{module}.{name}'])

    def persistent_load(self, pid):
        kind, storage_type, key, _, numel, *view = pid
        if kind != 'storage' or not isinstance(storage_type, StorageType) or any(part is not None for part in view):
            raise Refused(f'a stored object {kind!r} that is no plain storage')
        if not isinstance(numel, int) or numel < 0:
            raise ValueError(f'a storage of {numel!r} elements')
        return Storage(str(key), DTYPES[storage_type.name], numel)


def load(file: BinaryIO) -> Any:
    """The next pickle of `file`: plain containers, numbers, strings, and records of this module.

    Raises:
      Refused: it asks for anything else.
      Exception: what pickle raises on garbage, which may be of any type.
    """
    return _Unpickler(file).load()


def resolve(value: Any, elements: Callable[[Storage], np.ndarray]) -> Any:
    """`value` of `load` with arrays in place of its records.

    Args:
      value: as loaded; containers come back as plain dict, list and tuple.
      elements: a storage → its elements, one-dimensional.

    Raises:
      ValueError: a tensor that reaches outside its storage.
    """
    if isinstance(value, dict):
        return {key: resolve(item, elements) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [resolve(item, elements) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Tensor):
        return _view(value, elements(value.storage))
    if isinstance(value, Storage):
        return elements(value)
    return value.value if isinstance(value, _Array) else value


def _view(tensor: Tensor, flat: np.ndarray) -> np.ndarray:
    shape, strides = tensor.shape, tensor.strides
    numbers = (tensor.offset, *shape, *strides)
    if len(shape) != len(strides) or not all(isinstance(number, int) and number >= 0 for number in numbers):
        raise ValueError(f'a tensor of offset {tensor.offset}, shape {shape} and strides {strides}')
    if 0 in shape:
        return flat[:0].reshape(shape)
    last = tensor.offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
    if last >= len(flat):
        raise ValueError(f'a tensor that ends at element {last} of a storage of {len(flat)}')
    return np.lib.stride_tricks.as_strided(flat[tensor.offset:], shape, [stride * flat.itemsize for stride in strides],
                                           writeable=False)
