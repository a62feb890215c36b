"""Digests follow the content, not the place."""
import dataclasses
import hashlib
import pathlib
import shutil

import pytest

from mmaudio_jax import fingerprints
from mmaudio_jax.weights import download
from mmaudio_jax.weights import files
from mmaudio_jax.weights import store
from tests import trained_run


@pytest.fixture(name='run')
def fixture_run(tmp_path, monkeypatch):
    trained_run.use_network(monkeypatch)
    trained_run.write_weights(tmp_path / 'run', trained_run.make_config())
    return tmp_path / 'run'


def test_weights_of_a_run(run, tmp_path):
    digest = fingerprints.of_weights(run, 'impacts', trained_run.STEP, {})
    shutil.copytree(run, tmp_path / 'moved')
    assert fingerprints.of_weights(tmp_path / 'moved', 'impacts', trained_run.STEP, {}) == digest
    config = trained_run.make_config()
    trained_run.write_weights(tmp_path / 'moved', config, trained_run.STEP + 5)
    assert fingerprints.of_weights(tmp_path / 'moved', 'impacts', trained_run.STEP, {}) == digest  # later ones do not count
    assert fingerprints.of_weights(tmp_path / 'moved', 'impacts', trained_run.STEP + 5, {}) != digest
    trained_run.write_weights(tmp_path / 'again', config, seed=1)
    assert fingerprints.of_weights(tmp_path / 'again', 'impacts', trained_run.STEP, {}) != digest


def test_a_damaged_average_is_left_to_whoever_reads_it(run):
    digest = fingerprints.of_weights(run, 'impacts', trained_run.STEP, {})
    for path in run.glob('ema/*/*.npz'):
        path.write_bytes(path.read_bytes()[:100])
    assert fingerprints.of_weights(run, 'impacts', trained_run.STEP, {}) != digest


def test_weights_of_an_official_file(tmp_path, monkeypatch):
    def converted(name, folder=None, **_):
        return pathlib.Path('cache') / f'{name}-{"0123456789ab" if folder is None else folder.name}-12345678.safetensors'
    monkeypatch.setattr(store, 'converted', converted)
    (tmp_path / 'mine').mkdir()
    sources = ('small_16k', tmp_path / 'mine')
    found = [fingerprints.of_weights(source, 'small_16k', None, {'folder': None}) for source in sources]
    assert found == ['mmaudio_small_16k-0123456789ab', 'mmaudio_small_16k-mine']


def test_codec_and_encoder_of_files_of_ones_own(tmp_path, monkeypatch):
    """Released files, and whatever has their content, have no name in it, so that older descriptions still fit."""
    monkeypatch.setattr(download, '_in_hub_cache', lambda *_: None)
    (tmp_path / 'mine').mkdir()
    places = {'cache': tmp_path / 'cache', 'folder': tmp_path / 'mine', 'offline': True, 'verify': False}
    of_codec = lambda **changes: fingerprints.of_codec('official', '16k', tmp_path / 'no.npz', places | changes)
    assert of_codec() is None
    vocoder = tmp_path / 'mine' / 'best_netG.pt'
    for content in (b'mine', b'another'):
        vocoder.write_bytes(content)
        assert of_codec() == {'bigvgan_16k': hashlib.md5(content).hexdigest()}
    monkeypatch.setattr(download, '_digest', lambda *_: pytest.fail('gigabytes are read again'))
    assert of_codec() == {'bigvgan_16k': hashlib.md5(b'another').hexdigest()}
    assert of_codec(verify=True) is None  # another file would be refused
    released = dataclasses.replace(files.get('bigvgan_16k'), md5=hashlib.md5(b'another').hexdigest())
    monkeypatch.setitem(files.BY_NAME, 'bigvgan_16k', released)
    assert of_codec() is None
    assert fingerprints.of_codec('pca', '16k', vocoder, places) == fingerprints.of_file(vocoder)


def test_files_without_a_published_md5(tmp_path, monkeypatch):
    """They are the released ones when they come from the hub."""
    hub = tmp_path / 'snapshots' / 'open_clip_pytorch_model.bin'
    hub.parent.mkdir()
    hub.write_bytes(b'released')
    monkeypatch.setattr(download, '_in_hub_cache', lambda *_: hub)
    places = {'cache': tmp_path / 'cache', 'folder': tmp_path, 'offline': True, 'verify': True}
    of_encoder = lambda name: fingerprints.of_encoder(name, (files.CLIP, files.SYNCHFORMER), places)
    assert of_encoder('official') == {}
    (tmp_path / hub.name).write_bytes(b'mine')
    assert of_encoder('official') == {'encoder': {'clip_vit_h_14_378': hashlib.md5(b'mine').hexdigest()}}
    assert of_encoder('pixels') == {}


def test_a_folder_of_official_files_holds_its_own_codec(tmp_path):
    places = {'folder': 'elsewhere', 'offline': True}
    assert fingerprints.loaded_from(tmp_path, None, places) == {'folder': tmp_path, 'offline': True}
    assert fingerprints.loaded_from(tmp_path, 10, places) == fingerprints.loaded_from('small_16k', None, places) == places
