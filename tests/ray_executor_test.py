"""Extraction on a local Ray cluster of two workers: the same bytes as without, also when a worker is killed on the way."""
import importlib
import os
import pathlib
import signal
import sys
import threading
import time
import types

import pytest

from configs import base
import data_pipelines
from data_pipelines import extract
from tests import extract_test


@pytest.fixture(name='address', scope='module')
def fixture_address():
    """A cluster of two nodes with one actor's room each."""
    ray = pytest.importorskip('ray')
    from ray import cluster_utils
    os.environ.setdefault('RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO', '0')
    room = {'num_cpus': 1, 'object_store_memory': 80 * 2**20}
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={**room, 'include_dashboard': False})
    cluster.add_node(**room)
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()


def actors() -> list[int]:
    """Processes of this cluster that hold an extractor."""
    found = []
    for path in pathlib.Path('/proc').glob('[0-9]*/cmdline'):
        try:
            if path.read_bytes().startswith(b'ray::_Actor'):
                found.append(int(path.parent.name))
        except OSError:
            pass  # it ended meanwhile
    return found


def kill_one(workdir: pathlib.Path, killed: list[int]) -> None:
    """Kills an actor as soon as the first shard is finished."""
    while not list(workdir.glob('records/.sounds.partial/progress/train-*.json')):
        time.sleep(0.01)
    killed.extend(actors()[:1])
    for pid in killed:
        os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.parametrize('kill', [False, True])
def test_the_same_bytes_as_without_ray(tmp_path, address, kill):
    extract_test.sounds_workdir(tmp_path, 40)
    extract.extract(extract_test.sounds_config(), tmp_path)
    expected = extract_test.contents(tmp_path / 'records' / 'sounds')
    (tmp_path / 'records' / 'sounds').rename(tmp_path / 'without')
    killed: list[int] = []
    if kill:
        threading.Thread(target=kill_one, args=(tmp_path, killed), daemon=True).start()
    config = extract_test.sounds_config(executor='ray', ray_address=address, ray_actors=2, ray_cpus=1.0)
    extract.extract(config, tmp_path)
    assert extract_test.contents(tmp_path / 'records' / 'sounds') == expected
    assert len(killed) == kill


@pytest.mark.slow
def test_errors_come_through(tmp_path, address):
    extract_test.sounds_workdir(tmp_path, 6)
    config = extract_test.sounds_config(executor='ray', ray_address=address, ray_actors=2, ray_cpus=1.0, max_rejected=0.0)
    (tmp_path / 'media' / 'sounds' / '3.wav').unlink()
    extract.extract(config, tmp_path)  # one reject of six: too few to judge
    assert len((tmp_path / 'records' / 'sounds' / 'rejected.jsonl').read_text().splitlines()) == 1


@pytest.mark.parametrize('resources, expected', [
    ((), {'num_cpus': 2.0, 'resources': {}}),
    ((('TPU', 4.0),), {'num_cpus': 2.0, 'resources': {'TPU': 4.0}}),
    ((('GPU', 1.0), ('CPU', 3.0), ('fast_disk', 1.0)), {'num_cpus': 3.0, 'num_gpus': 1.0, 'resources': {'fast_disk': 1.0}}),
])
def test_gpus_and_cpus_are_asked_for_by_their_own_arguments(monkeypatch, resources, expected):
    """Ray need not be here: what stands for it refuses what ray.remote of 2.60 refuses."""
    asked = []

    def remote(*, resources, max_restarts, max_task_retries, **room):
        if {'CPU', 'GPU'} & set(resources):
            raise ValueError("Use the 'num_cpus' and 'num_gpus' keyword instead of 'CPU' and 'GPU' in 'resources' keyword")
        asked.append({**room, 'resources': resources})
        return lambda cls: cls

    name = 'data_pipelines.ray_executor'
    monkeypatch.setitem(sys.modules, 'ray', types.SimpleNamespace(remote=remote, is_initialized=lambda: True))
    monkeypatch.setitem(sys.modules, name, None)  # so that afterwards it is as it was, and not this one
    monkeypatch.setattr(data_pipelines, 'ray_executor', None, raising=False)
    del sys.modules[name]
    settings = base.get_config().extract
    settings.ray_resources = resources
    importlib.import_module(name).run(None, [], settings, lambda *_: None)
    assert asked == [expected]
