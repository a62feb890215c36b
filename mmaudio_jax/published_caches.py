"""The caches that av-benchmark publishes and leaves behind, read as embeddings of the references, without PyTorch.

With them VGGSound can be scored against without owning its videos. Files are mapped, not read: a clip costs what it holds.
"""
from collections.abc import Iterator
from collections.abc import Mapping
import pathlib
from typing import Any

import numpy as np

from mmaudio_jax import filterbanks
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import tensor_file

# Embedder → its embeddings: (file, key within a clip's entry, '' when the entry is the tensor itself).
_FILES = {
    'panns': {'features': ('pann_features.pth', '2048'), 'logits': ('pann_features.pth', 'logits')},
    'vggish': {'patches': ('vggish_features.pth', '')},
    'passt': {'features': ('passt_features_embed.pth', ''), 'logits': ('passt_logits.pth', '')},
    'imagebind_picture': {'vector': ('imagebind_video.pth', '')},
    'synchformer_picture': {'segments': ('synchformer_video.pth', '')},
    'clap_text': {'vector': ('clap_laion_text.pth', '')},
}
_AXES = {'features': 1, 'logits': 1, 'vector': 1, 'patches': 2, 'segments': 3}


class Published(Mapping):
    """Clip's name → its embeddings by name, as `embeddings.Stored` has them; without clips that one of the files lacks."""

    def __init__(self, files: Mapping[str, tuple[Mapping[str, Any], str]]):
        self._files = dict(files)
        self._names = sorted(set.intersection(*(set(clips) for clips, _ in self._files.values())))

    def __getitem__(self, name: str) -> dict[str, np.ndarray]:
        result = {}
        for output, (clips, key) in self._files.items():
            array = np.asarray(clips[name][key] if key else clips[name], np.float32)
            result[output] = array.reshape(array.shape[max(0, array.ndim - _AXES[output]):])  # a batch axis of one
        return result

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def length_note(folder: pathlib.Path, duration_s: float) -> str:
    """Compares the clips' length with the seconds that are scored; what to note of figures when no cache tells it, else ''.

    Of clips that are alike the longest counts: some may have ended early.

    Raises:
      ValueError: the caches are of another length; and as `load`.
    """
    counts = {'vggish': ('patches', lambda: filterbanks.vggish_patch_count(int(16_000 * duration_s))),
              'synchformer_picture': ('segments', lambda: Sequence('16k', duration_s).num_segments)}
    known = False
    for embedder, (output, count) in counts.items():
        path = folder / _FILES[embedder][output][0]
        if path.is_file():
            theirs, ours, known = max(np.shape(clip)[-_AXES[output]] for clip in _clips(path).values()), count(), True
            if theirs != ours:
                raise ValueError(f'{path}: its clips have up to {theirs} {output}, but {duration_s:g} s have {ours}; '
                                 'set config.score.duration_s to what the caches are of')
    return '' if known else "the length of the reference caches' clips is not known"


def names(folder: pathlib.Path) -> set[str]:
    """The clips of all caches in the folder.

    Raises:
      FileNotFoundError: it has none.
      ValueError: as `load`.
    """
    paths = {folder / file for files in _FILES.values() for file, _ in files.values()}
    found = [set(_clips(path)) for path in sorted(paths) if path.is_file()]
    if not found:
        raise FileNotFoundError(f'{folder}: holds none of the caches of av-benchmark (*.pth)')
    return set.union(*found)


def load(folder: pathlib.Path, embedder: str) -> Published:
    """The cached embeddings of one embedder.

    Raises:
      FileNotFoundError: the folder has no cache of it.
      ValueError: a file that is damaged, dangerous, or holds no clips.
    """
    if embedder not in _FILES:
        raise ValueError(f'av-benchmark keeps no embeddings of {embedder} for references')
    opened: dict[str, Mapping[str, Any]] = {}
    for name, _ in _FILES[embedder].values():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f'{path}: missing; it holds the embeddings of {embedder}')
        opened[name] = _clips(path)
    return Published({output: (opened[name], key) for output, (name, key) in _FILES[embedder].items()})


def _clips(path: pathlib.Path) -> Mapping[str, Any]:
    content = tensor_file.read(path).content
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f'{path}: is no cache of av-benchmark, which is a dictionary of clips')
    return content
