"""TensorFlow Datasets over the extracted sets, without TensorFlow.

    source = AvFeatures('DIR/records/impacts').as_data_source('train')
    source[0]['sync_features']

Importing this module also registers a builder for each public dataset, so that its set is found by name:

    source = tfds.data_source('vggsound', split='train', data_dir='DIR/records')
"""
import os
import pathlib
from typing import Any

from tensorflow_datasets.core import read_only_builder

from mmaudio_jax import records


class AvFeatures(read_only_builder.ReadOnlyBuilder, skip_registration=True):  # type: ignore[call-arg]
    """The TFDS builder of one record set: latents, CLIP and sync features, text features, ids, captions.

    Attributes:
      extraction: what metadata.json says about the features: rate, duration_s, encoder, codec, shapes, tables.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the set in `folder`; FileNotFoundError when there is none."""
        self.extraction: dict[str, Any] = records.read_metadata(pathlib.Path(folder))
        super().__init__(builder_dir=os.fspath(folder))


class _Named(AvFeatures, skip_registration=True):  # type: ignore[call-arg]
    """A set that stands under its dataset's name."""

    def __init__(self, data_dir: str | os.PathLike, **_: Any):
        """Opens the set in data_dir/<name>; FileNotFoundError when there is none."""
        super().__init__(pathlib.Path(data_dir) / type(self).name)


class Vggsound(_Named):
    """VGGSound: videos of ten seconds with one of 309 labels (vggsound.py)."""


class Audiocaps(_Named):
    """AudioCaps: sounds from AudioSet with written captions (audiocaps.py)."""


class Clotho(_Named):
    """Clotho: sounds from Freesound with five captions each (clotho.py)."""


class AudiosetSl(_Named):
    """AudioSet's strongly labelled part with WavCaps's captions (wavcaps.py)."""


class Bbc(_Named):
    """BBC Sound Effects with WavCaps's captions (wavcaps.py)."""


class Freesound(_Named):
    """Freesound with WavCaps's captions (wavcaps.py)."""


class Moviegen(_Named):
    """Movie Gen Audio Bench: videos to test on (moviegen.py)."""


class GreatestHits(_Named):
    """Greatest Hits: a drumstick that hits and scratches things (greatest_hits.py)."""


class Impacts(_Named):
    """The built-in dataset (impacts.py)."""


class ImpactsSounds(_Named):
    """The sounds without video of the built-in dataset (impacts.py)."""
