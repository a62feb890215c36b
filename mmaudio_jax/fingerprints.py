"""What results depend on and no config says: digests of weights, codec and records, by their content wherever they lie."""
import hashlib
import json
import pathlib
from typing import Any
import zipfile

from mmaudio_jax import media
from mmaudio_jax import records
from mmaudio_jax.media import Path
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
        found = store.converted(f'mmaudio_{name}', **{**places, **({'folder': folder} if folder.is_dir() else {})})
        return found.stem.rpartition('-')[0]  # its name and the MD5 of the official file; then that of our code
    sums = []
    for path in sorted(folder.glob('ema/*/*.npz')):
        if path.parent.name.isdigit() and int(path.parent.name) <= step:
            with zipfile.ZipFile(path) as file:
                sums.append((path.parent.name, path.name, [(entry.filename, entry.CRC) for entry in file.infolist()]))
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()


def of_records(config, data: pathlib.Path) -> dict[str, Any]:
    """What is known of config.evaluate.dataset's records: of which tables and which codec they were made, and their number."""
    folder = data / 'records' / config.evaluate.dataset
    return {'metadata': of_file(folder / records.METADATA_FILE), 'dataset_info': of_file(folder / 'dataset_info.json'),
            'without_text': config.evaluate.dataset in config.input.without_text}
