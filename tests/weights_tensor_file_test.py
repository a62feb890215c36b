"""Reading every container: values, laziness, damage. The torch_* goldens were made by PyTorch 2.13 (golden/torch_files.py)."""
import errno
import json
import os
import shutil
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mmaudio_jax import media
from mmaudio_jax.weights import tensor_file
from tests.conftest import GOLDEN
from tests.golden import torch_files

CONTAINERS = ('torch_zip.pth', 'torch_legacy.pth')


@pytest.mark.parametrize('name', CONTAINERS)
def test_files_of_pytorch(name):
    file = tensor_file.read(GOLDEN / name)
    found = file.tensors('generator')
    assert found.keys() == torch_files.values().keys()
    for key, expected in torch_files.values().items():
        assert found[key].shape == expected.shape and not found[key].flags.writeable
        assert found[key].dtype == (ml_dtypes.bfloat16 if key == 'bfloat16' else expected.dtype)
        np.testing.assert_array_equal(found[key].astype(expected.dtype), expected, err_msg=key)
    norm = file.tensors('norm')
    assert norm.keys() == {'bias', *torch_files.WEIGHT_NORM}
    assert [norm[key].shape for key in torch_files.WEIGHT_NORM] == [(2, 1), (2, 3)]
    rest = {key: file.content[key] for key in ('steps', 'size', 'score', 'notes')}
    assert rest == {'steps': 3, 'size': (4, 6), 'score': 0.25, 'notes': ['text', None, (True, 1.5)]}
    np.testing.assert_array_equal(file.content['array'], np.arange(6.0).reshape(2, 3))


@pytest.mark.parametrize('name', CONTAINERS)
def test_arrays_are_views_of_the_file(name):
    file = tensor_file.read(GOLDEN / name)
    tensors = file.tensors('generator')
    assert np.shares_memory(tensors['whole'], tensors['transposed'])
    before = np.array(tensors['part'])
    file.release()
    np.testing.assert_array_equal(tensors['part'], before)


def test_compressed_members(tmp_path):
    with zipfile.ZipFile(GOLDEN / 'torch_zip.pth') as source, zipfile.ZipFile(tmp_path / 'x.pth', 'w') as to:
        for info in source.infolist():
            to.writestr(info.filename, source.read(info), zipfile.ZIP_DEFLATED)
    found = tensor_file.read(tmp_path / 'x.pth').tensors('generator')
    np.testing.assert_array_equal(found['part'], torch_files.values()['part'])


def test_check_sums(tmp_path):
    path = tmp_path / 'torch_zip.pth'
    shutil.copy(GOLDEN / 'torch_zip.pth', path)
    tensor_file.check_sums(path)
    tensor_file.check_sums(GOLDEN / 'torch_legacy.pth')
    at = path.read_bytes().index(np.arange(5, dtype=np.float32).tobytes())
    with path.open('r+b') as file:
        file.seek(at)
        file.write(b'\x01')
    with pytest.raises(tensor_file.TensorFileError, match='torch_zip.pth: torch_zip/data/0 is damaged'):
        tensor_file.check_sums(path)


def _safetensors(path):
    safetensors.numpy.save_file({'a': np.arange(6.0).reshape(2, 3)}, path)


@pytest.mark.parametrize('name', (*CONTAINERS, 'x.safetensors'))
@pytest.mark.parametrize('share', [0.02, 0.3, 0.6, 0.9, 0.99])
def test_a_file_cut_short_is_one_line(name, share, tmp_path):
    path = tmp_path / name
    _safetensors(path) if name == 'x.safetensors' else shutil.copy(GOLDEN / name, path)
    os.truncate(path, int(share * path.stat().st_size))
    with pytest.raises(tensor_file.TensorFileError) as error:
        tensor_file.read(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('change, message', [
    (lambda path: path.write_bytes(b''), 'is empty'),
    (lambda path: path.write_bytes(b'<html>not found</html>' * 9), 'is not a whole file'),
    (lambda path: np.savez(path.open('wb'), a=1), 'without data.pkl'),
    (lambda path: path.write_bytes(b'\x80\x02K\x01.'), 'not of torch.save'),
    (lambda path: path.write_bytes(bytes(257) + b'ustar' + bytes(300)), 'older than 0.4'),
    (lambda path: path.write_bytes(struct.pack('<Q', 1 << 40) + b'{}'), 'is not a whole file'),
    (lambda path: path.write_bytes(_header({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 4]}})), 'tensor a'),
    (lambda path: path.write_bytes(_header({'a': {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}})), 'not a whole file'),
])
def test_other_files_are_one_line(change, message, tmp_path):
    path = tmp_path / 'x.pth'
    change(path)
    with pytest.raises(tensor_file.TensorFileError, match=message) as error:
        tensor_file.read(path)
    assert str(path) in str(error.value) and '\n' not in str(error.value)


def _header(header):
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + bytes(4)


def test_a_folder_and_nothing(tmp_path):
    with pytest.raises(IsADirectoryError, match=str(tmp_path)):
        tensor_file.read(tmp_path)
    with pytest.raises(FileNotFoundError, match='nothing.pth'):
        tensor_file.read(tmp_path / 'nothing.pth')


def test_big_endian_is_refused(tmp_path):
    with zipfile.ZipFile(GOLDEN / 'torch_zip.pth') as source, zipfile.ZipFile(tmp_path / 'x.pth', 'w') as to:
        for info in source.infolist():
            to.writestr(info.filename, b'big' if info.filename.endswith('byteorder') else source.read(info))
    with pytest.raises(tensor_file.TensorFileError, match='big-endian'):
        tensor_file.read(tmp_path / 'x.pth')


@pytest.mark.parametrize('keys, message', [(('discriminator',), "holds no 'discriminator'"), (('steps',), 'of type int'),
                                           ((), "'generator' is of type dict")])
def test_tensors_that_are_not_there(keys, message):
    with pytest.raises(tensor_file.TensorFileError, match=message):
        tensor_file.read(GOLDEN / 'torch_zip.pth').tensors(*keys)


def test_written_files_are_standard_and_aligned(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {'odd': rng.standard_normal(3).astype(np.float32), 'a/kernel': rng.standard_normal((5, 16)).astype(np.float32),
              'scalar': np.float32(2.5).reshape(()), 'b': rng.standard_normal((8, 4)).astype(ml_dtypes.bfloat16).T,
              'ints': np.arange(16)}
    path = tmp_path / 'x.safetensors'
    tensor_file.write_safetensors(path, iter(arrays.items()), {'source': 'test'})
    theirs, ours = safetensors.numpy.load_file(path), tensor_file.read(path)
    assert theirs.keys() == ours.content.keys() == arrays.keys() and ours.metadata == {'source': 'test'}
    for name, array in arrays.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours.content[name], array)
        assert ours.content[name].dtype == array.dtype and ours.content[name].shape == array.shape
        assert array.nbytes % 64 or ours.content[name].ctypes.data % 64 == 0
    assert os.listdir(tmp_path) == ['x.safetensors']


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(media.MediaError, match='x.safetensors: No space'):
        tensor_file.write_safetensors(tmp_path / 'x.safetensors', [('a', np.zeros(3))], {})
    assert not list(tmp_path.iterdir())
