"""TensorFlow Datasets over the extracted sets, without TensorFlow.

    source = AvFeatures('DIR/records/impacts').as_data_source('train')
    source[0]['sync_features']
"""
import os
import pathlib
from typing import Any

from tensorflow_datasets.core import read_only_builder

from mmaudio_jax import records


class AvFeatures(read_only_builder.ReadOnlyBuilder):
    """The TFDS builder of one record set: latents, CLIP and sync features, text features, ids, captions.

    Attributes:
      extraction: what metadata.json says about the features: rate, duration_s, encoder, codec, shapes, tables.
    """

    def __init__(self, folder: str | os.PathLike):
        """Opens the set in `folder`; FileNotFoundError when there is none."""
        self.extraction: dict[str, Any] = records.read_metadata(pathlib.Path(folder))
        super().__init__(builder_dir=os.fspath(folder))
