"""Shards as tasks of a Ray cluster: actors hold the jitted encoders, shards go to whichever is free, and again when one dies.

Needs the extra: pip install -e '.[ray]'. The data folder must be the same path on every machine. Nothing else is shared:
a shard is made by the same function as without Ray, and stands in the folder when it is whole.
"""
import collections
import concurrent.futures
import logging
from typing import Any

import ray

from data_pipelines import processes
from data_pipelines import shards as shards_lib

RETRIES = 4  # of a shard whose actor died
_ARGUMENTS = {'CPU': 'num_cpus', 'GPU': 'num_gpus'}  # which Ray refuses among the other resources


class _Actor:
    """One process that extracts shards, with its own decoding processes."""

    def __init__(self, plan: shards_lib.Plan):
        self._plan = plan
        self._extractor = shards_lib.Extractor(plan)
        self._workers = processes.Workers(plan.workers)
        self._device = concurrent.futures.ThreadPoolExecutor(1)

    def extract(self, shard: shards_lib.Shard) -> tuple[int, list[str]]:
        """Makes a shard; returns how many clips it had, and the reasons of the rejected ones."""
        rejected: list[str] = []
        loaded = shards_lib.loaded_clips(self._workers, self._extractor.request, shard.clips,
                                         self._plan.batch_size + 2 * self._plan.workers)
        shards_lib.extract_shard(self._plan, self._extractor, shard, loaded, self._device,
                                 lambda clips, reasons: rejected.extend(reasons))
        return len(shard.clips), rejected


def run(plan: shards_lib.Plan, missing: list[shards_lib.Shard], settings, report: shards_lib.Report) -> None:
    """Extracts the shards on the cluster.

    Args:
      plan: of the set.
      missing: its shards that are to be made.
      settings: config.extract.
      report: told about every finished shard.

    Raises:
      ValueError, OSError: as shards.extract_shard, from wherever the shard was made.
      OSError: no cluster at config.extract.ray_address, or an actor that dies at the same shard again and again.
    """
    _connect(settings)
    actor_class = ray.remote(**_room(settings), max_restarts=-1, max_task_retries=0)(_Actor)
    actors = [actor_class.remote(plan) for _ in range(min(settings.ray_actors, len(missing)))]
    waiting, tries = collections.deque(missing), collections.Counter[int]()
    under_way: dict[Any, tuple[Any, shards_lib.Shard]] = {}

    def hand_out(actor) -> None:
        if waiting:
            shard = waiting.popleft()
            under_way[actor.extract.remote(shard)] = actor, shard

    try:
        for actor in actors:
            hand_out(actor)
        while under_way:
            (done,), _ = ray.wait(list(under_way), num_returns=1)
            actor, shard = under_way.pop(done)
            try:
                report(*ray.get(done))
            except ray.exceptions.RayTaskError as error:  # what the shard function raised
                raise error.cause from error
            except ray.exceptions.RayActorError as error:
                tries[id(shard)] += 1
                if tries[id(shard)] > RETRIES:
                    raise OSError(f'{plan.name}, {shard.split} shard {shard.number}: its Ray actor died {RETRIES + 1} times; '
                                  'see the logs of Ray') from error
                waiting.append(shard)
            hand_out(actor)
    finally:
        for actor in actors:
            ray.kill(actor)


def _room(settings) -> dict[str, Any]:
    """What an actor takes of its machine, as arguments of ray.remote."""
    resources = dict(settings.ray_resources)
    named = {argument: resources.pop(name) for name, argument in _ARGUMENTS.items() if name in resources}
    return {'num_cpus': settings.ray_cpus, **named, 'resources': resources}


def _connect(settings) -> None:
    """Joins the cluster at config.extract.ray_address, or starts one here."""
    if ray.is_initialized():
        return
    where: dict[str, Any] = {'address': settings.ray_address} if settings.ray_address else {'include_dashboard': False}
    try:
        ray.init(log_to_driver=False, logging_level=logging.ERROR, **where)
    except (ConnectionError, ValueError) as error:
        raise OSError(f'no Ray cluster at config.extract.ray_address = {settings.ray_address!r}: {error}') from error
