"""Embeddings on disk: found again by what they are, made anew when anything changes, resumed, and never of another clip."""
import concurrent.futures
import dataclasses
import inspect
import shutil

import jax
import numpy as np
import pytest

from mmaudio_jax import embedders
from mmaudio_jax import embeddings
from mmaudio_jax import evaluation_media
from mmaudio_jax import media
from tests import full_disk
from tests import imports_test
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


def test_parts_of_one_file_are_clips_of_their_own(setting):
    clips, settings = setting
    network = embedders.embedders(settings.weights)['panns']
    parts = {f'{start}': evaluation_media.Part(clips['clip_00'], start, 0.5) for start in (0.0, 0.6)}
    stored = embeddings.embed(network, parts | {'whole': clips['clip_00']}, settings, 'x')
    first, second, whole = (stored[name]['features'] for name in ('0.0', '0.6', 'whole'))
    assert not np.allclose(first, second) and not np.allclose(first, whole)


def test_the_key_holds_all_code_that_makes_embeddings():
    """By the import statements, where the key goes by what the modules hold."""
    package, found, waiting = imports_test.PACKAGE, set(), ['embedders']
    while waiting:
        name = waiting.pop()
        found.add(name)
        for imported in imports_test.imported(package / f'{name.replace(".", "/")}.py'):
            parts = imported.removeprefix('mmaudio_jax.').split('.')
            if imported.startswith('mmaudio_jax.'):
                module = next('.'.join(parts[:end]) for end in (2, 1) if (package / f'{"/".join(parts[:end])}.py').is_file())
                waiting += {module} - found
    assert {f'mmaudio_jax.{name}' for name in found} == set(embeddings._sources(embedders, {}))
    assert {'weights.clap', 'weights.tables', 'tokenizer_roberta', 'frames', 'models.htsat', 'filterbanks'} <= found


def test_other_code_makes_other_embeddings(setting, monkeypatch):
    _, settings = setting
    network = embedders.embedders(settings.weights)['clap_sound']
    before = embeddings._identity(network, settings)
    source = inspect.getsource
    monkeypatch.setattr(inspect, 'getsource', lambda module: source(module) + '# mended' * module.__name__.endswith('s.clap'))
    embeddings._code_digest.cache_clear()
    assert embeddings._identity(network, settings) != before
    monkeypatch.undo()
    embeddings._code_digest.cache_clear()


def test_clips_of_many_lengths_do_not_wait_in_memory(setting, monkeypatch):
    """Each clip has a length of its own, so that no batch is ever filled."""
    clips, settings = setting
    network = dataclasses.replace(embedders.embedders(settings.weights)['panns'],
                                  prepare=lambda path, seconds: np.zeros(int(path.stem[-2:])))
    wanted = [(path, str(i), path.with_name(f'x_{i:02}.wav')) for i in range(40) for path in [clips['clip_00']]]
    taken, most = [], 0
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        submit = pool.submit
        monkeypatch.setattr(pool, 'submit', lambda *job: taken.append(job) or submit(*job))
        done = 0
        for batch in embeddings._batches(network, wanted, settings, 2, pool, {}):
            most = max(most, len(taken) - done)
            done += len(batch)
    assert done == 40 and most <= 2 * 2 + 4 * 2 + 1  # read ahead, waiting, and the one that was too many


def test_a_host_that_lists_late_leaves_no_clip_out(setting, monkeypatch):
    """The second host looks into the shared cache when the first has written its share."""
    clips, settings = setting
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(embeddings.multihost_utils, 'sync_global_devices', lambda name: None)
    clips['clip_02'].write_bytes(b'broken')
    for host in (0, 1):
        monkeypatch.setattr(jax, 'process_index', lambda: host)
        stored = embeddings.embed(embedders.embedders(settings.weights)['panns'], clips, settings, 'x')
    assert set(stored) == set(clips) - {'clip_02'} and set(stored.failed) == {'clip_02'}


def test_failures_are_told_and_the_rest_is_done(setting):
    clips, settings = setting
    clips['clip_03'].write_bytes(b'broken')
    clips['absent'] = clips['clip_03'].with_name('absent.wav')
    stored = embeddings.embed(embedders.embedders(settings.weights)['vggish'], clips, settings, 'x')
    assert set(stored.failed) == {'clip_03', 'absent'} and len(stored) == 5 and 'clip_03' not in stored
    assert not list(settings.cache.rglob('.*'))


def test_a_full_disk_names_the_file(setting):
    clips, settings = setting
    with full_disk.after(100), pytest.raises(media.MediaError, match=f'{settings.cache}/panns-.*npz: File too large'):
        embeddings.embed(embedders.embedders(settings.weights)['panns'], clips, settings, 'x')
    assert not [path for path in settings.cache.rglob('*') if path.is_file()]


def test_weights_that_make_nan_are_an_error(setting):
    clips, settings = setting
    scored_folders.write_weights(settings.weights, float('nan'))
    with pytest.raises(ValueError, match='panns: the embeddings of clip_01 are not finite; are the weights whole'):
        embeddings.embed(embedders.embedders(settings.weights)['panns'], clips, settings, 'x')
