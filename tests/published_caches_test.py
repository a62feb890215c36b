"""av-benchmark's caches, as torch.save writes them, read as references."""
import numpy as np
import pytest

from mmaudio_jax import published_caches
from mmaudio_jax.weights import torch_writer


def _save(path, content):
    torch_writer.write(path, content)


def test_reads_every_cache(tmp_path):
    random = np.random.default_rng(0)
    arrays = {name: random.normal(size=shape).astype(np.float32) for name, shape in (
        ('panns', (2048,)), ('logits', (527,)), ('patches', (8, 128)), ('passt', (1, 768)), ('vector', (1024,)))}
    _save(tmp_path / 'pann_features.pth', {'a': {'2048': arrays['panns'], 'logits': arrays['logits'],
                                                 'clipwise_output': arrays['logits']}})
    _save(tmp_path / 'vggish_features.pth', {'a': arrays['patches'], 'b': arrays['patches'][:3]})
    _save(tmp_path / 'passt_features_embed.pth', {'a': arrays['passt'], 'b': arrays['passt']})
    _save(tmp_path / 'passt_logits.pth', {'a': arrays['logits']})
    panns = published_caches.load(tmp_path, 'panns')
    np.testing.assert_array_equal(panns['a']['features'], arrays['panns'])
    np.testing.assert_array_equal(panns['a']['logits'], arrays['logits'])
    vggish = published_caches.load(tmp_path, 'vggish')
    assert list(vggish) == ['a', 'b'] and vggish['b']['patches'].shape == (3, 128)
    passt = published_caches.load(tmp_path, 'passt')
    assert list(passt) == ['a'] and passt['a']['features'].shape == (768,)  # in both files, and without a batch axis
    with pytest.raises(FileNotFoundError, match='imagebind_video.pth'):
        published_caches.load(tmp_path, 'imagebind_picture')
    with pytest.raises(ValueError, match='no embeddings of clap_sound'):
        published_caches.load(tmp_path, 'clap_sound')
