"""The runner: every row and seed once, what is there stays, and mean and spread by hand."""
import io
import json
import os
import shlex
import signal
import sys
import threading
import time

import pytest

from configs.ablations import table
from mmaudio_jax import ablations
from mmaudio_jax import media
from mmaudio_jax import shorthands
from tests import full_disk

# Stands for run.py: writes a report, unless this row is told to fail, or to be stopped before; logs every call.
FAKE = '''
import json, pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # as training does, after saving
flags = dict(argument[2:].split('=', 1) for argument in sys.argv[1:])
folder = pathlib.Path(flags['workdir'])
with open(pathlib.Path(__file__).with_name('calls'), 'a') as log:
    log.write(json.dumps(flags) + chr(10))
if (pathlib.Path(__file__).with_name('broken')).exists() and 'no_rope' in flags['config']:
    sys.exit(1)
if (pathlib.Path(__file__).with_name('stopped')).exists() and 'no_rope' in flags['config']:
    sys.exit(0)
if (pathlib.Path(__file__).with_name('endless')).exists():
    pathlib.Path(__file__).with_name('endless').unlink()
    time.sleep(60)
folder.mkdir(parents=True, exist_ok=True)
f1 = 0.9 + 0.01 * int(flags['config.seed'])
row = lambda value, error: {'macro': {'f1': value, 'average_precision': value}, 'median_error_ms': error}
rows = {'generated': row(f1, 10.0), 'shuffled': row(0.2, None), 'codec': row(1.0, 5.0)}
(folder / 'report.json').write_text(json.dumps({'quoted_window_s': 0.1, 'onsets': {'0.1': rows}}))
'''


@pytest.fixture(name='fake')
def fixture_fake(tmp_path, monkeypatch):
    script = tmp_path / 'run.py'
    script.write_text(FAKE)
    monkeypatch.setattr(sys, 'argv', [str(script), '--mode=ablations', '--config=table.py', '--workdir=w',
                                      '--config.train.total_steps=7', '--config.ablations.seeds=(0,2)'])
    return tmp_path


def _config(**changes):
    config = table.get_config()
    config.ablations.update(rows=config.ablations.rows[:3], seeds=(0, 2), at_once=1, **changes)
    return config


def test_runs_all_and_summarises(fake):
    workdir = fake / 'out'
    workdir.mkdir()
    assert ablations.run(_config(), workdir) == 0
    calls = [json.loads(line) for line in (fake / 'calls').read_text().splitlines()]
    assert [(call['config'].split('/')[-1], call['config.seed']) for call in calls] == [
        (file, seed) for seed in '02' for file in ('impacts.py', 'no_sync.py:impacts', 'no_rope.py:impacts')]
    assert {call['config.data_dir'] for call in calls} == {str(workdir)}
    assert all(call['config.train.total_steps'] == '7' and 'config.ablations.seeds' not in call for call in calls)
    summary = json.loads((workdir / 'ablations.json').read_text())
    assert summary['rows']['default']['mean']['f1'] == pytest.approx(0.91)
    assert summary['rows']['default']['spread']['f1'] == pytest.approx(0.02 / 2**0.5)
    assert summary['rows']['default']['mean']['median_error_ms'] == 10.0
    assert '| no_rope | 2 | 0.910 ± 0.014 | 0.910 ± 0.014 | 10.0 ± 0.0 | 0.200 ± 0.000 | 1.000 ± 0.000 |' in (
        workdir / 'ablations.md').read_text()


def test_runs_at_once_give_the_same_table(fake):
    summaries = []
    for at_once in (1, 2):
        workdir = fake / f'out{at_once}'
        workdir.mkdir()
        config = _config()
        config.ablations.at_once = at_once
        assert ablations.run(config, workdir) == 0
        summaries.append((workdir / 'ablations.json').read_text())
    assert summaries[0] == summaries[1]


def test_a_failing_run_is_reported_and_the_others_are_done(fake, capfd):
    workdir = fake / 'out'
    workdir.mkdir()
    (fake / 'broken').touch()
    assert ablations.run(_config(), workdir) == 1
    rows = json.loads((workdir / 'ablations.json').read_text())['rows']
    assert list(rows) == ['default', 'no_sync']
    assert 'failed: no_rope, seed 0; no_rope, seed 2' in capfd.readouterr().err


def test_a_run_that_was_told_to_stop_is_not_done(fake, capfd):
    workdir = fake / 'out'
    workdir.mkdir()
    (fake / 'stopped').touch()
    assert ablations.run(_config(), workdir) == 1
    assert 'FAILED: no_rope, seed 0: ended without a report' in capfd.readouterr().err


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_the_runs_are_told_to_stop_and_no_other_is_begun(fake, capfd, number):
    workdir = fake / 'out'
    workdir.mkdir()
    (fake / 'endless').touch()
    before = signal.getsignal(number)

    def stop():
        while (fake / 'endless').exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    thread, started = threading.Thread(target=stop), time.monotonic()
    thread.start()
    assert ablations.run(_config(), workdir) == 1
    thread.join()
    assert time.monotonic() - started < 30 and len((fake / 'calls').read_text().splitlines()) == 1
    assert 'told to stop, 6 runs are not done; the same command continues' in capfd.readouterr().err
    assert signal.getsignal(number) is before


def test_flags_reach_the_runs_however_they_are_spelled(fake, monkeypatch):
    monkeypatch.setattr(sys, 'argv', shorthands.expand([
        sys.argv[0], '--mode', 'ablations', '--config', 'table.py', '-workdir', 'w', '--config.train.total_steps', '7',
        '-config.name=mine', '--config.ablations.seeds', '(0,2)']))
    (fake / 'out').mkdir()
    assert ablations.run(_config(), fake / 'out') == 0
    calls = [json.loads(line) for line in (fake / 'calls').read_text().splitlines()]
    assert {(call['config.train.total_steps'], call['config.name']) for call in calls} == {('7', 'mine')}
    assert not any('mode' in call or 'config.ablations.seeds' in call for call in calls)


def test_of_flags_of_one_field_the_last_reaches_a_run(fake, monkeypatch):
    """Those of the table stand after the runner's own, and before those of the command."""
    config = _config(flags=("--config.score.metrics=('a',)", '--config.train.total_steps=5', '--config.score.cache=c'))
    monkeypatch.setattr(sys, 'argv', [*sys.argv, "--config.score.metrics=('b',)"])
    commands = []
    monkeypatch.setattr(ablations._Children, 'run', lambda self, command, cores: commands.append(command) or 0)
    ablations.run(config, fake)
    for command in commands:
        flags = shorthands.expand(command[1:])
        assert [flag for flag in flags if 'score.' in flag] == ['--config.score.cache=c', "--config.score.metrics=('b',)"]
        assert [flag for flag in flags if 'total_steps' in flag] == ['--config.train.total_steps=7']


def test_scores_stand_above_the_published_ones(tmp_path):
    for seed, value in ((0, 70.0), (1, 72.0)):
        for name in ('no_sync', 'mine'):
            folder = tmp_path / name / f'seed_{seed}'
            folder.mkdir(parents=True)
            scores = {'fd_passt': {'value': value}, 'desync': {'value': 0.9}, 'is_panns': {'undefined': 'too few clips'}}
            (folder / 'scores.json').write_text(json.dumps({'metrics': ['fd_passt', 'is_panns', 'desync'],
                                                            'systems': {'s_16k': {'scores': scores}}}))
    summary = ablations.summarize(tmp_path, ['no_sync', 'mine', 'not_yet'], [0, 1, 2])
    published = ablations.score_tables.published('vggsound_ablations')['rows']
    assert ablations.table(summary, published).splitlines() == [
        '| run | seeds | FD PaSST ↓ | IS ↑ | DeSync ↓ |', '|---|---|---|---|---|',
        '| no_sync | 2 | 71.00 ± 1.41 |  | 0.900 ± 0.000 |', '| *no_sync, published* | | 69.33 | 15.05 | 0.973 |',
        '| mine | 2 | 71.00 ± 1.41 |  | 0.900 ± 0.000 |']
    assert ablations.table(ablations.summarize(tmp_path, ['not_yet'], [0])) == ''


def test_of_scores_and_a_report_the_newer_counts(tmp_path):
    row = {'macro': {'f1': 0.5, 'average_precision': 0.6}, 'median_error_ms': 10.0}
    report = {'quoted_window_s': 0.1, 'onsets': {'0.1': {'generated': row, 'codec': row}}}
    scores = {'metrics': ['onset_f1'], 'systems': {'ours': {'scores': {'onset_f1': {'value': 0.7}}}}}
    for seed, files in ((0, ('report',)), (1, ('scores',)), (2, ('scores', 'report')), (3, ('report', 'scores'))):
        folder = tmp_path / 'a' / f'seed_{seed}'
        folder.mkdir(parents=True)
        for time_s, name in enumerate(files):
            (folder / f'{name}.json').write_text(json.dumps({'report': report, 'scores': scores}[name]))
            os.utime(folder / f'{name}.json', (time_s, time_s))
    row = ablations.summarize(tmp_path, ['a'], [0, 1, 2, 3])['rows']['a']
    assert [list(row['runs'][seed])[0] for seed in '0123'] == ['f1', 'onset_f1', 'f1', 'onset_f1']
    assert row['mean']['f1'] == 0.5 and row['mean']['onset_f1'] == 0.7
    for seed in (1, 3):  # another row that has other figures than the first
        (tmp_path / 'b').mkdir(exist_ok=True)
        (tmp_path / 'a' / f'seed_{seed}').rename(tmp_path / 'b' / f'seed_{seed}')
    lines = ablations.table(ablations.summarize(tmp_path, ['a', 'b'], [0, 1, 2, 3])).splitlines()
    assert 'onset F1 ↑' in lines[0] and lines[2].startswith('| a | 2 | 0.500') and lines[3].endswith('| 0.7000 ± 0.0000 |')


def test_flags_that_ask_for_scores_are_answered_by_scores_alone(fake, monkeypatch, capfd):
    """The fake writes reports: runs that leave no scores failed, and figures of another kind are in no table."""
    (fake / 'out').mkdir()
    assert ablations.run(_config(), fake / 'out') == 0
    scores = {'metrics': ['onset_f1'], 'systems': {'ours': {'scores': {'onset_f1': {'value': 0.7}}}}}
    for seed in (0, 2):
        path = fake / 'out' / 'default' / f'seed_{seed}' / 'scores.json'
        path.write_text(json.dumps(scores))
        os.utime(path, (0, 0))  # older than the report
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--config.score.sample=True'])
    assert ablations.run(_config(), fake / 'out') == 1
    rows = json.loads((fake / 'out' / 'ablations.json').read_text())['rows']
    assert {name: row['mean'] for name, row in rows.items()} == {'default': {'onset_f1': 0.7}}
    assert 'FAILED: no_sync, seed 0: ended without a report' in capfd.readouterr().err


@pytest.mark.parametrize('flags, command, expected', [
    ((), (), False), (('--config.score.sample=True',), (), True), ((), ('--config.score.sample',), True),
    (('--config.score.sample=True',), ('--config.score.sample=0',), False), ((), ('--config.score.compare=a=b c=d',), True),
    ((), ('--config.score.generated=',), False), ((), ('--config.score.batch_size=3',), False),
])
def test_which_flags_ask_for_scores(monkeypatch, flags, command, expected):
    monkeypatch.setattr(sys, 'argv', ['run.py', '--config=table.py', *command])
    assert ablations._asks_for_scores(flags) == expected


def test_the_command_of_the_table_can_be_typed(fake, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [*sys.argv, "--config.score.metrics=('onset_f1',)", '--config.name=a b'])
    ablations.run(_config(), fake)
    command = (fake / 'ablations.md').read_text().splitlines()[-1]
    assert shlex.split(command) == ['python', *sys.argv]


def test_the_table_is_utf8_whatever_the_locale(tmp_path, monkeypatch):
    monkeypatch.setattr(io, 'text_encoding', lambda encoding, _=2: encoding or 'ascii')  # of the machine
    row = {'runs': {}, 'mean': {'f1': 0.5}, 'spread': {'f1': 0.1}}
    ablations._write(tmp_path, {'seeds': [0, 1], 'rows': {'a': row}}, {})
    assert '0.500 ± 0.100' in (tmp_path / 'ablations.md').read_text(encoding='utf-8')


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path):
    with full_disk.after(10), pytest.raises(media.MediaError, match='ablations.json: File too large'):
        ablations._write(tmp_path, {'seeds': [0], 'rows': {}}, {})
    assert not list(tmp_path.iterdir())


def test_the_table_of_the_paper_asks_every_run_for_its_columns(fake):
    config = table.get_config('s_16k')
    rows = {name for name, _ in config.ablations.rows}
    assert rows == set(ablations.score_tables.published(config.ablations.published)['rows'])
    config.ablations.update(rows=config.ablations.rows[:1], seeds=(0,))
    (fake / 'out').mkdir()
    ablations.run(config, fake / 'out')
    call = json.loads((fake / 'calls').read_text())
    assert call['config.score.sample'] == 'True' and 'desync' in call['config.score.metrics']
    assert call['config.score.cache'] == str(fake / 'out' / 'embeddings') and call['config.train.total_steps'] == '7'


def test_wrong_tables_are_refused(fake):
    with pytest.raises(ValueError, match='no rows or no seeds'):
        config = _config()
        config.ablations.seeds = ()
        ablations.run(config, fake)
    with pytest.raises(ValueError, match='two rows'):
        config = _config()
        config.ablations.rows = (('a', 'x'), ('a', 'y'))
        ablations.run(config, fake)


def test_one_seed_for_all_runs_is_refused(fake, monkeypatch):
    monkeypatch.setattr(sys, 'argv', [*sys.argv, '--config.seed=7'])
    with pytest.raises(ValueError, match='--config.seed would be that of every run; .* config.ablations.seeds'):
        ablations.run(_config(), fake)
    assert not (fake / 'calls').exists()
