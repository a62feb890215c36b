"""Files as torch.save writes them. That PyTorch itself reads them is shown where it is installed."""
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mmaudio_jax import media
from mmaudio_jax.weights import tensor_file
from mmaudio_jax.weights import torch_writer
from tests import full_disk

RNG = np.random.default_rng(0)
TENSORS = {
    'conv.weight': RNG.standard_normal((3, 4, 5)).astype(np.float32),
    'transposed': RNG.standard_normal((3, 4)).astype(np.float32).T,
    'scalar': np.array(2.5, np.float32),
    'empty': np.zeros((0, 3), np.float32),
    'bfloat16': RNG.standard_normal(5).astype(ml_dtypes.bfloat16),
    'half': np.ones(3, np.float16),
    'ints': np.arange(3),
    'bools': np.array([True, False]),
}


@pytest.mark.parametrize('keys', [(), ('generator',), ('a', 'b')])
def test_there_and_back(keys, tmp_path):
    torch_writer.write(tmp_path / 'x.pth', TENSORS, *keys)
    found = tensor_file.read(tmp_path / 'x.pth').tensors(*keys)
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert not array.size or found[name].ctypes.data % 64 == 0


@pytest.mark.parametrize('keys', [(), ('generator',)])
def test_pytorch_reads_it(keys, tmp_path):
    torch = pytest.importorskip('torch')
    torch_writer.write(tmp_path / 'x.pth', TENSORS, *keys)
    for mapped in (False, True):
        found = torch.load(tmp_path / 'x.pth', weights_only=True, mmap=mapped)
        for key in keys:
            found = found[key]
        for name, array in TENSORS.items():
            assert str(found[name].dtype).removeprefix('torch.') == str(array.dtype)
            np.testing.assert_array_equal(found[name].double().numpy(), array.astype(np.float64))


def test_the_zip_is_sound_and_always_the_same(tmp_path):
    torch_writer.write(tmp_path / 'x.pth', TENSORS)
    torch_writer.write(tmp_path / 'y.pth', TENSORS)
    assert (tmp_path / 'x.pth').read_bytes() == (tmp_path / 'y.pth').read_bytes()
    with zipfile.ZipFile(tmp_path / 'x.pth') as archive:
        assert archive.testzip() is None


def test_what_cannot_be_written(tmp_path):
    with pytest.raises(ValueError, match='x.pth: words is <U1'):
        torch_writer.write(tmp_path / 'x.pth', {'words': np.array(['a'])})
    with full_disk.after(500), pytest.raises(media.MediaError, match='x.pth: File too large'):
        torch_writer.write(tmp_path / 'x.pth', TENSORS)
    assert not list(tmp_path.iterdir())
