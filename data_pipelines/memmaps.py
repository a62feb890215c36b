"""Features that the official code extracted → record sets: its TensorDict memory maps and tsv files, without TensorDict.

FOLDER/meta.json names shape and dtype of each tensor, FOLDER/<tensor>.memmap holds its values in C order: mean and std
`[examples, N, C]`, text_features `[examples, 77, 1024]` and, for videos, clip_features `[examples, V, 1024]` and sync_features
`[examples, S, 768]`. FOLDER.tsv beside it has a row for each example: id, and label (videos) or caption (sounds).
"""
import dataclasses
import functools
import json
import pathlib
from typing import Any, Iterator

import ml_dtypes
import numpy as np

from data_pipelines import clips as clips_lib
from data_pipelines import layouts
from data_pipelines import reading
from data_pipelines import shards as shards_lib
from data_pipelines.set_in_work import is_done
from data_pipelines.set_in_work import SetInWork
from mmaudio_jax import media
from mmaudio_jax import records

TENSORS = {'latent_mean': 'mean', 'latent_std': 'std', 'clip_features': 'clip_features', 'sync_features': 'sync_features',
           'text_features': 'text_features'}
OF_VIDEO = ('clip_features', 'sync_features')
DTYPES = {'torch.float32': np.dtype(np.float32), 'torch.float16': np.dtype(np.float16),
          'torch.bfloat16': np.dtype(ml_dtypes.bfloat16)}


@dataclasses.dataclass(frozen=True)
class Maps:
    """One folder of memory maps: features by our names, and the rows of its tsv."""
    folder: pathlib.Path
    features: dict[str, np.ndarray]
    rows: list[dict[str, str]]

    @property
    def has_video(self) -> bool:
        """Whether the examples have pictures."""
        return OF_VIDEO[0] in self.features


def open_maps(folder: pathlib.Path, schema: records.Schema) -> Maps:
    """Maps the tensors of `folder`; nothing is read yet.

    Raises:
      FileNotFoundError: a file that is missing.
      ValueError: a meta.json of another form, or with half of the features of videos; tensors of another shape or dtype than
        the schema's; a tsv of another length. Names the file.
    """
    forms, features = _forms(folder), dict[str, np.ndarray]()
    there, missing = sorted(OF_VIDEO, key=lambda name: TENSORS[name] not in forms)
    if TENSORS[there] in forms and TENSORS[missing] not in forms:
        raise ValueError(f'{folder / "meta.json"}: names {TENSORS[there]!r}, but no tensor {TENSORS[missing]!r}; videos have '
                         'both, and sounds neither: copy the whole folder again, or extract what is missing')
    for name, tensor in TENSORS.items():
        if tensor not in forms:
            if name in OF_VIDEO:
                continue
            raise ValueError(f'{folder}: meta.json names no tensor {tensor!r}')
        shape, dtype = forms[tensor][0], DTYPES.get(forms[tensor][1])
        if dtype is None or shape[1:] != schema.shapes[name]:
            expected = ', '.join(map(str, schema.shapes[name]))
            raise ValueError(f'{folder}: {tensor} is {forms[tensor][1]} {list(shape)}, not [examples, {expected}] as '
                             f'config.sequence asks ({schema.rate}, {schema.duration_s:g} s)')
        path = folder / f'{tensor}.memmap'
        if not path.is_file() or path.stat().st_size != np.prod(shape) * dtype.itemsize:
            raise ValueError(f'{path}: is missing or not as long as meta.json says; copy it again')
        features[name] = np.memmap(path, dtype, 'r', shape=shape)
    report = layouts.Report()
    tsv = _tsv(folder)
    if not tsv.is_file():
        raise FileNotFoundError(f'{tsv}: missing; it names the examples of {folder}')
    rows = [row for _, row in layouts.read_csv(tsv, report, ('id',), ('label', 'caption'))]
    if len({len(feature) for feature in features.values()} | {len(rows)}) != 1:
        raise ValueError(f'{tsv}: has {len(rows)} rows, the tensors beside it have '
                         f'{", ".join(str(len(feature)) for feature in features.values())}')
    return Maps(folder, features, rows)


def _forms(folder: pathlib.Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, name of the dtype) of each tensor of ours that meta.json names."""
    path = folder / 'meta.json'
    try:
        meta = json.loads(path.read_text(encoding='utf-8'))
        return {tensor: (tuple(map(int, meta[tensor]['shape'])), str(meta[tensor]['dtype']))
                for tensor in TENSORS.values() if tensor in meta}
    except FileNotFoundError as error:
        raise FileNotFoundError(f'{folder}: holds no meta.json; config.extract.memmaps names folders of memory maps') from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path}: does not describe memory maps ({type(error).__name__}: {error}); copy it again') from error


def _tsv(folder: pathlib.Path) -> pathlib.Path:
    return folder.with_name(f'{folder.name}.tsv')


def import_sets(config, root: pathlib.Path, index: int, count: int) -> list[str]:
    """Makes the record sets of config.extract.memmaps that are not there.

    Args:
      config: its fields sequence and extract are used; the sets' encoder and codec are 'official'.
      root: holds records/.
      index, count: of the processes that share the shards.

    Returns:
      Names of the sets.

    Raises:
      FileNotFoundError, ValueError: as open_maps; also a set of other settings.
      OSError: disk full.
    """
    settings = config.extract
    schema = dataclasses.replace(records.schema_of(config), encoder='official', codec='official')
    names = list(dict.fromkeys(name for name, _, _ in settings.memmaps))
    for name in names:
        places = {split: pathlib.Path(folder) for other, split, folder in settings.memmaps if other == name}
        unknown = sorted(set(places) - set(clips_lib.SPLITS))
        if unknown:
            raise ValueError(f'config.extract.memmaps: {unknown[0]!r} is not one of {", ".join(clips_lib.SPLITS)}')
        maps = {split: open_maps(folder, schema) for split, folder in places.items()}
        made_with = {'tables': {split: media.digest(_tsv(folder)) for split, folder in places.items()}}
        if not is_done(root / 'records' / name, schema, made_with):
            target = shards_lib.Target(schema, root / 'records' / f'.{name}.partial', root / 'records' / 'codec.npz')
            plan = shards_lib.Plan(name, root, (target,), settings.batch_size, 0, {})
            splits = {split: [_clip(found, row, split) for row in found.rows] for split, found in maps.items()}
            with SetInWork(plan, splits, made_with, settings.clips_per_shard, settings.max_rejected) as work:
                work.make(index, count, functools.partial(_import, plan, maps, settings.clips_per_shard))
    return names


def _clip(maps: Maps, row: dict[str, str], split: str) -> clips_lib.Clip:
    """The example of a row as a clip; its sound is named as a file of its own, so that it counts as a source of its own."""
    sound = maps.folder / row['id']
    caption, video = row.get('label', row.get('caption', '')), sound if maps.has_video else None
    return clips_lib.Clip(row['id'], video, sound, caption, split, 0.0, row.get('label', ''))


def _import(plan: shards_lib.Plan, maps: dict[str, Maps], clips_per_shard: int, missing: list[shards_lib.Shard],
            report: shards_lib.Report) -> None:
    """Copies the examples of shards."""
    for shard in missing:
        rejected: list[dict[str, Any]] = []
        batches = _batches(plan, shard, maps[shard.split], shard.number * clips_per_shard, rejected, report)
        shards_lib.write_shard(plan, shard, batches, rejected, report)


def _batches(plan: shards_lib.Plan, shard: shards_lib.Shard, maps: Maps, first: int, rejected: list[dict[str, Any]],
             report: shards_lib.Report) -> Iterator[tuple[shards_lib.Batch, list[list[shards_lib.Encoded]]]]:
    """Every example by itself, those of the maps from `first` on, as shards.write_shard takes batches; what is not finite is
    rejected."""
    schema = plan.targets[0].schema
    for place, clip in enumerate(shard.clips, first):
        example: dict[str, Any] = {name: np.zeros(shape, np.float32) for name, shape in schema.shapes.items()}
        example.update({name: np.asarray(feature[place], np.float32) for name, feature in maps.features.items()})
        example.update(id=clip.id, caption=clip.caption, duration_s=schema.duration_s, video_exists=maps.has_video,
                       text_exists=bool(clip.caption.strip()))
        try:
            record = schema.encode(example)
        except ValueError as error:
            reason = str(error).partition(': ')[2]
            rejected.append({'id': clip.id, 'split': clip.split, 'file': plan.shown(clip.sound), 'reason': reason})
            report(1, [reason])
            continue
        latents = example['latent_mean'].astype(records.FEATURE_DTYPES[schema.feature_dtype]).astype(np.float64)
        yield [(clip, reading.Loaded())], [[shards_lib.Encoded(latents, record)]]
