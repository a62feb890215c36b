"""av-benchmark's caches as references. golden/av_benchmark was written by torch.save 2.13 in their layout, narrower."""
import shutil

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


def test_caches_of_another_length_are_refused(tmp_path):
    """The longest clip of the patches has 3, for 2.9 to 3.8 s; that of the segments 2, for 0.96 to 1.2 s."""
    for embedder, fits, other in (('vggish_features', 3.0, 5.0), ('synchformer_video', 1.0, 8.0)):
        folder = tmp_path / embedder
        folder.mkdir()
        shutil.copy(FOLDER / 'pann_features.pth', folder)
        assert 'is not known' in published_caches.length_note(folder, other)
        shutil.copy(FOLDER / f'{embedder}.pth', folder)
        assert published_caches.length_note(folder, fits) == ''
    with pytest.raises(ValueError, match='vggish_features.pth: its clips have up to 3 patches, but 5 s have 5; set config'):
        published_caches.length_note(tmp_path / 'vggish_features', 5.0)
    with pytest.raises(ValueError, match='synchformer_video.pth: its clips have up to 2 segments, but 8 s have 24; set'):
        published_caches.length_note(tmp_path / 'synchformer_video', 8.0)


def test_what_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match='imagebind_video.pth'):
        published_caches.load(FOLDER, 'imagebind_picture')
    with pytest.raises(ValueError, match='no embeddings of clap_sound'):
        published_caches.load(FOLDER, 'clap_sound')
    (tmp_path / 'vggish_features.pth').write_bytes(b'PK no cache')
    with pytest.raises(ValueError, match='vggish_features.pth'):
        published_caches.load(tmp_path, 'vggish')
