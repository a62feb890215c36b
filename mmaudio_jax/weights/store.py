"""Official weights as our parameter trees: found or downloaded, verified, converted once, loaded memory-mapped.

    params = store.load('mmaudio_large_44k_v2')

A conversion is kept in the cache folder under the official file's MD5 and a hash of the code that made it: it is never stale.
"""
from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import hashlib
import inspect
import pathlib
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from mmaudio_jax import media
from mmaudio_jax import sequence
from mmaudio_jax.media import Path
from mmaudio_jax.models import anti_aliasing
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import clip
from mmaudio_jax.models import layers
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import mmdit
from mmaudio_jax.models import synchformer
from mmaudio_jax.models import transformer
from mmaudio_jax.models import vae
from mmaudio_jax.weights import bigvgan as bigvgan_weights
from mmaudio_jax.weights import clip as clip_weights
from mmaudio_jax.weights import download
from mmaudio_jax.weights import files
from mmaudio_jax.weights import mmaudio as mmaudio_weights
from mmaudio_jax.weights import pickles
from mmaudio_jax.weights import sources
from mmaudio_jax.weights import synchformer as synchformer_weights
from mmaudio_jax.weights import tensor_file
from mmaudio_jax.weights import vae as vae_weights

DTYPES = {'float32': np.dtype(np.float32), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}
_MODELS = {'network': mmaudio, 'vae': vae, 'vocoder': bigvgan, 'clip': clip, 'synchformer': synchformer}
_PARTS = {'network': (layers, mmdit), 'vocoder': (anti_aliasing,), 'clip': (transformer,),
          'synchformer': (transformer,)}  # also say how parameters lie
_MAPPINGS: dict[str, Any] = {'network': mmaudio_weights, 'vae': vae_weights, 'vocoder': bigvgan_weights, 'clip': clip_weights,
                             'synchformer': synchformer_weights}
OFFICIAL = {'sync_fusion': 'modulate', 'rope': 'aligned', 'mlp': 'conv', 'convolution': 'auto', 'dtype': 'float32',
            'remat': 'none'}


def load(name: str, *, dtype: str = 'float32', cache: Path | None = None, folder: Path | None = None, offline: bool = False,
         verify: bool = True) -> dict[str, Any]:
    """Parameters of an official model.

    Args:
      name: 'mmaudio_large_44k_v2', 'vae_44k', 'bigvgan_v2_44k', … : a key of files.BY_NAME; see also files.names_for.
      dtype: 'float32' gives read-only arrays mapped from the cache; 'bfloat16' arrays in memory.
      cache: folder for downloads and conversions; None for $MMAUDIO_JAX_CACHE or ~/.cache/mmaudio_jax.
      folder: where official files are looked for first, under their official names; also in its weights/ and ext_weights/.
      offline: nothing is downloaded.
      verify: a file must have the published MD5. False is for files of your own in the official form.

    Raises:
      ValueError: an unknown name or dtype; a wrong MD5; a file that is damaged, dangerous or of another model; NaN weights.
      OSError: no file and no network, no space, no permission.
    """
    if dtype not in DTYPES:
        raise ValueError(f'dtype {dtype!r} is not one of {", ".join(DTYPES)}')
    path = converted(name, cache=cache, folder=folder, offline=offline, verify=verify)
    try:
        file = tensor_file.read(path)
    except tensor_file.TensorFileError as error:
        raise tensor_file.TensorFileError(f'{error}: delete this conversion, and it is made anew') from error
    leaves = file.tensors()
    if dtype != 'float32':
        for leaf in leaves:
            leaves[leaf] = leaves[leaf].astype(DTYPES[dtype])
            file.release()
    return traverse_util.unflatten_dict({tuple(leaf.split('/')): array for leaf, array in leaves.items()})


def places(weights: Any) -> dict[str, Any]:
    """The arguments of `load` that config.weights gives, apart from the dtype; its '' stand for None."""
    return {'cache': weights.cache or None, 'folder': weights.folder or None, 'offline': weights.offline,
            'verify': weights.verify}


def loader(weights: Any, dtype: str = 'float32') -> Callable[[str], dict[str, Any]]:
    """`load` with what config.weights says, for encoders.make and codec.make; a codec is always float32."""
    return functools.partial(load, dtype=dtype, **places(weights))


def converted(name: str, *, cache: Path | None = None, folder: Path | None = None, offline: bool = False,
              verify: bool = True) -> pathlib.Path:
    """The converted file of a model, which is made if need be. Arguments and errors are those of `load`."""
    entry = files.get(name)
    root = download.cache_folder(cache)
    modules = (tensor_file, pickles, _MAPPINGS[entry.kind], sources, _MODELS[entry.kind], *_PARTS.get(entry.kind, ()))
    code = hashlib.md5(''.join(map(inspect.getsource, modules)).encode())
    suffix = f'{code.hexdigest()[:8]}.safetensors'

    def place(md5: str) -> pathlib.Path:
        return root / 'converted' / f'{name}-{md5[:12]}-{suffix}'

    if verify and entry.md5 and place(entry.md5).is_file():
        return place(entry.md5)
    source = download.find(entry, root, folder)
    if source is None:
        before = _converted_before(entry, place(entry.md5 or '*'))
        if before is not None:
            return before
        source, verify = download.fetch(entry, root, offline), True
    md5 = download.checked_md5(entry, source, root, verify)
    with download.lock(place(md5)):
        if not place(md5).is_file():
            if verify and not entry.md5:
                tensor_file.check_sums(source)
            _convert(entry, source, md5, place(md5))
            for old in place(md5).parent.glob(f'{name}-{md5[:12]}-*.safetensors'):
                if old != place(md5):
                    old.unlink(missing_ok=True)
    return place(md5)


def own_md5(name: str, *, cache: Path | None = None, folder: Path | None = None, offline: bool = False,
            verify: bool = True) -> str | None:
    """The MD5 of the file that `load` reads for a model when it is one of your own; None when it is the released one.

    Nothing is converted or downloaded, and a file is read once (download.checked_md5). A file whose MD5 was never published
    counts as released when it came from the hub. Arguments and errors are those of `load`.
    """
    del offline
    entry, root = files.get(name), download.cache_folder(cache)
    if verify and entry.md5:
        return None  # `load` takes no other
    source = download.find(entry, root, folder)
    if source is None or not entry.md5 and download.is_from_hub(source):
        return None
    md5 = download.checked_md5(entry, source, root, verify)
    return None if md5 == entry.md5 else md5


def _converted_before(entry: files.OfficialFile, pattern: pathlib.Path) -> pathlib.Path | None:
    """A conversion of an official file that was deleted since; when no MD5 is published, of one that came from the hub."""
    for path in sorted(pattern.parent.glob(pattern.name), key=lambda path: path.stat().st_mtime, reverse=True):
        if entry.md5 or tensor_file.read(path).metadata['from_hub'] == 'True':
            return path
    return None


def build(name: str) -> Any:
    """The Flax module of an official model, computing in float32.

    Raises:
      ValueError: an unknown name.
    """
    entry = files.get(name)
    if entry.kind == 'network':
        return mmaudio.build({'variant': entry.variant, **OFFICIAL}, sequence.Sequence(files.rate_of(entry.variant), 8.0))
    if entry.kind in ('vae', 'vocoder'):
        return _MODELS[entry.kind].build(entry.variant)
    return _MODELS[entry.kind].build(entry.variant, jnp.float32)


def _convert(entry: files.OfficialFile, source: pathlib.Path, md5: str, target: pathlib.Path) -> None:
    """Writes the parameter tree of `source` leaf by leaf: memory holds one leaf and the pages it came from."""
    file = tensor_file.read(source)
    tensors = file.tensors(*entry.keys)

    def finite() -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in _leaves(entry, tensors, source):
            if not np.isfinite(leaf).all():
                raise ValueError(f'{source}: {_culprit(tensors, path)} holds NaN or infinity; get the file again')
            yield '/'.join(path), leaf
            file.release()

    metadata = {'model': entry.name, 'source': source.name, 'source_md5': md5, 'source_bytes': str(source.stat().st_size),
                'from_hub': str(download.is_from_hub(source))}
    try:
        with media.explained(target):
            target.parent.mkdir(parents=True, exist_ok=True)
        tensor_file.write_safetensors(target, finite(), metadata)
    except media.MediaError as error:
        raise OSError(f'{target}: the converted weights cannot be written ({error.reason}); choose another folder with '
                      f'config.weights.cache or ${download.VARIABLE}') from error


def _leaves(entry: files.OfficialFile, tensors: Mapping[str, np.ndarray],
            source: pathlib.Path) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
    try:
        yield from _MAPPINGS[entry.kind].leaves(tensors, build(entry.name))
    except ValueError as error:
        raise ValueError(f'{source}: {error}') from error


def _culprit(tensors: Mapping[str, np.ndarray], path: tuple[str, ...]) -> str:
    """The first tensor that is not finite, or the leaf when the conversion made it so."""
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            return name
    return f'the parameter {"/".join(path)}'
