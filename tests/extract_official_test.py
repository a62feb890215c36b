"""The official encoder through the whole path from file to record, at a tiny size."""
import json
import pathlib

import numpy as np
import pytest

from data_pipelines import clips
from data_pipelines import extract
from data_pipelines import reading
from data_pipelines import shards
from mmaudio_jax import encoders
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence
from tests import broken_media
from tests import extract_test
from tests.official_encoder_test import Loader
from tests.official_encoder_test import tiny_variants  # noqa: F401  # pylint: disable=unused-import
from tests.official_encoder_test import trees  # noqa: F401  # pylint: disable=unused-import


@pytest.mark.slow
def test_records_hold_what_the_networks_compute_of_the_clips_frames(tmp_path, trees, monkeypatch):  # noqa: F811
    """Whatever decoding, batching, padding and storing do on the way."""
    rows, folder = [], tmp_path / 'media' / 'clips'
    folder.mkdir(parents=True)
    for i in range(3):
        broken_media.write_av(folder / f'{i}.mp4', i)
        rows.append({'id': str(i), 'video': f'{i}.mp4', 'audio': None, 'caption': f'thing {i % 2}', 'split': 'train'})
    (folder / 'train.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    load = Loader(trees)
    monkeypatch.setattr(shards.store, 'load', lambda name, **places: load(name))
    config = extract_test.make_config(datasets=(('clips', 'media/clips'),), encoder='official', batch_size=2, clips_per_shard=3)
    extract.extract(config, tmp_path)
    sequence = Sequence('16k', 1.0)
    encoder = encoders.make('official', sequence, load)
    request = reading.Request(encoder.frame_requests, 1.0, ((16_000, sequence.waveform_length),))
    source = records.load_source(tmp_path / 'records' / 'clips', 'train', records.schema_of(config))
    for i, clip in enumerate(clips.read_table(pathlib.Path(folder / 'train.jsonl'))):
        loaded, = reading.load([clip], request)
        clip_features, sync_features = encoder.encode_video(*(stream[None] for stream in loaded.frames))
        expected = {'clip_features': clip_features, 'sync_features': sync_features,
                    'text_features': encoder.encode_text([clip.caption])}
        for name, value in expected.items():
            # Measured beyond the rounding to float16: see the report of the run.
            np.testing.assert_allclose(source[i][name].astype(np.float32), value[0], rtol=1e-3, atol=1e-4)
