"""Tensors of a file in the container it comes in, without PyTorch: torch.save's zip and its older format, safetensors.

Arrays are read-only views of the mapped file: they cost memory only where they are read, and `release` gives that back.
"""
from collections.abc import Iterable
from collections.abc import Iterator
import contextlib
import dataclasses
import io
import json
import math
import mmap
import os
import pathlib
import struct
from typing import Any
import zipfile

import ml_dtypes
import numpy as np

from mmaudio_jax import media
from mmaudio_jax.media import Path
from mmaudio_jax.weights import pickles

_MAGIC = 0x1950A86A20F9469CFC6C  # of torch.save before PyTorch 1.6
_LOCAL_HEADER = 30  # bytes of a zip member's own header, before its name
_SAFETENSORS = {
    'F64': '<f8', 'F32': '<f4', 'F16': '<f2', 'BF16': ml_dtypes.bfloat16, 'I64': '<i8', 'I32': '<i4', 'I16': '<i2', 'I8': 'i1',
    'U64': '<u8', 'U32': '<u4', 'U16': '<u2', 'U8': 'u1', 'BOOL': '?', 'C64': '<c8',
}  # yapf: disable
_CODES = {np.dtype(dtype): code for code, dtype in _SAFETENSORS.items()}
_HEADER_BYTES = 1 << 18  # reserved for the header that `write` fills in at the end
_ALIGNMENT = 64  # bytes: what JAX asks of memory that it takes over without a copy


class TensorFileError(ValueError):
    """A file that cannot be read as tensors; one line that names it."""


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """An open file.

    Attributes:
      path: of the file.
      content: what was saved: containers, numbers, strings and arrays (bfloat16 as ml_dtypes.bfloat16).
      metadata: of a safetensors file, text by name.
    """
    path: pathlib.Path
    content: Any
    metadata: dict[str, str]
    _map: mmap.mmap

    def tensors(self, *keys: str) -> dict[str, np.ndarray]:
        """The dictionary of arrays below `keys`, e.g. 'generator'.

        Raises:
          TensorFileError: there is none.
        """
        found = self.content
        for key in keys:
            if not isinstance(found, dict) or key not in found:
                raise TensorFileError(f'{self.path}: holds no {"/".join(keys)!r}; it is another file than the one asked for')
            found = found[key]
        if not isinstance(found, dict):
            raise TensorFileError(f'{self.path}: holds {_article(found)}, not a dictionary of tensors')
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, np.ndarray):
                raise TensorFileError(f'{self.path}: {name!r} is {_article(value)}, not a tensor; are the tensors below '
                                      'another key?')
        return found

    def release(self) -> None:
        """Gives back the memory of all pages that were read; arrays stay valid and read them anew."""
        if hasattr(mmap, 'MADV_DONTNEED'):
            self._map.madvise(mmap.MADV_DONTNEED)


def _article(value: Any) -> str:
    return f'of type {type(value).__name__}'


def read(path: Path) -> TensorFile:
    """Opens a file of torch.save or a safetensors file; its name does not matter. Nothing in it is executed.

    Raises:
      TensorFileError: a pickle that asks for anything but tensors, dictionaries and numbers (named), a file cut short, or
        one of another kind.
      OSError: it is not there, is a folder, or may not be read.
    """
    path = pathlib.Path(path)
    with open(path, 'rb') as file:  # a folder, a missing file and a forbidden one say so themselves
        if not os.fstat(file.fileno()).st_size:
            raise TensorFileError(f'{path}: is empty')
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        with _one_line(path):
            content, metadata = _content(file, mapped)
    return TensorFile(path, content, metadata, mapped)


def check_sums(path: Path) -> None:
    """Compares every member of a zip of torch.save with its checksum; other containers have none.

    Raises:
      TensorFileError: one differs.
    """
    path = pathlib.Path(path)
    with _one_line(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if bad := archive.testzip():
                    raise TensorFileError(f'{path}: {bad} is damaged; get the file again')


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
    """Whatever goes wrong while reading `path` becomes one line that names it."""
    try:
        yield
    except pickles.Refused as error:
        raise TensorFileError(f'{path}: asks for {error}, which is not a tensor, a dictionary or a number: refused, nothing '
                              'of the file was executed') from error
    except zipfile.BadZipFile as error:
        raise TensorFileError(f'{path}: is cut short or damaged ({error}); get the file again') from error
    except (OSError, TensorFileError):
        raise
    except Exception as error:  # pylint: disable=broad-except; garbage makes pickle raise anything
        reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
        raise TensorFileError(f'{path}: is not a whole file of torch.save or safetensors ({reason}); get it again') from error


def _content(file: io.BufferedReader, mapped: mmap.mmap) -> tuple[Any, dict[str, str]]:
    if mapped[:4] == b'PK\x03\x04':
        return _zip(file, mapped), {}
    if mapped[8:9] == b'{':
        return _safetensors(mapped)
    if mapped[257:262] == b'ustar':
        raise ValueError('a tar of PyTorch older than 0.4: load and save it with a newer PyTorch')
    return _legacy(file, mapped), {}


def _zip(file: io.BufferedReader, mapped: mmap.mmap) -> Any:
    """torch.save since 1.6: data.pkl, and every storage as a member of its own, usually not compressed."""
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        roots = [name.removesuffix('data.pkl') for name in members if name.split('/')[-1] == 'data.pkl']
        if len(roots) != 1:
            raise ValueError('a zip file without data.pkl')
        root = roots[0]
        if f'{root}byteorder' in members and archive.read(f'{root}byteorder') != b'little':
            raise ValueError('saved on a big-endian machine, which is not supported')
        value = pickles.load(io.BytesIO(archive.read(f'{root}data.pkl')))
        storages: dict[str, np.ndarray] = {}

        def elements(storage: pickles.Storage) -> np.ndarray:
            if storage.key not in storages:
                info = members[f'{root}data/{storage.key}']
                stored = info.compress_type == zipfile.ZIP_STORED
                buffer, start = (mapped, _start(mapped, info)) if stored else (archive.read(info), 0)
                if storage.numel * storage.dtype.itemsize > info.file_size:
                    raise ValueError(f'storage {storage.key} is shorter than its tensors')
                storages[storage.key] = np.frombuffer(buffer, storage.dtype, storage.numel, start)
            return storages[storage.key]

        return pickles.resolve(value, elements)


def _start(mapped: mmap.mmap, info: zipfile.ZipInfo) -> int:
    """Where the bytes of a stored member begin."""
    header = mapped[info.header_offset:info.header_offset + _LOCAL_HEADER]
    if header[:4] != b'PK\x03\x04' or info.flag_bits & 1:
        raise zipfile.BadZipFile(f'member {info.filename}')
    name, extra = struct.unpack('<HH', header[26:30])
    return info.header_offset + _LOCAL_HEADER + name + extra


def _legacy(file: io.BufferedReader, mapped: mmap.mmap) -> Any:
    """torch.save before 1.6: five pickles (magic number, protocol, machine, value, storage keys), then the storages."""
    file.seek(0)
    if pickles.load(file) != _MAGIC:
        raise ValueError('a pickle, but not of torch.save')
    pickles.load(file)
    if not pickles.load(file)['little_endian']:
        raise ValueError('saved on a big-endian machine, which is not supported')
    value, keys = pickles.load(file), pickles.load(file)
    starts, position = {}, file.tell()
    sizes = dict(_storages(value))
    for key in keys:
        numel = struct.unpack('<q', mapped[position:position + 8])[0]
        starts[key] = position + 8
        position += 8 + numel * sizes[key]
    if position > len(mapped):
        raise ValueError(f'{position} bytes are announced, {len(mapped)} are there')
    return pickles.resolve(value, lambda storage: np.frombuffer(mapped, storage.dtype, storage.numel, starts[storage.key]))


def _storages(value: Any) -> Iterator[tuple[str, int]]:
    """Key and bytes an element of every storage that `value` uses."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _storages(item)
    storage = value.storage if isinstance(value, pickles.Tensor) else value
    if isinstance(storage, pickles.Storage):
        yield storage.key, storage.dtype.itemsize


def _safetensors(mapped: mmap.mmap) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    length = struct.unpack('<Q', mapped[:8])[0]
    if length > len(mapped) - 8:
        raise ValueError(f'a header of {length} bytes is announced')
    header = json.loads(mapped[8:8 + length])
    metadata = header.pop('__metadata__', {})
    arrays = {}
    for name, entry in header.items():
        begin, end = entry['data_offsets']
        dtype, shape = np.dtype(_SAFETENSORS[entry['dtype']]), tuple(entry['shape'])
        if not 0 <= begin <= end or end - begin != math.prod(shape) * dtype.itemsize:
            raise ValueError(f'tensor {name} has shape {shape} and bytes {begin} to {end}')
        arrays[name] = np.frombuffer(mapped, dtype, math.prod(shape), 8 + length + begin).reshape(shape)
    return arrays, metadata


def write_safetensors(path: Path, arrays: Iterable[tuple[str, np.ndarray]], metadata: dict[str, str]) -> None:
    """Writes a safetensors file array by array, beside its place, and renames it when whole.

    `arrays` is consumed one by one, so that no more than one array need be in memory: the header, which comes first in the
    file, is written last into room kept for it. Arrays whose bytes are a multiple of 64 stand first, the (small) others
    after them: so that all of the former start at a multiple of 64.

    Raises:
      media.MediaError: no space, no permission, no such folder; nothing is left behind.
    """
    header: dict[str, Any] = {'__metadata__': metadata}
    position, small = 0, []
    with media.atomic_file(path, synced=True) as beside, open(beside, 'wb') as file:
        file.write(bytes(_HEADER_BYTES))

        def append(name: str, array: np.ndarray) -> int:
            array = np.asarray(array, order='C')
            header[name] = {'dtype': _CODES[array.dtype], 'shape': list(array.shape),
                            'data_offsets': [position, position + array.nbytes]}
            file.write(array.reshape(-1).view(np.uint8))  # type: ignore[arg-type]
            return position + array.nbytes

        for name, array in arrays:
            if array.nbytes % _ALIGNMENT:
                small.append((name, np.array(array)))
            else:
                position = append(name, array)
        for name, array in small:
            position = append(name, array)
        text = json.dumps(header, separators=(',', ':')).encode()
        if len(text) > _HEADER_BYTES - 8:
            raise ValueError(f'{path}: {len(header)} names are too many for the room kept for them')
        file.seek(0)
        file.write(struct.pack('<Q', _HEADER_BYTES - 8) + text.ljust(_HEADER_BYTES - 8))
