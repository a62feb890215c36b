"""av-benchmark's caches as references. golden/av_benchmark was written by torch.save 2.13 in their layout, narrower."""
import numpy as np
import pytest

from mmaudio_jax import published_caches
from tests.conftest import GOLDEN

FOLDER = GOLDEN / 'av_benchmark'


def test_views_of_a_batch_are_read_by_clip():
    panns = published_caches.load(FOLDER, 'panns')
    assert list(panns) == ['a', 'b', 'c'] and len(panns) == 3
    np.testing.assert_array_equal(panns['b']['features'], np.arange(8, 16))
    np.testing.assert_array_equal(panns['c']['logits'], np.arange(20, 25))
    segments = published_caches.load(FOLDER, 'synchformer_picture')['b']['segments']
    np.testing.assert_array_equal(segments, np.arange(48, 96).reshape(2, 8, 3))  # its strides are not those of its shape


def test_patches_differ_in_number():
    vggish = published_caches.load(FOLDER, 'vggish')
    assert {name: vggish[name]['patches'].shape for name in vggish} == {'a': (3, 4), 'b': (2, 4)}


def test_two_files_of_one_network_give_the_clips_of_both_without_a_batch_axis():
    passt = published_caches.load(FOLDER, 'passt')
    assert list(passt) == ['a', 'b'] and passt['b']['features'].shape == (7,)
    np.testing.assert_array_equal(passt['b']['logits'], np.arange(15, 20))


def test_names_are_those_of_all_files(tmp_path):
    assert published_caches.names(FOLDER) == {'a', 'b', 'c'}
    with pytest.raises(FileNotFoundError, match='none of the caches'):
        published_caches.names(tmp_path)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='imagebind_video.pth'):
        published_caches.load(FOLDER, 'imagebind_picture')
    with pytest.raises(ValueError, match='no embeddings of clap_sound'):
        published_caches.load(FOLDER, 'clap_sound')
    (tmp_path / 'vggish_features.pth').write_bytes(b'PK no cache')
    with pytest.raises(ValueError, match='vggish_features.pth'):
        published_caches.load(tmp_path, 'vggish')
