"""--mode=import and --mode=export."""

import numpy as np
import pytest

from configs import base
from mmaudio_jax import exchange
from mmaudio_jax import media
from mmaudio_jax import snapshots
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import vae
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import mmaudio as mmaudio_weights
from mmaudio_jax.weights import store
from mmaudio_jax.weights import tensor_file
from mmaudio_jax.weights import torch_writer
from tests import full_disk
from tests import official_tensors
from tests import trained_run
from tests.golden import synthetic_weights
from tests.run_test import run
from tests.weights_store_test import assert_equal
from tests.weights_store_test import SIZES


def make_config(tmp_path, **fields):
    config = base.get_config()
    places = {'folder': str(tmp_path), 'cache': str(tmp_path / 'cache')}
    config.weights.update({**places, 'offline': True, 'verify': False, **fields})
    return config


@pytest.fixture(name='vae_tensors')
def fixture_vae_tensors(tmp_path, monkeypatch):
    monkeypatch.setitem(vae.VARIANTS, '16k', dict(mel_bins=6, latent_channels=3, width=8))
    manifest = synthetic_weights.load_manifest('vae_16k')
    tensors = {name: synthetic_weights.fill(name, tuple(SIZES.get(n, n) for n in shape)) for name, shape in manifest.items()}
    torch_writer.write(tmp_path / 'v1-16.pth', tensors)
    return tensors


def test_import_prepares_all_files_of_the_variants(tmp_path, monkeypatch, capsys):
    asked = []

    def converted(name, **places):
        asked.append((name, places['folder'], places['offline']))
        path = tmp_path / name
        path.write_bytes(bytes(2_000_000))
        return path
    monkeypatch.setattr(store, 'converted', converted)
    exchange.import_weights(make_config(tmp_path, variants=('small_44k', 'large_44k_v2')), tmp_path)
    names = [name for name, _, _ in asked]
    assert names == ['mmaudio_small_44k', 'vae_44k', 'bigvgan_v2_44k', 'clip_vit_h_14_378', 'synchformer_visual',
                     'mmaudio_large_44k_v2']
    assert {(folder, offline) for _, folder, offline in asked} == {(str(tmp_path), True)}
    assert f'vae_44k: 2 MB in {tmp_path}/vae_44k\n' in capsys.readouterr().out
    asked.clear()
    exchange.import_weights(make_config(tmp_path), tmp_path)
    assert asked[0][0] == 'mmaudio_small_16k'  # that of config.model.variant


@pytest.mark.parametrize('export_format', exchange.FORMATS)
def test_export_of_an_official_vae(tmp_path, vae_tensors, export_format):
    exchange.export_weights(make_config(tmp_path, export=('vae_16k',), export_format=export_format), tmp_path / 'run')
    found = tensor_file.read(tmp_path / 'run' / 'export' / f'v1-16.{export_format}').tensors()
    assert found.keys() == vae_tensors.keys()
    for name, tensor in vae_tensors.items():
        np.testing.assert_allclose(found[name], tensor, rtol=5e-3, err_msg=name)


@pytest.mark.parametrize('fields', [{}, {'hidden_size': 64, 'num_heads': 1, 'rope': 'none', 'sync_fusion': 'none'}])
def test_export_says_what_is_not_as_in_the_official_network(tmp_path, monkeypatch, capsys, fields):
    config = make_config(tmp_path)
    config.model.update(fields)
    config.extract.encoder = 'pixels' if fields else 'official'
    monkeypatch.setattr(snapshots, 'load_params', lambda *_: ({}, config.to_dict()))
    monkeypatch.setattr(mmaudio_weights, 'from_params', lambda *_: {'x': np.zeros(3, np.float32)})
    exchange.export_weights(config, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith(f'MB in {tmp_path}/export/mmaudio_small_16k.pth')
    assert lines[:-1] == ([] if not fields else [
        'network: has the names of mmaudio_small_16k, but is another network, which the official code does not know by that '
        'name: '
        "model.hidden_size 64 (not 448), model.num_heads 1 (not 7), model.sync_fusion 'none' (not 'modulate'), "
        "model.rope 'none' (not 'aligned'), extract.encoder 'pixels' (not 'official')"])


def test_export_of_a_trained_network(tmp_path):
    """From the snapshots of a run, and back to the parameters that are sampled from."""
    config = make_config(tmp_path)
    config.sequence.duration_s = 1.0
    config.model.update({'hidden_size': 64, 'num_heads': 1, 'joint_blocks': 2, 'fused_blocks': 1})
    trained_run.write_weights(tmp_path, config)
    model = mmaudio.build(config.model, Sequence('16k', 1.0))
    params, _ = snapshots.load_params(tmp_path)
    for export_format in exchange.FORMATS:
        config.weights.export_format = export_format
        exchange.export_weights(config, tmp_path)
        found = tensor_file.read(tmp_path / 'export' / f'mmaudio_small_16k.{export_format}').tensors()
        assert_equal(official_tensors.params_of(mmaudio_weights, found, model), params)


def test_export_takes_the_average_that_is_asked_for(tmp_path, monkeypatch):
    asked = []

    def load_params(workdir, sigma_rel=None):
        asked.append((workdir, sigma_rel))
        raise ValueError('enough')
    monkeypatch.setattr(snapshots, 'load_params', load_params)
    config = make_config(tmp_path)
    config.ema.synthesis_sigma_rel = 0.08
    with pytest.raises(ValueError, match='enough'):
        exchange.export_weights(config, tmp_path)
    assert asked == [(tmp_path, 0.08)]


def test_a_full_disk(tmp_path, vae_tensors):
    config = make_config(tmp_path, export=('vae_16k',))
    exchange.export_weights(config, tmp_path)  # the converted weights are there then
    with full_disk.after(1_000), pytest.raises(media.MediaError, match='export/v1-16.pth: .*File too large'):
        exchange.export_weights(config, tmp_path)


@pytest.mark.parametrize('fields, message', [
    ({'export': ('bigvgan_16k',)}, "config.weights.export: 'bigvgan_16k' has no export; flow networks and VAEs have"),
    ({'export': ('nothing',)}, "'nothing' is no official model"),
    ({'export_format': 'bin'}, "config.weights.export_format is 'bin'; it must be one of pth, safetensors"),
    ({'variants': ('huge',)}, "'huge' is no official network"),
])
def test_mistakes(tmp_path, fields, message):
    config = make_config(tmp_path, **fields)
    with pytest.raises(ValueError, match=message):
        (exchange.import_weights if 'variants' in fields else exchange.export_weights)(config, tmp_path)


@pytest.mark.parametrize('mode, message', [('import', '_16k.pth: not on this machine'), ('export', 'no trained weights')])
def test_the_command_line(tmp_path, monkeypatch, mode, message):
    monkeypatch.setenv('HF_HUB_CACHE', str(tmp_path / 'nothing'))
    arguments = ('--config=configs/base.py', f'--workdir={tmp_path}', f'--mode={mode}', '--config.weights.offline=True',
                 f'--config.weights.cache={tmp_path}/cache')
    result = run(*arguments)
    assert result.returncode == 1 and result.stderr.startswith('error: ') and message in result.stderr
    assert result.stderr.count('\n') == 1
