"""What results depend on and no config says: digests of weights, codec and records, by their content wherever they lie."""
from collections.abc import Iterable
import hashlib
import json
import pathlib
from typing import Any
import zipfile

from mmaudio_jax import media
from mmaudio_jax import records
from mmaudio_jax.media import Path
from mmaudio_jax.weights import files
from mmaudio_jax.weights import store


def of_file(path: pathlib.Path | None) -> str | None:
    """Digest of a file; None when there is none."""
    return media.digest(path) if path is not None and path.is_file() else None


def of_weights(source: Path, name: str, step: int | None, places: dict[str, Any]) -> str:
    """Digest of a network's weights, of which only the sums are read that are kept beside them.

    Args:
      source: as pretrained.find takes it, which has found the network there.
      name: of the network. step: of the snapshot that ends its average, None for an official network.
      places: store.places(config.weights).
    """
    folder = pathlib.Path(source)
    if step is None:
        found = store.converted(f'mmaudio_{name}', **loaded_from(source, step, places))
        return found.stem.rpartition('-')[0]  # its name and the MD5 of the official file; then that of our code
    sums = []
    for path in sorted(folder.glob('ema/*/*.npz')):
        if path.parent.name.isdigit() and int(path.parent.name) <= step:
            sums.append((path.parent.name, path.name, _checksums(path)))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def _checksums(path: pathlib.Path) -> list[tuple[str, int]]:
    """Of the tensors in an .npz; none of a damaged one: whoever samples from it says so, and others do not need it."""
    try:
        with zipfile.ZipFile(path) as file:
            return [(entry.filename, entry.CRC) for entry in file.infolist()]
    except zipfile.BadZipFile:
        return []


def loaded_from(source: Path, step: int | None, places: dict[str, Any]) -> dict[str, Any]:
    """Where a network's codec and encoders come from: a folder of official files holds its own. Arguments as of_weights."""
    folder = pathlib.Path(source)
    return {**places, 'folder': folder} if step is None and folder.is_dir() else places


def of_codec(name: str, rate: str, path: pathlib.Path | None, places: dict[str, Any]) -> Any:
    """What is known of a codec, as JSON has it.

    Args:
      name, rate: config.extract.codec and config.sequence.rate of the network.
      path: of the fitted pca codec.
      places: of the official files, as `loaded_from` gives them.

    Returns:
      pca: the file's digest. official: {model: MD5} of the files that are not the released ones; None when all are.
    """
    return _own((files.VAES[rate], files.VOCODERS[rate]), places) if name == 'official' else of_file(path)


def of_encoder(name: str, models: Iterable[str], places: dict[str, Any]) -> dict[str, Any]:
    """{'encoder': {model: MD5}} of those of its `models` (files.CLIP, files.SYNCHFORMER) whose files are not the released ones;
    {} when there are none, so that older descriptions still fit. Arguments as of_codec."""
    found = _own(models, places) if name == 'official' else None
    return {'encoder': found} if found else {}


def of_negative_prompt(config) -> dict[str, Any]:
    """`of_encoder` of what encodes config.sampling.negative_prompt beside records; {} without one."""
    models = [files.CLIP] if config.sampling.negative_prompt else []
    return of_encoder(config.extract.encoder, models, store.places(config.weights))


def _own(models: Iterable[str], places: dict[str, Any]) -> dict[str, str] | None:
    found = {model: store.own_md5(model, **places) for model in models}
    return {model: md5 for model, md5 in found.items() if md5} or None


def of_records(config, data: pathlib.Path) -> dict[str, Any]:
    """What is known of config.evaluate.dataset's records: of which tables and which codec they were made, and their number."""
    folder = data / 'records' / config.evaluate.dataset
    return {'metadata': of_file(folder / records.METADATA_FILE), 'dataset_info': of_file(folder / 'dataset_info.json'),
            'without_text': config.evaluate.dataset in config.input.without_text}
