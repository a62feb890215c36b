"""The report on compiled programs: what fits and what does not, its words, and the real train step of a small network."""
import json
import types

import jax
import jax.numpy as jnp
import pytest

from configs import base
from mmaudio_jax import chips
from mmaudio_jax import compile_report
from mmaudio_jax import flops
from mmaudio_jax import hlo_cost
from mmaudio_jax import partitioning
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

MESSAGE = 'RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 21.3G of 15.7G hbm.'


def small_config():
    config = base.get_config()
    config.model.update(hidden_size=128, num_heads=2, joint_blocks=2, fused_blocks=2, remat='dots')
    config.sequence.duration_s = 1.0
    config.input.batch_size = 8
    config.mesh.update(data=-1, fsdp=2)
    config.compile.update(topology='v5e:2x2', programs=('train',))
    return config


def test_a_program_that_does_not_fit_is_a_result():

    def compile_():
        raise jax.errors.JaxRuntimeError(MESSAGE)
    work = {'what': 'a step', 'devices': 4, 'model_flops': 1.0}
    program = lambda config, devices: (types.SimpleNamespace(compile=compile_), [], work)
    result = compile_report.measure(program, small_config(), [])
    assert not result['fits'] and 'Used 21.3G' in result['reason']
    assert 'does not fit into 16 GiB' in compile_report.table('train', result)


def test_a_network_of_no_bandwidth_is_refused(tmp_path):
    config = small_config()
    config.compile.network_gbits = 0.0
    with pytest.raises(ValueError, match='config.compile.network_gbits is 0.0; it must be above 0'):
        compile_report.report(config, tmp_path)


def test_a_solver_that_chooses_its_steps_has_no_estimate():
    config = small_config()
    config.sampling.solver = 'dopri5'
    with pytest.raises(ValueError, match="config.sampling.solver is 'dopri5', which chooses the number of its steps"):
        compile_report.sample(config, jax.devices())


def test_any_other_error_of_the_compiler_is_one():

    def compile_():
        raise jax.errors.JaxRuntimeError('INTERNAL: broken')
    program = lambda config, devices: (types.SimpleNamespace(compile=compile_), [], {})
    with pytest.raises(jax.errors.JaxRuntimeError, match='broken'):
        compile_report.measure(program, small_config(), [])


def test_an_unknown_program_is_refused(tmp_path):
    config = small_config()
    config.compile.programs = ('train', 'trian')
    with pytest.raises(ValueError, match='config.compile.programs names trian'):
        compile_report.report(config, tmp_path)


def test_several_slices_send_over_their_network(monkeypatch):
    """Of a collective without a group the bytes take the time that config.compile.network_gbits gives them."""
    pytest.importorskip('libtpu')
    config = small_config()
    config.compile.update(slices=2, network_gbits=80.0)
    devices = chips.devices_of('v5e:2x2', 2)
    mesh = partitioning.make_mesh(config.mesh, 'data', devices)
    assert mesh.shape['data'] == 4 and [device.slice_index for device in mesh.devices[:, 0, 0]] == [0, 0, 1, 1]
    sent = hlo_cost.Collective('between slices', 1e9, 1e9, (), 1, '')
    monkeypatch.setattr(hlo_cost, 'parse', lambda text: text)
    monkeypatch.setattr(hlo_cost, 'cost', lambda program, memory, cycles: hlo_cost.Cost(
        cycles(sent), 0.0, cycles(sent), 0.0, 0.0, [], [sent], []))
    sizes = types.SimpleNamespace(**{f'{name}_size_in_bytes': 0 for name in (
        'argument', 'output', 'alias', 'temp', 'generated_code')})
    compiled = types.SimpleNamespace(as_text=lambda: '', memory_analysis=lambda: sizes)
    lowered = types.SimpleNamespace(compile=lambda: compiled)
    work = {'what': 'a step', 'devices': 8, 'model_flops': 1.0}
    result = compile_report.measure(lambda config, devices: (lowered, devices, work), config, devices)
    assert result['seconds']['all'] == pytest.approx(0.1) and result['sent_bytes'] == {'between slices': 1e9}


def test_without_a_workdir_it_only_prints(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(chips, 'devices_of', lambda topology, slices: jax.devices())
    monkeypatch.chdir(tmp_path)
    work = {'what': 'a step', 'fits': False, 'memory_bytes': 2**34, 'reason': 'too large'}
    monkeypatch.setattr(compile_report, 'measure', lambda program, config, devices, text: work)
    compile_report.report(small_config(), None)
    assert 'train: a step\n  does not fit' in capsys.readouterr().out and not list(tmp_path.iterdir())
    compile_report.report(small_config(), tmp_path)
    assert json.loads((tmp_path / 'compile.json').read_text())['programs'] == {'train': work}


@pytest.mark.parametrize('program, section, name, value, message', [
    ('train', 'train', 'microbatches', 0, 'config.train.microbatches is 0, which does not divide config.input.batch_size 8'),
    ('train', 'train', 'microbatches', 3, 'config.train.microbatches is 3'),
    ('train', 'model', 'dtype', 'floaty', 'config.model.dtype is .floaty.; it must be one of'),
    ('sampler', 'compile', 'clips_per_device', 0, 'config.compile.clips_per_device is 0; it must be at least 1'),
])
def test_fields_that_cannot_be_compiled_are_named(program, section, name, value, message):
    config = small_config()
    config[section][name] = value
    with pytest.raises(ValueError, match=message):
        compile_report.PROGRAMS[program](config, jax.devices()[:4])


@pytest.mark.slow
def test_the_train_step_of_a_small_network(tmp_path, capsys):
    """What the program needs is what the shardings say, and its operations are the formula's."""
    pytest.importorskip('libtpu')
    config = small_config()
    compile_report.report(config, tmp_path)
    result = json.loads((tmp_path / 'compile.json').read_text())['programs']['train']
    sequence = Sequence(**config.sequence)
    model = mmaudio.build(config.model, sequence)
    assert result['model_flops'] == 8 * flops.training(model, sequence)
    assert result['fits'] and not result['unknown_loops'] and 0 < result['utilisation'] < 1
    parts = result['seconds']
    assert parts['all'] == pytest.approx(parts['compute'] + parts['collective'] + parts['copy'])
    assert result['sent_bytes']['all-gather'] > 0
    memory = result['bytes']
    assert memory['arguments'] + memory['temporaries'] < memory['peak'] < memory['memory']
    # Moments and averages, four times the parameters, halved by fsdp with them; biases and norms whole.
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, sequence.latent_length, 20)), jnp.zeros(1),
                            jnp.zeros((1, sequence.clip_length, 1024)), jnp.zeros((1, sequence.sync_length, 768)),
                            jnp.zeros((1, 77, 1024)))
    state = 5 * 4 * sum(leaf.size for leaf in jax.tree.leaves(shapes)) / 2
    assert 0.95 < memory['arguments'] / state < 1.2  # measured 1.016
    printed = capsys.readouterr().out
    assert 'utilisation' in printed and compile_report.METHOD in printed and 'costliest' in printed
    assert (tmp_path / 'compile_train.txt').read_text().startswith('HloModule')


@pytest.mark.parametrize('name, function, dtype, text, operations', [
    ('segments', 'sync_features', 'bfloat16', 'xbf16>', 5.7e12),
    ('frames', 'image_features', 'float32', 'xf32>', 3.2e13),
    ('texts', 'text_features', 'bfloat16', 'xbf16>', 7.6e11),
    ('latents', 'encode', 'bfloat16', 'xf32>', 1e11),  # whatever the others have
])
def test_an_encoder_on_one_device(name, function, dtype, text, operations):
    """Lowered, not compiled: the jitted function of the extraction itself, and its operations from its trace."""
    config = small_config()
    config.weights.dtype = dtype
    lowered, used, work = compile_report.PROGRAMS[name](config, jax.devices()[:4])
    assert len(used) == 1 and function in lowered.as_text()[:300]
    assert work['what'].endswith('float32' if text == 'xf32>' else 'bfloat16') and text in lowered.as_text().split(') ->')[0]
    assert 0.5 < work['model_flops'] / operations < 2, work
