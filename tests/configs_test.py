"""Every config loads, is locked, says its command, and builds the network it names."""
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest

from configs import ablations
from configs.ablations import table
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

ROOT = pathlib.Path(__file__).parents[1]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.py') if path.name != '__init__.py')
RUNS = [name for name in FILES if name != 'configs/base.py']
ABLATIONS = [name for name in RUNS if 'ablations' in name]
MILLIONS = {'s_16k': 157.28, 's_44k': 157.41, 'm_44k': 621.81, 'l_44k': 1030.00, 'l_44k_v2': 1030.58}  # as published
ON_S_16K = {'n1_2_n2_13': (2, 13), 'n1_6_n2_3': (6, 3)}


def load(name, *arguments):
    spec = importlib.util.spec_from_file_location('loaded_config', ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.get_config(*arguments)


def parameters(config) -> int:
    """Parameters of the network, counted without making it."""
    sequence = Sequence(config.sequence.rate, config.sequence.duration_s)
    model = mmaudio.build(config.model, sequence)

    def init(key):
        shapes = ((sequence.latent_length, sequence.latent_channels), (), (sequence.clip_length, 1024),
                  (sequence.sync_length, 768), (77, 1024))
        return model.init(key, *(jnp.zeros((1, *shape)) for shape in shapes))
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(init, jax.random.key(0))))


@pytest.mark.parametrize('name', FILES)
def test_loads_and_is_locked(name):
    _, config = load(name)
    with pytest.raises(AttributeError):
        config.train.total_stepz = 1
    with pytest.raises(AttributeError):
        config.nonsense = 1
    assert hash(config.to_json())  # everything is plain data


@pytest.mark.parametrize('name', RUNS)
def test_docstring_has_the_command_and_the_file_is_short(name):
    module, _ = load(name)
    assert f'--config={name}' in module.__doc__ and 'Cost:' in module.__doc__ and 'Expected' in module.__doc__
    assert len((ROOT / name).read_text().splitlines()) <= 25, 'only overrides: what is longer belongs into base.py'


@pytest.mark.parametrize('name', sorted(MILLIONS))
def test_official_sizes(name):
    _, config = load(f'configs/{name}.py')
    assert round(parameters(config) / 1e6, 2) == MILLIONS[name]
    assert dict(config.input.mixture)['vggsound'] == (5 if name.startswith('s') else 3)


@pytest.mark.parametrize('name', sorted(MILLIONS))
def test_the_published_recipe(name):
    """The paper's section 4.1 and appendix; version 2 drops CLIP and sync features independently."""
    _, config = load(f'configs/{name}.py')
    o, flow = config.optimizer, config.flow
    assert (o.learning_rate, o.warmup_steps, o.betas, o.eps, o.weight_decay, o.clip_norm) == (
        1e-4, 1000, (0.9, 0.95), 1e-6, 1e-6, 1.0)
    assert (o.schedule, o.schedule_steps, o.schedule_factor) == ('step', (240_000, 270_000), 0.1)
    assert (flow.min_sigma, flow.video_dropout, flow.text_dropout) == (0.0, 0.1, 0.1)
    assert flow.independent_video_dropout == name.endswith('v2')
    assert (config.input.batch_size, config.train.total_steps, config.model.dtype) == (512, 300_000, 'bfloat16')
    assert config.ema.sigma_rels == (0.05, 0.1) and config.train.microbatches == 1


@pytest.mark.parametrize('percent', [10, 25, 50])
def test_the_shares_of_text(percent):
    _, config = load(f'configs/ablations/text_share_{percent}.py')
    assert {share for _, share in config.input.shares} == {percent / 100}


@pytest.mark.parametrize('base', ['s_16k', 'impacts'])
@pytest.mark.parametrize('name', ABLATIONS)
def test_an_ablation_changes_the_base_and_builds(name, base):
    default = ablations.BASES[base]()
    _, config = load(name, base)
    sections = {key for key in default if key != 'name' and default[key] != config[key]}
    assert len(sections) == 1, sections
    if sections == {'model'} and base == 'impacts':
        assert parameters(config) > 0
    names = {record_set for record_set, _ in config.input.mixture}
    assert set(dict(config.input.shares)) | set(config.input.without_text) <= names


@pytest.mark.parametrize('name', sorted(ON_S_16K))
def test_depths(name):
    _, config = load(f'configs/ablations/{name}.py')
    assert (config.model.joint_blocks, config.model.fused_blocks) == ON_S_16K[name]
    assert abs(parameters(config) / 157.28e6 - 1) < 0.003  # measured 0.0007


def test_audio_text_ablations_name_the_right_sets():
    _, sounds = load('configs/ablations/avt_a.py', 'impacts')
    _, videos = load('configs/ablations/av_at.py', 'impacts')
    _, neither = load('configs/ablations/av.py', 'impacts')
    assert sounds.input.without_text == ('impacts_sounds', ) and videos.input.without_text == ('impacts', )
    assert neither.input.mixture == (('impacts', 5), ) and neither.input.without_text == ('impacts', )


def test_the_table_names_files_that_load():
    config = table.get_config()
    assert len(config.ablations.rows) == 6 and len(config.ablations.seeds) == 3
    for _, file in config.ablations.rows:
        load(*file.split(':'))
    with pytest.raises(ValueError, match='not one of'):
        ablations.start('impact', 'no_rope')
