"""run.py: every mistake of the user's ends with one line and a non-zero exit code."""
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BASE = '--config=configs/base.py'


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, 'run.py', *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_names_that_are_not_utf8_are_printed(tmp_path, monkeypatch):
    monkeypatch.setenv('PYTHONIOENCODING', 'utf-8:strict')  # as terminals have it
    for name in (b'a.mp4', b'bad\xff.txt'):
        pathlib.Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name))).touch()
    result = run(BASE, f'--workdir={tmp_path / "run"}', '--mode=generate', f'--config.generate.input={tmp_path}')
    assert r'first bad\udcff.txt' in result.stdout
    assert result.stderr.startswith('error: ') and 'train first' in result.stderr


@pytest.mark.parametrize('arguments, expected', [
    ((), '--config must have a value'),
    ((BASE,), 'needs --workdir'),
    (('--workdir=w', '--config.seed=3'), '--config is missing: name the file of the run'),
    ((BASE, '--workdir=gs://bucket/run'), "--workdir is 'gs://bucket/run', an address; a folder is needed"),
    ((BASE, '--workdir=w', '--config.data_dir=gs://bucket'), "config.data_dir is 'gs://bucket', an address"),
    (('--config=configs/nothing.py', '--workdir=w'), "no config file 'configs/nothing.py'"),
    ((BASE, '--workdir=w', '--mode=trian'), 'value should be one of'),
    ((BASE, '--workdir=w', '--config.model.hiden_size=3'),
     """no field 'hiden_size'. Did you mean "hidden_size" instead of "hiden_size"?; every field"""),
    ((BASE, '--workdir=w', '--config.model.zzz=3'), "the configuration has no field 'zzz'; every field"),
    ((BASE, '--workdir=w', '--config.stages[99]=train'), 'index out of range; every field'),
    ((BASE, '--workdir=w', '--config.train.total_steps=abc'), 'total_steps'),
    ((BASE, '--workdir=w', '--verbos'), 'verbos'),
    ((BASE, '--workdir=w', "--config.stages=('generate', 'evalute')"),  # before the first stage, which fails here, too
     "config.stages is ('generate', 'evalute'), but there is no stage 'evalute'; it must be a tuple of one or more of impacts"),
    ((BASE, '--workdir=w', '--config.stages=()'), 'config.stages is (); it must be a tuple of one or more of impacts, extract'),
    ((BASE, '--workdir=w', '--mode=generate', '--config.sampling.batch_size=0'), 'config.sampling.batch_size is 0; it must be'),
    ((BASE, '--workdir=w', '--mode=train', "--config.input.mixture=('vggsound', 5)"),
     """config.input.mixture is ('vggsound', 5); it must be a tuple of (record set, repeats) tuples with a comma"""),
    ((BASE, '--workdir=w', 'train'), "unexpected argument 'train'"),
    ((BASE, '--mode=train'), 'needs --workdir'),
    ((BASE, '--mode=compile', '--topology=v9:2x2'), "--topology is 'v9:2x2'"),  # needs no workdir
    ((BASE, '--workdir=w', '--mode=compile', '--topology=v9:2x2'), "--topology is 'v9:2x2'"),
    ((BASE, '--workdir=w', '--mode=evaluate', '--compare', '--compat'), '--compare needs name=FOLDER'),
    ((BASE, '--workdir=w', '--mode=evaluate', '--compare', 'ours', 'b=x'), "--compare: 'ours' is not of the form name=FOLDER"),
    ((BASE, '--workdir=w', '--mode=evaluate', '--compare', 'a=x/nowhere', 'b=x'), 'x/nowhere: no such folder'),
])
def test_a_mistake_is_one_line(arguments, expected, tmp_path):
    arguments = tuple(a.replace('--workdir=w', f'--workdir={tmp_path}') for a in arguments)
    result = run(*arguments)
    assert result.returncode == 1
    assert expected in result.stderr
    assert result.stderr.startswith('error: ') and result.stderr.count('\n') == 1
