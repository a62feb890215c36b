"""The stages that exchange weights with the official code: --mode=import and --mode=export."""
import pathlib
from typing import Any

from mmaudio_jax import pretrained
from mmaudio_jax import snapshots
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import files
from mmaudio_jax.weights import mmaudio as mmaudio_weights
from mmaudio_jax.weights import store
from mmaudio_jax.weights import tensor_file
from mmaudio_jax.weights import torch_writer
from mmaudio_jax.weights import vae as vae_weights

FORMATS = ('pth', 'safetensors')
OWN = 'network'  # in config.weights.export: what the workdir's run trained
_MAPPINGS: dict[str, Any] = {'network': mmaudio_weights, 'vae': vae_weights}


def import_weights(config: Any, workdir: pathlib.Path) -> None:
    """Finds or downloads, verifies and converts every official file of config.weights.variants; prints where each is.

    Raises:
      ValueError, OSError: those of `store.load`.
    """
    del workdir  # all of it goes into the cache
    names = [name for variant in config.weights.variants or (config.model.variant,) for name in files.names_for(variant)]
    for name in dict.fromkeys(names):
        path = store.converted(name, **store.places(config.weights))
        print(f'{name}: {path.stat().st_size / 1e6:.0f} MB in {path}', flush=True)


def export_weights(config: Any, workdir: pathlib.Path) -> None:
    """Writes config.weights.export with the official names and layouts into workdir/export/.

    Raises:
      ValueError: a field of the config, or weights that have no official form.
      OSError, media.MediaError: no weights there, no space, no permission.
    """
    if config.weights.export_format not in FORMATS:
        raise ValueError(f'config.weights.export_format is {config.weights.export_format!r}; it must be one of '
                         f'{", ".join(FORMATS)}')
    for name in config.weights.export:
        tensors, stem = _trained(config, workdir) if name == OWN else _official(name, config)
        path = workdir / 'export' / f'{stem}.{config.weights.export_format}'
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == '.pth':
            torch_writer.write(path, tensors)
        else:
            tensor_file.write_safetensors(path, tensors.items(), {'format': 'pt'})
        print(f'{name}: {path.stat().st_size / 1e6:.0f} MB in {path}', flush=True)


def _trained(config: Any, workdir: pathlib.Path) -> tuple[dict[str, Any], str]:
    params, run = snapshots.load_params(workdir, config.ema.synthesis_sigma_rel)
    model = mmaudio.build(run['model'], Sequence(run['sequence']['rate'], run['sequence']['duration_s']))
    stem = f'mmaudio_{run["model"]["variant"]}'
    official = pretrained.official_config(run['model']['variant'])
    theirs = mmaudio.build(official['model'], Sequence(**official['sequence']))
    others = pretrained.differences(run, model, official, theirs)
    if others:  # written all the same: code that is told of them can load it
        print(f'{OWN}: has the names of {stem}, but is another network, which the official code does not know by that name: '
              f'{", ".join(f"{field} {ours!r} (not {official!r})" for field, (ours, official) in others.items())}', flush=True)
    return mmaudio_weights.from_params(params, model), stem


def _official(name: str, config: Any) -> tuple[dict[str, Any], str]:
    entry = files.get(name)
    if entry.kind not in _MAPPINGS:
        raise ValueError(f'config.weights.export: {name!r} has no export; flow networks and VAEs have, and {OWN!r}, the '
                         'network that was trained in the workdir')
    params = store.load(name, dtype='float32', **store.places(config.weights))
    return _MAPPINGS[entry.kind].from_params(params, store.build(name)), pathlib.Path(entry.file).stem
