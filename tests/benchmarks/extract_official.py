"""Extraction with the official architectures at full size, holding synthetic weights, on one real clip: from file to record.

    python -m tests.benchmarks.extract_official --video=oa4_launch.webm --golden=end_to_end_launch.npz --folder=DIR

The golden holds what the official modules compute with the same weights from the same 2.0 s of the same file. Needs about 9 GB
and some minutes on a CPU. Prints one JSON line: largest error of each feature over its deviation; exit code 1 when one is above
its bound. Records hold float16, whose rounding is part of the error; the official frames are one grey level off here and there.
"""
import argparse
import json
import pathlib
import shutil
import sys
import time

import numpy as np

from configs import base
from data_pipelines import clips
from data_pipelines import extract
from data_pipelines import reading
from data_pipelines import shards
from mmaudio_jax import codec
from mmaudio_jax import records
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.weights import clip as clip_weights
from mmaudio_jax.weights import store
from mmaudio_jax.weights import synchformer as synchformer_weights
from mmaudio_jax.weights import vae as vae_weights
from tests import official_tensors

MAPPINGS = {'clip_vit_h_14_378': clip_weights, 'synchformer_visual': synchformer_weights, 'vae_16k': vae_weights}
BOUNDS = {'clip_features': 0.02, 'sync_features': 0.02, 'text_features': 2e-3, 'latent_mean': 2e-3, 'latent_std': 2e-3}


def load(name: str, **_):
    """In the place of weights.store.load."""
    return official_tensors.params_of(MAPPINGS[name], official_tensors.full_size(name), store.build(name))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest error over the expected values' deviation."""
    return float(np.abs(found.astype(np.float64) - expected).max() / expected.std())


def main() -> None:
    """Extracts, compares, prints."""
    parser = argparse.ArgumentParser()
    for name in ('video', 'golden', 'folder'):
        parser.add_argument(f'--{name}', type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    golden, started = np.load(arguments.golden), time.time()
    config = base.get_config()
    config.sequence.duration_s = float(golden['duration'])
    config.extract.update(datasets=(('launch', 'media/launch'),), batch_size=2, workers=1)
    shutil.rmtree(arguments.folder, ignore_errors=True)
    table = arguments.folder / 'media' / 'launch' / 'train.jsonl'
    table.parent.mkdir(parents=True)
    rows = [{'id': f'launch {i}', 'video': arguments.video.absolute(), 'audio': None, 'caption': str(golden['prompt']),
             'split': 'train', 'start_s': start_s} for i, start_s in enumerate((0.0, 3.0))]
    clips.write_table(table, rows)
    shards.store.load = load
    extract.extract(config, arguments.folder)
    source = records.load_source(arguments.folder / 'records' / 'launch', 'train', records.schema_of(config))
    example, took = source[0], time.time() - started
    sequence = Sequence('16k', config.sequence.duration_s)
    request = reading.Request((), sequence.duration_s, ((16_000, sequence.waveform_length),))
    loaded, = reading.load(clips.read_table(table)[:1], request)
    mean, std = codec.make('official', sequence, None, load).encode(loaded.waveforms[0][None])
    expected = {name: golden[name][0] for name in ('clip_features', 'sync_features', 'text_features')}
    errors = {name: error(example[name], value) for name, value in
              {**expected, 'latent_mean': mean[0], 'latent_std': std[0]}.items()}
    print(json.dumps({'errors': {name: float(f'{value:.3g}') for name, value in errors.items()}, 'bounds': BOUNDS,
                      'records': len(source), 'took_s': round(took)}))
    sys.exit(any(value > BOUNDS[name] for name, value in errors.items()))


if __name__ == '__main__':
    main()
