"""The scripts that are run by hand still fit the package: each is imported, and says how it is called."""
import importlib
import pathlib
import sys

import pytest

FOLDER = pathlib.Path(__file__).parent / 'benchmarks'
ORIGINALS = ('official_side', 'embedders_original')  # need PyTorch and the published code
SCRIPTS = sorted(path.stem for path in FOLDER.glob('*.py') if path.stem != '__init__' and path.stem not in ORIGINALS)


@pytest.mark.parametrize('name', SCRIPTS)
def test_a_script_is_imported_and_says_how_it_is_called(name, monkeypatch, capsys):
    module = importlib.import_module(f'tests.benchmarks.{name}')
    assert module.__doc__
    if hasattr(module, 'main'):
        assert f'python -m tests.benchmarks.{name}' in module.__doc__
        monkeypatch.setattr(sys, 'argv', [name, '--help'])
        with pytest.raises(SystemExit) as ended:
            module.main()
        assert ended.value.code == 0 and 'usage' in capsys.readouterr().out


def test_what_importing_costs():
    from tests.benchmarks import importing
    seconds, _ = importing.measure(importing.IMPORT.format('import mmaudio_jax'))
    assert 0 < seconds
