"""Embeddings on disk: found again by what they are, made anew when anything changes, resumed, and never of another clip."""
import shutil

import jax
import numpy as np
import pytest

from mmaudio_jax import embedders
from mmaudio_jax import embeddings
from tests import scored_folders


@pytest.fixture(name='setting')
def fixture_setting(tmp_path, monkeypatch):
    scored_folders.use(monkeypatch)
    sounds = scored_folders.write_sounds(tmp_path / 'sounds', 0.01, clips=5)
    shutil.copy(sounds / 'clip_01.wav', sounds / 'again.wav')
    weights = scored_folders.write_weights(tmp_path / 'weights')
    settings = embeddings.Settings(weights, tmp_path / 'cache', 8.0, 2, 2)
    return {path.stem: path for path in sorted(sounds.glob('*.wav'))}, settings


def _count(monkeypatch):
    """Counts the batches that are computed."""
    calls, original = [], embedders.precise

    def precise(apply):
        jitted = original(apply)
        return lambda *arguments: calls.append(len(arguments[1])) or jitted(*arguments)
    monkeypatch.setattr(embedders, 'precise', precise)
    return calls


def test_only_what_is_new_is_computed(setting, monkeypatch):
    clips, settings = setting
    calls = _count(monkeypatch)
    network = embedders.embedders(settings.weights)['panns']
    first = embeddings.embed(network, clips, settings, 'x')
    assert len(first) == 6 and not first.failed and sum(calls) == jax.device_count()  # five different clips fill one batch
    np.testing.assert_array_equal(first['again']['features'], first['clip_01']['features'])
    calls.clear()
    embeddings.embed(network, clips, settings, 'x')
    assert not calls
    shutil.copy(clips['clip_00'], clips['clip_02'])  # known content under another name
    second = embeddings.embed(network, clips, settings, 'x')
    assert not calls
    np.testing.assert_array_equal(second['clip_02']['features'], first['clip_00']['features'])


def test_nothing_is_stale(setting, monkeypatch):
    clips, settings = setting
    calls = _count(monkeypatch)
    networks = embedders.embedders(settings.weights)
    embeddings.embed(networks['panns'], clips, settings, 'x')
    for changed, network in ((embeddings.Settings(settings.weights, settings.cache, 1.0, 2, 2), networks['panns']),
                             (settings, networks['passt'])):
        calls.clear()
        embeddings.embed(network, clips, changed, 'x')
        assert calls
    calls.clear()
    scored_folders.write_weights(settings.weights, 2.0)
    doubled = embeddings.embed(networks['panns'], clips, settings, 'x')
    assert calls and len(doubled) == 6


def test_batches_and_lengths_change_nothing(setting, tmp_path):
    clips, settings = setting
    scored_folders.write_sounds(tmp_path / 'short', 0.02, clips=3, seconds=0.9)
    mixed = clips | {f's{path.stem}': path for path in sorted((tmp_path / 'short').glob('*.wav'))}
    network = embedders.embedders(settings.weights)['panns']
    stored = embeddings.embed(network, mixed, settings, 'x')
    params, apply = network.load(settings.weights)
    for name, path in mixed.items():
        alone = apply(params, network.prepare(path, 8.0)[None])['features'][0]
        np.testing.assert_allclose(stored[name]['features'], alone, rtol=1e-5, err_msg=name)


def test_failures_are_told_and_the_rest_is_done(setting):
    clips, settings = setting
    clips['clip_03'].write_bytes(b'broken')
    clips['absent'] = clips['clip_03'].with_name('absent.wav')
    stored = embeddings.embed(embedders.embedders(settings.weights)['vggish'], clips, settings, 'x')
    assert set(stored.failed) == {'clip_03', 'absent'} and len(stored) == 5 and 'clip_03' not in stored
    assert not list(settings.cache.rglob('.*'))


def test_weights_that_make_nan_are_an_error(setting):
    clips, settings = setting
    scored_folders.write_weights(settings.weights, float('nan'))
    with pytest.raises(ValueError, match='panns: embeddings that are not finite'):
        embeddings.embed(embedders.embedders(settings.weights)['panns'], clips, settings, 'x')
