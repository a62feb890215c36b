"""Files in, files out: what is written, skipped, refused, and what happens to the others when one fails."""
import json

import pytest

from mmaudio_jax import generate
from mmaudio_jax import generate_jobs
from tests import trained_run


@pytest.fixture(name='small_network', scope='module', autouse=True)
def fixture_small_network():
    with pytest.MonkeyPatch.context() as monkeypatch:
        trained_run.use_network(monkeypatch)
        yield


@pytest.fixture(name='workdir', scope='module')
def fixture_workdir(tmp_path_factory, small_network):
    workdir = tmp_path_factory.mktemp('run')
    trained_run.make(workdir)
    videos = workdir / 'videos'
    trained_run.write_video(videos / 'a.b.mp4')
    (videos / 'broken.mp4').write_bytes(b'not a video')
    trained_run.write_video(videos / 'c.mp4', 1)
    (videos / 'notes.txt').touch()
    return workdir


def _config(workdir, **fields):
    config = trained_run.make_config()
    config.generate.update(input=str(workdir / 'videos'), output=str(workdir / 'out'))
    config.generate.update(fields)
    return config


def test_a_folder(workdir, capfd):
    assert generate.generate(_config(workdir), workdir) == 1
    captured = capfd.readouterr()
    assert 'broken.mp4' in captured.err and '1 of 3 failed' in captured.err
    names = sorted(path.name for path in (workdir / 'out').iterdir())
    results = [f'{stem}.{suffix}' for stem in ('a.b', 'c') for suffix in ('flac', 'json', 'mp4', 'png')]
    assert names == [*results, 'report.jsonl']
    before = (workdir / 'out' / 'c.flac').stat().st_mtime_ns
    assert generate.generate(_config(workdir), workdir) == 1
    assert capfd.readouterr().out.count('nothing to do') == 2
    assert (workdir / 'out' / 'c.flac').stat().st_mtime_ns == before
    (workdir / 'out' / 'c.png').unlink()
    generate.generate(_config(workdir), workdir)
    assert capfd.readouterr().out.count('nothing to do') == 1 and (workdir / 'out' / 'c.png').exists()


def test_one_file_with_other_settings_is_made_again(workdir):
    config = _config(workdir, input=str(workdir / 'videos' / 'c.mp4'), output=str(workdir / 'one'), audio_format='wav')
    assert generate.generate(config, workdir) == 0
    first = (workdir / 'one' / 'c.wav').read_bytes()
    config.sampling.seed = 7
    assert generate.generate(config, workdir) == 0
    assert (workdir / 'one' / 'c.wav').read_bytes() != first
    assert json.loads((workdir / 'one' / 'c.json').read_text())['settings']['seed'] == 7


def test_a_prompt_alone(workdir):
    assert generate.generate(_config(workdir, input='', output='', prompt='a glass/strikes'), workdir) == 0
    names = sorted(path.suffix for path in (workdir / 'generated').iterdir())
    assert names == ['.flac', '.json', '.jsonl', '.png']


def test_same_stem_and_mistakes(workdir, tmp_path):
    for name in ('x.mp4', 'x.webm', 'y.mov'):
        (tmp_path / name).touch()
    config = _config(workdir, input=str(tmp_path))
    assert [job.name for job in generate_jobs.jobs(config.generate, config.sampling)] == ['x_mp4', 'x_webm', 'y']
    for fields, message in (({'input': ''}, 'nothing to generate'), ({'input': str(tmp_path / 'no')}, 'no such file'),
                            ({'input': str(workdir)}, 'no videos'),
                            ({'output': str(workdir / 'videos')}, 'would be overwritten')):
        with pytest.raises(ValueError, match=message):
            generate.generate(_config(workdir, **fields), workdir)
