"""Finds trained networks, for a Pipeline or to train on from: official ones by name or in a folder, or what a run left."""
from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import functools
import os
import pathlib
from typing import Any

from mmaudio_jax import hosts
from mmaudio_jax import snapshots
from mmaudio_jax.media import Path
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import files
from mmaudio_jax.weights import store

# How the official networks are sampled; configs/base.py has the same (tests/pretrained_test.py).
TRAINING_S = 8.0
SAMPLING = {'solver': 'euler', 'num_steps': 25, 'schedule': 'uniform', 'guidance': 4.5, 'negative_prompt': '', 'seed': 42,
            'batch_size': 16}
# Fields of the network that change how it is computed, not what.
_HOW = ('parent', 'name', 'dtype', 'convolution', 'remat', 'scan_layers')


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """The parts of a Pipeline.

    Attributes:
      name: of the official variant or of the training run.
      config: plain data with sequence, extract (encoder and codec), model and sampling, as in configs/base.py.
      model: the network. params: its parameters, NumPy arrays.
      step: of the weights; None for an official network.
      load: official model by name → parameters, for the encoders and the codec.
      codec_path: of the fitted pca codec.
    """
    name: str
    config: dict[str, Any]
    model: mmaudio.MMAudio
    params: Any
    step: int | None
    load: Callable[[str], Any]
    codec_path: pathlib.Path | None


def find(source: Path, *, variant: str | None, dtype: str | None, cache: Path | None, folder: Path | None, offline: bool,
         verify: bool, sigma_rel: float | None, step: int | None, data_dir: Path | None) -> Pretrained:
    """Loads the network and prepares to load the rest. Arguments and errors are those of Pipeline.from_pretrained."""
    if dtype not in (None, *store.DTYPES):
        raise ValueError(f'dtype {dtype!r} is not one of {", ".join(store.DTYPES)}')
    if os.fspath(source) in mmaudio.VARIANTS:
        if variant not in (None, os.fspath(source)):
            raise ValueError(f'variant is {variant!r}, but {os.fspath(source)!r} names the network already; leave one out')
        _check_no_step(source, step)
        return _official(os.fspath(source), dtype, _loader(dtype, cache, folder, offline, verify))
    place = pathlib.Path(source)
    if not place.is_dir():
        raise ValueError(f'{os.fspath(source)!r} is neither an official network ({", ".join(mmaudio.VARIANTS)}) nor a folder '
                         'with official files or of a training run')
    if (place / 'ema').is_dir():
        if variant is not None:
            raise ValueError(f'variant is {variant!r}, but {place} is a training run, which has one network; it chooses among '
                             'official files')
        loader = functools.partial(_loader, cache=cache, folder=folder, offline=offline, verify=verify)
        return _trained(place, dtype, loader, sigma_rel, step, data_dir)
    _check_no_step(source, step)
    return _official(_variant_in(place, variant), dtype, _loader(dtype, cache, place, offline, verify))


def _check_no_step(source: Path, step: int | None) -> None:
    if step is not None:
        raise ValueError(f'step is {step}, but {os.fspath(source)} has official weights, without steps; it chooses among those '
                         'of a training run')


def agreed_step(source: Path) -> int | None:
    """The last stored step of a run's workdir, as process 0 sees it, for `find`; None for official weights. Every process of a
    job must call, because it may look while that run goes on."""
    official = os.fspath(source) in mmaudio.VARIANTS
    trained = not official and hosts.agreed(bool(snapshots.stored_steps(pathlib.Path(source))))
    return snapshots.latest_agreed(pathlib.Path(source)) if trained else None


def to_train_on(config, model: mmaudio.MMAudio, data: pathlib.Path) -> Any:
    """The parameters of config.weights.start_from, float32 NumPy arrays, with the latents' statistics that they go with.

    Args:
      config: of the run that begins with them.
      model: its network.
      data: the folder that holds its records.

    Raises:
      ValueError: nothing there, or a network of other sizes, conditions or latents (names the field); errors of `find`.
    """
    source = config.weights.start_from
    step = agreed_step(source)
    chosen = config.model.variant if step is None and source not in mmaudio.VARIANTS else None
    found = find(source, variant=chosen, dtype='float32', step=step, data_dir=data,
                 sigma_rel=config.ema.synthesis_sigma_rel, **store.places(config.weights))
    for field, (theirs, ours) in differences(found.config, found.model, config, model).items():
        raise ValueError(f'config.weights.start_from: {source} was trained with {field} {theirs!r}, and config.{field} is '
                         f'{ours!r}')
    return found.params


def differences(config: Mapping[str, Any], model: mmaudio.MMAudio, other_config: Mapping[str, Any],
                other_model: mmaudio.MMAudio) -> dict[str, tuple[Any, Any]]:
    """Field → its two values, of what changes the meaning of a network's parameters: rate, sizes and forms, encoder, codec."""
    pairs: dict[str, tuple[Any, Any]] = {'sequence.rate': (config['sequence']['rate'], other_config['sequence']['rate'])}
    pairs |= {f'model.{field.name}': (getattr(model, field.name), getattr(other_model, field.name))
              for field in dataclasses.fields(model) if field.name not in _HOW}
    pairs |= {f'extract.{name}': (config['extract'][name], other_config['extract'][name]) for name in ('encoder', 'codec')}
    return {field: values for field, values in pairs.items() if values[0] != values[1]}


def official_config(variant: str, dtype: str | None = None) -> dict[str, Any]:
    """Plain data of an official network, as Pretrained.config."""
    return {
        'name': variant,
        'sequence': {'rate': files.rate_of(variant), 'duration_s': TRAINING_S},
        'extract': {'encoder': 'official', 'codec': 'official'},
        'model': {**store.OFFICIAL, 'variant': variant, 'dtype': dtype or 'float32'},
        'sampling': dict(SAMPLING),
    }


def _loader(dtype: str | None, cache: Path | None, folder: Path | None, offline: bool, verify: bool) -> Callable[[str], Any]:

    def load(name: str) -> Any:
        # The codec is always float32: it is small, and its sine loses its argument in bfloat16.
        small = name.startswith(('vae', 'bigvgan'))
        return store.load(name, dtype='float32' if small else dtype or 'float32', cache=cache, folder=folder, offline=offline,
                          verify=verify)

    return load


def _official(variant: str, dtype: str | None, load: Callable[[str], Any]) -> Pretrained:
    config = official_config(variant, dtype)
    model = mmaudio.build(config['model'], Sequence(**config['sequence']))
    return Pretrained(variant, config, model, load(f'mmaudio_{variant}'), None, load, None)


def _trained(workdir: pathlib.Path, dtype: str | None, loader: Callable[[str], Callable[[str], Any]], sigma_rel: float | None,
             step: int | None, data_dir: Path | None) -> Pretrained:
    step = snapshots.latest(workdir) if step is None else step
    params, config = snapshots.load_params(workdir, sigma_rel, step)
    sequence = Sequence(config['sequence']['rate'], config['sequence']['duration_s'])
    model = {**config['model'], **({'dtype': dtype} if dtype else {})}
    data = pathlib.Path(data_dir or config['data_dir'] or workdir)
    codec_path = data / 'records' / 'codec.npz'
    snapshots.check_codec(workdir, step, codec_path)
    load = loader(dtype or config['weights']['dtype'])  # that which made the run's records
    return Pretrained(config['name'], config, mmaudio.build(model, sequence), params, step, load, codec_path)


def _variant_in(folder: pathlib.Path, variant: str | None) -> str:
    """The network whose official file is in the folder, or in its weights/."""
    if variant is not None and variant not in mmaudio.VARIANTS:
        raise ValueError(f'variant is {variant!r}; it must be one of {", ".join(mmaudio.VARIANTS)}')
    found = [name for name in mmaudio.VARIANTS
             if any((place / f'mmaudio_{name}.pth').is_file() for place in (folder, folder / 'weights'))]
    if variant is not None and variant in found:
        return variant
    if not found or variant is not None:
        wanted = 'mmaudio_VARIANT.pth' if variant is None else f'mmaudio_{variant}.pth'
        raise ValueError(f'{folder}: holds no official network ({wanted}), and nothing was trained there (ema/): train first '
                         '(--mode=train), or check the folder')
    if len(found) > 1:
        raise ValueError(f'{folder}: holds several networks; choose one of them with variant=, or give its name instead '
                         f'of the folder, with config.weights.folder={folder}: {", ".join(found)}')
    return found[0]
