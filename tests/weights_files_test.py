"""The registry of official files against the manifests."""
import json

import pytest

from mmaudio_jax.models import mmaudio
from mmaudio_jax.weights import files
from mmaudio_jax.weights import store
from tests.conftest import GOLDEN


@pytest.mark.parametrize('name', files.BY_NAME)
def test_every_file_has_its_manifest(name):
    entry, manifest = files.BY_NAME[name], json.loads((GOLDEN / 'manifests' / f'{name}.json').read_text())
    assert entry.file == manifest['checkpoint']
    assert (entry.keys == ('generator',)) == ('generator' in manifest['container'])
    assert entry.url.endswith(f'/{entry.file}') and (entry.repo or '/v0.1/' in entry.url)
    assert len(entry.md5) == 32 or (entry.repo and not entry.md5)


@pytest.mark.parametrize('name', files.BY_NAME)
def test_every_model_is_built_with_the_manifests_tensors(name, monkeypatch):
    """The mapping of the model that `build` gives asks for exactly the tensors of the manifest."""
    asked = {}
    monkeypatch.setattr('mmaudio_jax.weights.names.check', lambda expected, found, message: asked.update(expected))
    mapping = store._MAPPINGS[files.get(name).kind]
    with pytest.raises((KeyError, StopIteration)):
        next(mapping.leaves({}, store.build(name)))
    manifest = json.loads((GOLDEN / 'manifests' / f'{name}.json').read_text())['tensors']
    unused = set(getattr(mapping, 'UNUSED', ()))
    assert {tensor: list(shape) for tensor, shape in asked.items()} == {t: s for t, s in manifest.items() if t not in unused}


@pytest.mark.parametrize('variant', mmaudio.VARIANTS)
def test_names_for_a_network(variant):
    names = files.names_for(variant)
    assert [files.get(name).kind for name in names] == ['network', 'vae', 'vocoder', 'clip', 'synchformer']
    assert files.get(names[0]).variant == variant
    assert files.get(names[1]).variant == files.get(names[2]).variant == variant.split('_')[1]


def test_unknown_names():
    with pytest.raises(ValueError, match="'vae_48k' is no official model; those that are: mmaudio_small_16k, "):
        files.get('vae_48k')
    with pytest.raises(ValueError, match="'huge' is no official network"):
        files.names_for('huge')
