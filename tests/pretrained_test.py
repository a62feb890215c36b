"""What a Pipeline is made of: which names and folders are understood, and the defaults of the official networks."""
import numpy as np
import pytest

from configs import base
from configs import l_44k
from configs import l_44k_v2
from configs import s_16k
from mmaudio_jax import pipeline
from mmaudio_jax import pretrained
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import store
from tests import trained_run

OPTIONS = {'variant': None, 'dtype': None, 'cache': None, 'folder': None, 'offline': True, 'verify': True, 'sigma_rel': None,
           'step': None, 'data_dir': None}


@pytest.fixture(name='asked')
def fixture_asked(monkeypatch):
    """What was asked of the store, which gives nothing."""
    asked = []
    monkeypatch.setattr(store, 'load', lambda name, **options: asked.append((name, options)) or {})
    return asked


def test_the_defaults_are_those_of_the_configs():
    config = base.get_config()
    ours = pretrained.SAMPLING
    assert config.sampling.to_dict() == ours
    assert config.sequence.duration_s == pretrained.TRAINING_S


@pytest.mark.parametrize('variant', mmaudio.VARIANTS)
def test_an_official_network_by_its_name(variant, asked):
    parts = pretrained.find(variant, **{**OPTIONS, 'cache': 'cache', 'folder': 'folder'})
    assert asked[0][0] == f'mmaudio_{variant}'
    assert asked[0][1] == {'dtype': 'float32', 'cache': 'cache', 'folder': 'folder', 'offline': True, 'verify': True}
    assert parts.name == variant and parts.step is None and parts.config['sequence']['rate'] in variant
    assert parts.model.latent_channels == mmaudio.VARIANTS[variant]['latent_channels'] and parts.model.dtype == np.float32


def test_the_codec_stays_float32(asked):
    parts = pretrained.find('small_16k', **{**OPTIONS, 'dtype': 'bfloat16'})
    for name in ('clip_vit_h_14_378', 'synchformer_visual', 'vae_16k', 'bigvgan_16k'):
        parts.load(name)
    assert [options['dtype'] for _, options in asked] == ['bfloat16'] * 3 + ['float32'] * 2
    assert parts.model.dtype == 'bfloat16'


def test_a_folder_of_official_files(tmp_path, asked):
    (tmp_path / 'weights').mkdir()
    (tmp_path / 'weights' / 'mmaudio_small_44k.pth').touch()
    assert pretrained.find(tmp_path, **OPTIONS).name == 'small_44k'
    assert asked[0][1]['folder'] == tmp_path
    (tmp_path / 'mmaudio_large_44k_v2.pth').touch()
    several = ('holds several networks; choose one of them with variant=, or give its name instead of the folder, with '
               'config.weights.folder=.*: small_44k, large_44k_v2')
    with pytest.raises(ValueError, match=several):
        pretrained.find(tmp_path, **OPTIONS)
    assert pretrained.find(tmp_path, **{**OPTIONS, 'variant': 'large_44k_v2'}).name == 'large_44k_v2'


@pytest.mark.parametrize('source,variant,message', [
    ('large_45k', None, "'large_45k' is neither an official network .small_16k, .*large_44k_v2. nor a folder"),
    ('', None, r'holds no official network \(mmaudio_VARIANT.pth\), and nothing was trained there \(ema/\): train first'),
    ('', 'small_16k', r'holds no official network \(mmaudio_small_16k.pth\)'),
    ('', 'tiny', "variant is 'tiny'; it must be one of small_16k"),
])
def test_mistakes(source, variant, message, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        pretrained.find(source or tmp_path, **{**OPTIONS, 'variant': variant})
    assert '\n' not in str(error.value)


def test_arguments_that_choose_nothing_are_refused(tmp_path, asked):
    assert pretrained.find('small_16k', **{**OPTIONS, 'variant': 'small_16k'}).name == 'small_16k'
    (tmp_path / 'mmaudio_small_16k.pth').touch()
    (tmp_path / 'run' / 'ema').mkdir(parents=True)
    asked.clear()
    for source, changes, message in (('small_16k', {'variant': 'large_44k_v2'}, "'small_16k' names the network already; leave"),
                                     ('small_16k', {'step': 99}, 'step is 99, but small_16k has official weights, without'),
                                     (tmp_path, {'step': 99}, f'step is 99, but {tmp_path} has official weights'),
                                     (tmp_path / 'run', {'variant': 'small_16k'}, 'run is a training run, which has one net')):
        with pytest.raises(ValueError, match=message):
            pretrained.find(source, **{**OPTIONS, **changes})
    assert not asked
    with pytest.raises(ValueError, match='sigma_rel is 0.05, but small_16k has official weights, of one average; it chooses'):
        pipeline.Pipeline.from_pretrained('small_16k', sigma_rel=0.05, compilation_cache=False)


def test_a_trained_network_has_the_encoders_of_its_records(tmp_path, asked):
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        config = trained_run.make_config()
        config.weights.dtype = 'bfloat16'
        trained_run.write_codec(tmp_path, config)
        trained_run.write_weights(tmp_path, config)
        for dtype in (None, 'float32'):
            pretrained.find(tmp_path, **{**OPTIONS, 'dtype': dtype}).load('clip_vit_h_14_378')
    assert [options['dtype'] for _, options in asked] == ['bfloat16', 'float32']


def test_a_dtype_that_weights_cannot_have(tmp_path):
    (tmp_path / 'ema').mkdir()
    for source in ('small_16k', tmp_path):
        with pytest.raises(ValueError, match="dtype 'float8' is not one of float32, bfloat16"):
            pretrained.find(source, **{**OPTIONS, 'dtype': 'float8'})


@pytest.mark.parametrize('run', [s_16k, l_44k, l_44k_v2])
def test_a_run_may_train_an_official_network_on(run, asked):
    config = run.get_config()
    config.weights.start_from = config.model.variant
    model = mmaudio.build(config.model, Sequence(**config.sequence))
    assert pretrained.to_train_on(config, model, None) == {}
    assert [name for name, _ in asked] == [f'mmaudio_{config.model.variant}'] and asked[0][1]['dtype'] == 'float32'
    config.model.rope = 'none'
    model = mmaudio.build(config.model, Sequence(**config.sequence))
    with pytest.raises(ValueError, match="was trained with model.rope 'aligned', and config.model.rope is 'none'"):
        pretrained.to_train_on(config, model, None)
