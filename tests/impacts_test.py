"""The built-in dataset: what is seen, heard and written in the table agree; renders resume and never mix."""
import concurrent.futures
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from configs import base
from data_pipelines import impacts
from data_pipelines import impacts_picture
from data_pipelines import impacts_scene
from data_pipelines import impacts_sound
from mmaudio_jax import media

ROOT = pathlib.Path(__file__).parents[1]


def config(**fields):
    """A dataset of a few tiny files."""
    result = base.get_config()
    result.impacts.update({'train_clips': 3, 'train_sounds': 2, 'validation_clips': 1, 'test_clips': 2, 'frame_size': 32,
                           'duration_s': 2.0, 'workers': 1, **fields})
    return result


def scenes(count, split='train', duration_s=4.0, with_video=True):
    return [impacts_scene.sample_scene(impacts_scene.clip_seed(0, split, i), duration_s, with_video) for i in range(count)]


def snapshot(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def test_scenes_keep_their_promises():
    sample = scenes(600)
    for scene in sample:
        times = sorted(scene.onset_times_s(visible=True) + scene.onset_times_s(visible=False))
        assert min(np.diff(times), default=1) > impacts_scene.MIN_GAP_S - 2e-6
        assert times[0] >= impacts_scene.FIRST_STRIKE_S and times[-1] <= 4.0 - impacts_scene.LAST_STRIKE_S + 1e-6
        assert all(1 <= len(thing.strikes) <= impacts_scene.MAX_STRIKES for thing in scene.things)
    share = np.mean([any(not thing.visible for thing in scene.things) for scene in sample])
    assert 0.03 < share < 0.1
    assert {thing.material for scene in sample for thing in scene.things} == set(impacts_scene.MATERIALS)
    assert not any(scene.onset_times_s(visible=False) for scene in scenes(100, with_video=False))


def test_captions_name_count_and_order():
    def thing(material, shape, times, visible=True):
        return impacts_scene.Thing(material, shape, 1.0, 1.0, (64.0, 70.0), 1, visible,
                                   tuple(impacts_scene.Strike(time, 20.0) for time in times))

    def words(*things):
        return impacts_scene.caption(impacts_scene.Scene(0, 4.0, things, ()))

    assert words(thing('metal', 'rod', [1, 2]), thing('glass', 'cup', [3])) == (
        'a metal rod strikes twice, then a glass cup once')
    assert words(thing('wood', 'ball', [3]), thing('stone', 'block', [1])) == (
        'a stone block strikes once, then a wooden ball once')
    assert words(thing('metal', 'rod', [1, 3]), thing('glass', 'cup', [2])) == (
        'a metal rod strikes twice and a glass cup once, by turns')
    assert words(thing('metal', 'rod', [1]), thing('glass', 'cup', [2, 3, 3.5], visible=False)) == (
        'a metal rod strikes once, while a glass cup strikes three times out of sight')


def test_no_seed_is_shared_and_a_clip_is_independent_of_the_others():
    keys = ('train', 'validation', 'test', 'impacts_sounds/train')
    seeds = [impacts_scene.clip_seed(0, key, i) for key in keys for i in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert impacts_scene.clip_seed(0, 'train', 7) != impacts_scene.clip_seed(1, 'train', 7)
    assert impacts_scene.clip_seed(0, 'train', 7) == 0x78ef58397814  # the dataset of a seed never changes


def test_motion_touches_at_the_strike_and_is_fastest_there():
    for scene in scenes(20):
        for thing in scene.things:
            times = np.array([strike.time_s for strike in thing.strikes])
            fine = np.arange(0, 4, 1e-3)
            away = impacts_picture.distance_to_contact(thing, fine)
            assert away.min() >= 0
            np.testing.assert_allclose(impacts_picture.distance_to_contact(thing, times), 0, atol=1e-9)
            touching = fine[away < 0.1]
            assert all(np.abs(times - touch).min() < 0.002 for touch in touching)  # nowhere else
            before = impacts_picture.distance_to_contact(thing, times - 1e-3)
            strokes = np.array([strike.stroke for strike in thing.strikes])
            np.testing.assert_allclose(before, strokes * 2e-3 / impacts_picture.APPROACH_S, rtol=0.01)  # loudness follows this


def test_sound_and_picture_of_the_file_meet_at_the_true_time(tmp_path):
    balls = [scene for scene in scenes(300) if not scene.distractors and len(scene.things) == 1
             and scene.things[0].shape == 'ball' and scene.things[0].material in ('rubber', 'glass')]
    for i, scene in enumerate(balls[:3]):
        path = str(tmp_path / f'{i}.mp4')
        impacts.write_clip(impacts.Job(path, scene.seed, 4.0, 128, 25))
        sound = np.abs(media.read_audio(path, 44_100, 0.0, 4.0))
        frames, = media.read_frames(path, [media.FrameRequest(25.0, 128, 128, 'squash')], 0.0, 4.0)
        plate = int(scene.things[0].centre[1] + 30)
        moving = np.abs(frames[:, :plate].astype(int) - np.median(frames[::3], axis=0)[:plate]).max(axis=3) > 60
        lowest = np.array([np.flatnonzero(rows.any(axis=1)).max(initial=0) for rows in moving])
        for strike in scene.things[0].strikes:
            first = round((strike.time_s - 0.02) * 44_100)
            part = sound[first:first + 2_205]
            onset_s = (first + np.flatnonzero(part > max(0.1 * part.max(), 2 * part[:600].max()))[0]) / 44_100
            assert abs(onset_s - strike.time_s) < 0.001  # measured 0.04 to 0.29 ms on 81 strikes
            near = round(strike.time_s * 25) + np.arange(-4, 5)
            contact = near[lowest[near] == lowest[near].max()] / 25
            assert np.abs(contact - strike.time_s).min() <= 0.04
        assert media.probe(path).duration_s == 4.0


def test_loudness_follows_speed():
    scene = impacts_scene.Scene(1, 3.0, (impacts_scene.Thing('metal', 'rod', 1.0, 1.0, (64.0, 70.0), 1, True, (
        impacts_scene.Strike(0.5, 20.0), impacts_scene.Strike(2.0, 40.0))),), ())
    sound = np.abs(impacts_sound.synthesize(scene))
    slow, fast = sound[22_050:66_150].max(), sound[88_200:].max()
    assert fast == pytest.approx(impacts_sound.PEAK, rel=1e-3)
    assert slow == pytest.approx(fast / 2, rel=1e-3)
    assert not sound[:22_050].any()


def test_render_then_nothing_then_what_is_missing(tmp_path, capsys):
    impacts.render(config(), tmp_path)
    before = snapshot(tmp_path)
    folder = tmp_path / 'media' / 'impacts'
    rows = [json.loads(line) for line in (folder / 'train.jsonl').read_text().splitlines()]
    assert [row['id'] for row in rows] == ['impacts_train_00000', 'impacts_train_00001', 'impacts_train_00002']
    assert all((folder / row['video']).stat().st_size == row['bytes'] and row['audio'] is None for row in rows)
    sounds = [json.loads(line) for line in (tmp_path / 'media/impacts_sounds/train.jsonl').read_text().splitlines()]
    assert [row['video'] for row in sounds] == [None, None]
    assert media.read_audio(tmp_path / 'media/impacts_sounds' / sounds[1]['audio'], 16_000, 0.0, 2.0).any()

    capsys.readouterr()
    impacts.render(config(workers=2), tmp_path)  # the number of processes is no part of the result
    assert 'nothing to render' in capsys.readouterr().out and snapshot(tmp_path) == before

    (folder / rows[0]['video']).unlink()
    (folder / rows[1]['video']).write_bytes(b'half')
    impacts.render(config(), tmp_path)
    assert '2 to render' in capsys.readouterr().out and snapshot(tmp_path) == before

    with pytest.raises(ValueError, match=r'was rendered with config.impacts.frame_size = 32, the configuration says 64'):
        impacts.render(config(frame_size=64), tmp_path)
    with pytest.raises(ValueError, match='config.impacts.frame_size = 33 must be even'):
        impacts.render(config(frame_size=33), tmp_path)


def test_of_processes_that_start_together_one_renders(tmp_path, capsys):
    with concurrent.futures.ThreadPoolExecutor(2) as threads:  # locks of one file in several threads exclude each other, too
        assert list(threads.map(lambda _: impacts.render(config(), tmp_path), range(2))) == [None, None]
    text = capsys.readouterr().out
    assert text.count('nothing to render') == 1 == text.count('impacts: 8 of 8 clips')


def test_a_full_disk_is_told_and_leaves_no_table(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, os.strerror(28))

    job = impacts.Job(str(tmp_path / 'a.mp4'), 5, 1.0, 32, 25)
    with monkeypatch.context() as patch:
        patch.setattr(os, 'replace', full)
        with pytest.raises(media.MediaError, match='a.mp4: No space left on device'):
            impacts.write_clip(job)
    assert not list(tmp_path.iterdir())


def is_running(process: int) -> bool:
    try:
        return pathlib.Path(f'/proc/{process}/stat').read_text().rsplit(')', 1)[1].split()[0] != 'Z'
    except OSError:
        return False


def descendants(process: int) -> set[int]:
    """Numbers of the processes that it and those below it started."""
    parents = {int(path.parent.name): int(path.read_text().rsplit(')', 1)[1].split()[1])
               for path in pathlib.Path('/proc').glob('[0-9]*/stat')}
    found = {process}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {process}


@pytest.mark.slow
def test_a_killed_render_resumes_to_the_same_files(tmp_path):
    impacts.render(config(train_clips=40), tmp_path / 'whole')
    script = ('import pathlib, sys\nfrom tests.impacts_test import config, impacts\n'
              "if __name__ == '__main__':\n    impacts.render(config(train_clips=40), pathlib.Path(sys.argv[1]))\n")
    (tmp_path / 'job.py').write_text(script)
    killed = tmp_path / 'killed'
    process = subprocess.Popen([sys.executable, str(tmp_path / 'job.py'), str(killed)], cwd=ROOT,
                               env={**os.environ, 'PYTHONPATH': str(ROOT)})
    deadline = time.monotonic() + 120
    while len(list(killed.rglob('*.mp4'))) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None and list(killed.rglob('*.mp4')), 'it was to be killed half way'
    started = descendants(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(started) > 1 and not any(map(is_running, started)), 'its workers end by themselves'
    assert not list(killed.rglob('*.jsonl'))
    impacts.render(config(train_clips=40), killed)
    assert snapshot(killed) == snapshot(tmp_path / 'whole')
