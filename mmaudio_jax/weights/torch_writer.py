"""Writes tensors as torch.save does (a zip since PyTorch 1.6), without PyTorch: torch.load(weights_only=True) reads them."""
from collections.abc import Mapping
import struct
import zipfile

import numpy as np

from mmaudio_jax import media
from mmaudio_jax.media import Path
from mmaudio_jax.weights import pickles

_STORAGES = {dtype: name for name, dtype in pickles.DTYPES.items()}
_ALIGNMENT = 64  # bytes, of every storage in the file
_LOCAL_HEADER = 30
_DATE = (1980, 1, 1, 0, 0, 0)  # the same tensors give the same bytes


def write(path: Path, tensors: Mapping[str, np.ndarray], *keys: str) -> None:
    """Writes a dictionary of tensors, below `keys` when there are any, beside its place and renames it when whole.

    Raises:
      ValueError: an array of a dtype that torch's files do not have.
      media.MediaError: no space, no permission, no such folder; nothing is left behind.
    """
    for name, array in tensors.items():
        if array.dtype not in _STORAGES:
            raise ValueError(f'{path}: {name} is {array.dtype}, which cannot be written')
    with media.atomic_file(path, synced=True) as beside, zipfile.ZipFile(beside, 'w') as archive:
        _member(archive, 'data.pkl', _pickle(tensors, keys))
        _member(archive, 'byteorder', b'little')
        for key, array in enumerate(tensors.values()):
            _member(archive, f'data/{key}', np.asarray(array, order='C').reshape(-1).view(np.uint8))
        _member(archive, 'version', b'3\n')


def _member(archive: zipfile.ZipFile, name: str, data: bytes | np.ndarray) -> None:
    info = zipfile.ZipInfo(f'archive/{name}', _DATE)
    start = archive.start_dir + _LOCAL_HEADER + len(info.filename) + 4  # of the data, after an extra field without content
    padding = -start % _ALIGNMENT
    info.extra = struct.pack('<2sH', b'FB', padding) + bytes(padding)
    info.file_size = len(data)
    with archive.open(info, 'w') as member:
        member.write(data)  # type: ignore[arg-type]


def _pickle(tensors: Mapping[str, np.ndarray], keys: tuple[str, ...]) -> bytes:
    """The program that builds the dictionary, protocol 2."""
    items = [_text(name) + _tensor(str(key), array) for key, (name, array) in enumerate(tensors.items())]
    program = b'}(' + b''.join(items) + b'u'
    for key in reversed(keys):
        program = b'}' + _text(key) + program + b's'
    return b'\x80\x02' + program + b'.'


def _tensor(key: str, array: np.ndarray) -> bytes:
    strides = [stride // array.itemsize for stride in np.asarray(array, order='C').strides]
    storage = _tuple(_text('storage'), _global('torch', _STORAGES[array.dtype]), _text(key), _text('cpu'), _number(array.size))
    arguments = _tuple(storage + b'Q', _number(0), _tuple(*map(_number, array.shape)), _tuple(*map(_number, strides)), b'\x89',
                       _global('collections', 'OrderedDict') + b')R')
    return _global('torch._utils', '_rebuild_tensor_v2') + arguments + b'R'


def _text(text: str) -> bytes:
    data = text.encode()
    return b'X' + struct.pack('<I', len(data)) + data


def _number(number: int) -> bytes:
    data = number.to_bytes(9, 'little', signed=True)
    return b'\x8a\x09' + data if number >= 1 << 31 else b'J' + struct.pack('<i', number)


def _tuple(*items: bytes) -> bytes:
    return b'(' + b''.join(items) + b't'


def _global(module: str, name: str) -> bytes:
    return f'c{module}\n{name}\n'.encode()
