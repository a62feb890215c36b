"""Digests follow the content, not the place."""
import pathlib
import shutil

import pytest

from mmaudio_jax import fingerprints
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


def test_weights_of_an_official_file(tmp_path, monkeypatch):
    def converted(name, folder=None, **_):
        return pathlib.Path('cache') / f'{name}-{"0123456789ab" if folder is None else folder.name}-12345678.safetensors'
    monkeypatch.setattr(store, 'converted', converted)
    (tmp_path / 'mine').mkdir()
    sources = ('small_16k', tmp_path / 'mine')
    found = [fingerprints.of_weights(source, 'small_16k', None, {'folder': None}) for source in sources]
    assert found == ['mmaudio_small_16k-0123456789ab', 'mmaudio_small_16k-mine']
