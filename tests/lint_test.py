"""The house style, as far as programs see it: flake8, isort, mypy."""
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CODE = ('mmaudio_jax', 'configs', 'data_pipelines', 'tests', 'run.py')


COMMANDS = [('flake8', *CODE), ('isort', '--check-only', '--quiet', *CODE), ('mypy',)]


@pytest.mark.parametrize('command', COMMANDS, ids=lambda c: c[0])
def test_style(command):
    result = subprocess.run([sys.executable, '-m', *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
