"""The built-in run, shrunk: rendered files to scored files by run.py alone, then each stage again for nothing."""
import json
import pathlib
import subprocess
import sys

import av
import pytest

pytestmark = pytest.mark.slow  # two minutes: the real network is compiled for eight devices

ROOT = pathlib.Path(__file__).parents[1]
DURATION_S = 2.0
SHRUNK = ('--config.impacts.train_clips=12', '--config.impacts.train_sounds=4', '--config.impacts.validation_clips=8',
          '--config.impacts.test_clips=3', '--config.impacts.frame_size=64', f'--config.impacts.duration_s={DURATION_S}',
          f'--config.sequence.duration_s={DURATION_S}', '--config.input.validation_examples=8', '--config.train.total_steps=4',
          '--config.train.validate_every=4', '--config.train.sample_every=4', '--config.train.sample_clips=1',
          '--config.train.checkpoint_every=2', '--config.ema.snapshot_every=2', '--config.sampling.num_steps=2',
          '--config.sampling.batch_size=8', '--config.evaluate.save_clips=2', '--config.mesh.data=8')


def run(workdir: pathlib.Path, *arguments: str) -> str:
    """What run.py prints; it must succeed."""
    command = [sys.executable, 'run.py', '--config=configs/impacts.py', f'--workdir={workdir}', *SHRUNK, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(name='workdir', scope='module')
def fixture_workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('run')
    run(workdir)
    return workdir


def files(workdir: pathlib.Path) -> dict[str, int]:
    """Time of the last change of every file, but the lock and what a process appends to its log."""
    return {str(path): path.stat().st_mtime_ns for path in workdir.rglob('*') if path.is_file() and '/logs/' not in str(path)
            and not path.name.startswith('.')}


def test_one_command_leaves_videos_with_sound_pictures_and_a_report(workdir):
    report = json.loads((workdir / 'report.json').read_text())
    assert (report['step'], report['clips']) == (4, 3)
    assert report['onsets']['0.1']['codec']['macro']['f1'] > report['onsets']['0.1']['generated']['macro']['f1']
    videos = sorted((workdir / 'generated' / 'test').glob('*.mp4'))
    assert len(videos) == 2 and all(video.with_suffix('.png').stat().st_size > 10_000 for video in videos)
    for video in videos:
        with av.open(str(video)) as container:
            assert [stream.type for stream in container.streams] == ['video', 'audio']
            assert all(float(stream.duration * stream.time_base) == DURATION_S for stream in container.streams)


def test_a_second_call_redoes_nothing(workdir):
    before = files(workdir)
    output = run(workdir)
    assert files(workdir) == before
    assert output.count('nothing to') == 3 and 'all 4 steps are done' in output and 'step 4/4' not in output


def test_generates_for_a_rendered_file(workdir):
    video = sorted((workdir / 'media' / 'impacts' / 'test').glob('*.mp4'))[0]
    run(workdir, '--mode=generate', f'--config.generate.input={video}')
    names = {path.suffix for path in (workdir / 'generated').glob(f'{video.stem}.*')}
    assert names == {'.mp4', '.flac', '.png', '.json'}
