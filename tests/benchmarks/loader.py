"""How fast the loader is by itself: examples and megabytes a second, for each number of worker processes.

    python -m tests.benchmarks.loader [--rate=44k] [--examples=512] [--batch=16] [--workers=0,1,2] [--seconds=10]
                                     [--copies=1]

The records are random features of the official shapes (8 s); they are written to a temporary folder and read warm, so that this
measures decompression, parsing and batching rather than the disk. Every shard is there --copies times, one file with several
names: --copies=1000 makes a set of 512 000. `first_batch_s` is the start of an epoch. Prints one line of JSON a row.
"""
import argparse
import itertools
import json
import os
import pathlib
import resource
import tempfile
import time

import jax
import numpy as np

from configs import base
from mmaudio_jax import input_pipeline
from mmaudio_jax import partitioning
from mmaudio_jax import records

OFFICIAL_FLOAT32_VALUES = ('latent_mean', 'latent_std', 'clip_features', 'sync_features', 'text_features')


def make_config(rate: str, batch: int, workers: int):
    """The default recipe on one set."""
    config = base.get_config()
    config.sequence.rate = rate
    config.input.update(mixture=(('bench', 1),), statistics='bench', validation='bench', batch_size=batch, workers=workers)
    return config


def write(folder: pathlib.Path, config, count: int, copies: int) -> float:
    """A set of `count` examples in shards of 64, each `copies` times, text padded as captions are; mean bytes of a record."""
    schema = records.schema_of(config)
    rng = np.random.default_rng(0)
    example = {name: rng.normal(size=shape).astype(np.float32) for name, shape in schema.shapes.items()}
    example.update(video_exists=True, text_exists=True, caption='a metal rod strikes a plate', duration_s=schema.duration_s)
    lengths = [min(64, count - start) for start in range(0, count, 64)]
    name = lambda shard: folder / records.shard_name('bench', 'train', shard, copies * len(lengths))
    folder.mkdir(parents=True)
    for shard, length in enumerate(lengths):
        means = (rng.normal(size=schema.shapes['latent_mean']) for _ in range(length))
        encoded = (schema.encode({**example, 'id': f'{shard}-{i}', 'latent_mean': mean}) for i, mean in enumerate(means))
        records.write_shard(name(shard), encoded)
        for copy in range(1, copies):
            os.link(name(shard), name(copy * len(lengths) + shard))
    records.write_metadata(folder, 'bench', schema, {'train': copies * lengths}, {})
    return sum(name(shard).stat().st_size for shard in range(len(lengths))) / count


def measure(config, folder: pathlib.Path, seconds: float) -> dict:
    """Batches for that long after the first ones."""
    mesh = partitioning.make_mesh({'data': -1})
    started = time.monotonic()
    iterator = input_pipeline.train_iterator(config, folder, mesh)
    next(iterator)
    first_s = time.monotonic() - started
    for _ in range(2 * max(1, config.input.workers)):
        jax.block_until_ready(next(iterator))
    started, read = time.monotonic(), 0
    for count in itertools.count(1):
        batch = jax.block_until_ready(next(iterator))
        read += sum(value.nbytes for value in batch.values())
        took = time.monotonic() - started
        if took > seconds:
            break
    iterator.close()
    examples = count * config.input.batch_size / took
    return {'workers': config.input.workers, 'first_batch_s': round(first_s, 2), 'examples_per_s': round(examples, 1),
            'mb_per_s': round(read / took / 1e6, 1), 'examples_per_s_worker': round(examples / max(1, config.input.workers), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rate', default='44k')
    parser.add_argument('--examples', type=int, default=512)
    parser.add_argument('--copies', type=int, default=1)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--workers', default='0,1,2')
    parser.add_argument('--seconds', type=float, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        size = write(folder / 'bench', make_config(options.rate, options.batch, 0), options.examples, options.copies)
        schema = records.schema_of(make_config(options.rate, options.batch, 0))
        values = sum(int(np.prod(schema.shapes[feature])) for feature in OFFICIAL_FLOAT32_VALUES)
        print(json.dumps({'rate': options.rate, 'examples': options.examples * options.copies, 'bytes_a_record': round(size),
                          'as_float32': 4 * values, 'share': round(size / (4 * values), 3),
                          'cores': len(os.sched_getaffinity(0))}), flush=True)
        for workers in map(int, options.workers.split(',')):
            print(json.dumps(measure(make_config(options.rate, options.batch, workers), folder, options.seconds)), flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({'host_peak_gib': round(peak, 2)}))


if __name__ == '__main__':
    main()
