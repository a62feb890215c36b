"""Short flags, and what they are spelled for."""
import pytest

from mmaudio_jax import score_inputs
from mmaudio_jax import shorthands


@pytest.mark.parametrize('given, expected', [
    (('--topology=v5e:2x2', '--mode=compile'), ['--config.compile.topology=v5e:2x2', '--mode=compile']),
    (('--executor=ray', '--mode=extract', 'c=d=e'), ['--config.extract.executor=ray', '--mode=extract', 'c=d=e']),
    (('--compare', 'a=x', 'b=y z', '--compat'), ['--config.score.compare=a=x b=y z', '--config.score.compat=True']),
    (('--compare=a=x b=y', '--mode=evaluate'), ['--config.score.compare=a=x b=y', '--mode=evaluate']),
    (('run.py', '--compare', 'a=x b=y'), ['run.py', '--config.score.compare=a=x b=y']),
    (('run.py', '--config.score.compare=a=x', 'train'), ['run.py', '--config.score.compare=a=x train']),
    (('--profile=100-110',), ['--config.train.profile_steps=(100, 110)']),
    (('run.py', '--topology=v4:2x2x1', '--config=a.py'), ['run.py', '--config=a.py', '--config.compile.topology=v4:2x2x1']),
    (('run.py', '--config.seed=1', '--config', 'a.py'), ['run.py', '--config=a.py', '--config.seed=1']),
    (('run.py', '--mode=train', 'b=y'), ['run.py', '--mode=train', 'b=y']),
    (('run.py', '--workdir', 'w', '-mode=train', '-config', 'a.py'),
     ['run.py', '--config=a.py', '--workdir=w', '--mode=train']),
    (('run.py', "--config.score.metrics=('a',)", '--mode=train', '--config.seed=1', "--config.score.metrics=('b',)"),
     ['run.py', '--mode=train', '--config.seed=1', "--config.score.metrics=('b',)"]),
    (('run.py', '--profile=1-2', '--config.score.sample', '--config.train.profile_steps', '(3, 4)', '--config.score.sample=0'),
     ['run.py', '--config.train.profile_steps=(3, 4)', '--config.score.sample=0']),
    (('--config.seed', '-5', '-config.name', 'a b', '--profile', '1-2'),
     ['--config.seed=-5', '--config.name=a b', '--config.train.profile_steps=(1, 2)']),
    (('run.py', '--traceback', 'train', '--config.score.sample', '--mode', 'train'),
     ['run.py', '--traceback', 'train', '--config.score.sample', '--mode=train']),
])
def test_expands(given, expected):
    assert shorthands.expand(given) == expected


def test_several_folders_reach_the_score():
    field = shorthands.expand(['--compare', 'a=x/1', 'b=some folder', 'c=z'])[0].partition('=')[2]
    assert {name: str(folder) for name, folder in score_inputs.systems('', field).items()} == {
        'a': 'x/1', 'b': 'some folder', 'c': 'z'}


@pytest.mark.parametrize('given', [('--compare',), ('--compare=', '--mode=evaluate'), ('--compare', '--mode=evaluate')])
def test_compare_needs_systems(given):
    with pytest.raises(ValueError, match='--compare needs name=FOLDER for every system'):
        shorthands.expand(given)


@pytest.mark.parametrize('given', ['--profile', '--profile=5', '--profile=a-b'])
def test_profile_needs_two_steps(given):
    with pytest.raises(ValueError, match='--profile needs the first and the last step'):
        shorthands.expand([given])
