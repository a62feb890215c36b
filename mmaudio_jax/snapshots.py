"""Snapshots of the running averages, which sampling reads.

    WORKDIR/ema/<step>/sigma_rel_<width>.npz    an average
                       config.json              of the run
                       codec.json               digest of the fitted codec whose latents the network makes, null without one

A folder is written beside and renamed when whole. Of the stored averages `load_params` synthesises one of any width and step
(EDM2, arXiv 2312.02696, section 3).
"""
from collections.abc import Iterator
from collections.abc import Mapping
import contextlib
import json
import os
import pathlib
import shutil
from typing import Any
import zipfile
import zlib

from flax import traverse_util
import jax
from jax.experimental import multihost_utils
import numpy as np

from mmaudio_jax import checkpoints
from mmaudio_jax import ema
from mmaudio_jax import fingerprints
from mmaudio_jax import hosts

_SIGMA_REL = 'sigma_rel_'  # then its value: the name of a stored average
_CODEC = 'codec.json'


class _StoredTensor:
    """A tensor in an .npz file, read when numpy asks for it: many snapshots of a large network do not fit in memory."""

    def __init__(self, path: pathlib.Path, name: str):
        self._path, self._name = path, name

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        with _damage_explained(self._path), np.load(self._path) as file:  # a process may not hold all snapshots open
            return np.asarray(file[self._name], dtype)


@contextlib.contextmanager
def _damage_explained(path: pathlib.Path) -> Iterator[None]:
    """Raises CheckpointError, naming the file, for one that cannot be read."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError) as error:
        raise checkpoints.CheckpointError(f'{path}: damaged ({checkpoints.first_line(error)}); restore it from a copy, or '
                                          f'delete {path.parent} and sample from another step') from error


def save(workdir: pathlib.Path, step: int, averages: Mapping[float, Any], config: Any) -> None:
    """Writes `ema/<step>`: the averaged parameters of each sigma_rel and the config. Does nothing when it is there.

    Args:
      workdir: of the run.
      step: number of updates that the averages have seen.
      averages: sigma_rel -> tree of dicts of float32 arrays; every process must call.
      config: the run's ConfigDict; its data_dir, or the workdir, holds records/codec.npz, if the run has a fitted codec.

    Raises:
      CheckpointError: the folder could not be written; nothing is left of it.
    """
    folder = _folder(workdir) / str(step)
    if hosts.agreed(folder.exists()):
        return
    partial, writes = folder.with_name(f'.{step}.partial'), jax.process_index() == 0
    try:
        if writes:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        for sigma_rel, params in averages.items():
            tensors = _on_first_host(traverse_util.flatten_dict(params, sep='/'))
            if writes:
                np.savez(partial / f'{_SIGMA_REL}{sigma_rel:g}.npz', allow_pickle=False, **tensors)
        if writes:
            plain = checkpoints.to_json(config)
            if plain.get('data_dir'):  # whoever samples may do so from another folder
                plain['data_dir'] = os.path.abspath(plain['data_dir'])
            (partial / 'config.json').write_text(json.dumps(plain, indent=1))
            codec = pathlib.Path(plain.get('data_dir') or workdir) / 'records' / 'codec.npz'
            (partial / _CODEC).write_text(json.dumps(fingerprints.of_file(codec)))
            for path in partial.iterdir():  # on the disk before it counts: nothing writes it again
                with open(path, 'rb') as file:
                    os.fsync(file.fileno())
            partial.rename(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise checkpoints.CheckpointError(
            f'the EMA snapshot {folder} could not be written ({checkpoints.first_line(error)}). Free some disk space or repair '
            'the folder, then run the same command again') from error


def _on_first_host(tensors: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Whole tensors as numpy on process 0, an empty dict on the others, which only send their parts."""
    whole = {}
    for name, tensor in tensors.items():
        host = hosts.to_host(tensor)
        if jax.process_index() == 0:
            whole[name] = host
    return whole


def exists(workdir: pathlib.Path, step: int) -> bool:
    """Whether the averages of that step are stored, as process 0 sees it."""
    return hosts.agreed(step in stored_steps(workdir))


def load_all(workdir: pathlib.Path) -> list[ema.Snapshot]:
    """Every stored average in workdir/ema by step; a leaf is read from its file when it is used.

    Raises:
      CheckpointError: there is none.
    """
    return [snapshot for step in _trained_steps(workdir) for snapshot in _load_step(_folder(workdir) / str(step))]


def _load_step(folder: pathlib.Path) -> list[ema.Snapshot]:
    """The averages of one step."""
    paths, found = sorted(folder.glob(f'{_SIGMA_REL}*.npz')), []
    if not paths:
        raise checkpoints.CheckpointError(f'{folder}: holds no {_SIGMA_REL}*.npz; restore them, or delete the folder')
    for path in paths:
        with _damage_explained(path), np.load(path) as file:
            names = file.files
        tree = traverse_util.unflatten_dict({name: _StoredTensor(path, name) for name in names}, sep='/')
        gamma = ema.sigma_rel_to_gamma(float(path.stem.removeprefix(_SIGMA_REL)))
        found.append(ema.Snapshot(gamma, int(folder.name), tree))
    return found


def latest(workdir: pathlib.Path) -> int:
    """The last step whose averages are stored; raises CheckpointError when there is none."""
    return _trained_steps(workdir)[-1]


def latest_agreed(workdir: pathlib.Path) -> int:
    """`latest` as process 0 sees it: others may look at another moment of a run. Every process must call, and all raise."""
    step = hosts.agreed(max(stored_steps(workdir), default=-1))
    if step < 0:
        raise _untrained(workdir)
    return step


def load_params(workdir: pathlib.Path, sigma_rel: float | None = None, step: int | None = None) -> tuple[Any, dict]:
    """Weights to sample from: the average of width sigma_rel at a step, synthesised from the stored snapshots.

    Args:
      workdir: of a training run; reads ema/.
      sigma_rel: relative width of the average (EDM2, arXiv 2312.02696, section 3), for example 0.05; None for
        config.ema.synthesis_sigma_rel of the run.
      step: one of the stored ones; None for the last.

    Returns:
      (params as a tree of float32 numpy arrays, the config of that run as a plain dict).

    Raises:
      CheckpointError: there is no snapshot, none of that step, or one is damaged.
      ValueError: sigma_rel is out of range.
    """
    stored = _trained_steps(workdir)
    step = stored[-1] if step is None else step
    if step not in stored:
        raise checkpoints.CheckpointError(f'no EMA snapshot of step {step} in {_folder(workdir)}; it has those of '
                                          f'{", ".join(map(str, stored))}')
    config = json.loads((_folder(workdir) / str(step) / 'config.json').read_text())
    sigma_rel = config['ema']['synthesis_sigma_rel'] if sigma_rel is None else sigma_rel
    gamma = ema.sigma_rel_to_gamma(sigma_rel)
    for snapshot in _load_step(_folder(workdir) / str(step)):
        if snapshot.gamma == gamma:  # the others need not be read, nor be whole
            return jax.tree.map(np.asarray, snapshot.params), config
    return ema.synthesize([snapshot for snapshot in load_all(workdir) if snapshot.step <= step], sigma_rel, step), config


def set_aside_later(workdir: pathlib.Path, step: int) -> None:
    """Renames what a run that goes on from `step` left of later steps, ema/<n> and samples/<n>: it is made again, and where
    other devices round otherwise it would be of another trajectory. Every process must call."""
    if jax.process_index() == 0:
        later = [folder for parent in (_folder(workdir), pathlib.Path(workdir) / 'samples') for folder in parent.glob('*')
                 if folder.name.isdigit() and int(folder.name) > step]
        for folder in sorted(later):
            stale = checkpoints.unused(folder.with_name(f'{folder.name}.stale'))
            print(f'training: {folder} is of a later step than {step}: renamed to {stale.name}, and made again', flush=True)
            folder.rename(stale)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('later steps set aside')


def check_codec(workdir: pathlib.Path, step: int, codec: pathlib.Path) -> None:
    """Raises CheckpointError when the fitted codec is another than that of the run: its sounds would be noise."""
    stored = _folder(workdir) / str(step) / _CODEC
    expected = json.loads(stored.read_text()) if stored.is_file() else None
    if expected is not None and codec.is_file() and expected != fingerprints.of_file(codec):
        raise checkpoints.CheckpointError(f'{codec}: is not the codec of the network in {stored.parent}, it was fitted again '
                                          'since: restore it, or train again in another --workdir')


def check(workdir: pathlib.Path, config: Any) -> None:
    """Raises CheckpointError when workdir/ema holds averages of a run with another config: they must not be mixed."""
    for step in stored_steps(workdir):
        folder = _folder(workdir) / str(step)
        checkpoints.check_config(json.loads((folder / 'config.json').read_text()), checkpoints.to_json(config), folder)


def _folder(workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(workdir).absolute() / 'ema'


def _trained_steps(workdir: pathlib.Path) -> list[int]:
    """Those whose averages are stored; raises CheckpointError when there is none."""
    steps = stored_steps(workdir)
    if not steps:
        raise _untrained(workdir)
    return steps


def _untrained(workdir: pathlib.Path) -> checkpoints.CheckpointError:
    return checkpoints.CheckpointError(f'no trained weights in {_folder(workdir)}: train first (--mode=train), or check '
                                       '--workdir')


def stored_steps(workdir: pathlib.Path) -> list[int]:
    """Those whose averages are in workdir/ema, in order; none when there is no such folder."""
    return sorted(int(entry.name) for entry in _folder(workdir).glob('*') if entry.name.isdigit())
