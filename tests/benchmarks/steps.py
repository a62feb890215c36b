"""The train step or the sampler on the devices that are here: seconds of tracing, compiling and running, operations a second.

    python -m tests.benchmarks.steps --config=s_16k [--program=train|sampler] [--batch=2] [--steps=3] [--dtype=float32]

Random features and parameters; the sampler stops at the latents. Prints one line of JSON.
"""
import argparse
import importlib
import json
import time

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import flops
from mmaudio_jax import partitioning
from mmaudio_jax import records
from mmaudio_jax import sampler
from mmaudio_jax import train_step
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence


def features(config, mesh: jax.sharding.Mesh, batch: int) -> dict[str, jax.Array]:
    """A batch of random numbers in the schema of the records."""
    schema, rng = records.schema_of(config), np.random.default_rng(0)
    dtype = records.FEATURE_DTYPES[schema.feature_dtype]
    values = {name: rng.normal(size=(batch, *shape)).astype(dtype) for name, shape in schema.shapes.items()}
    values['latent_std'] = np.abs(values['latent_std'])
    values |= {name: np.ones(batch, bool) for name in records.FLAGS}
    return partitioning.spread(values, partitioning.batch_sharding(mesh))


def timed(compiled, arguments, again, steps: int) -> float:
    """Seconds of a run, the least of `steps`, after one that warms up; `again` makes the next arguments from a result."""
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        result = jax.block_until_ready(compiled(*arguments))
        seconds.append(time.perf_counter() - started)
        arguments = again(result)
    return min(seconds[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default='s_16k')
    parser.add_argument('--program', choices=('train', 'sampler'), default='train')
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--steps', type=int, default=3)
    parser.add_argument('--dtype', default=None, help="the config's by default")
    flags = parser.parse_args()
    config = importlib.import_module(f'configs.{flags.config}').get_config()
    config.model.dtype = flags.dtype or config.model.dtype
    config.input.batch_size = flags.batch
    mesh = partitioning.make_mesh(config.mesh, config.sharding.slice_axis)
    sequence = Sequence(**config.sequence)
    model = mmaudio.build(config.model, sequence)
    channels, empty = sequence.latent_channels, np.zeros((model.text_length, model.text_width))
    prepared = train_step.prepare(config, model, sequence, mesh)
    batch = features(config, mesh, flags.batch)
    state = jax.jit(lambda: prepared.init((np.zeros(channels), np.ones(channels)), empty),
                    out_shardings=partitioning.shardings_of(prepared.state))()
    if flags.program == 'train':
        function, arguments, again = prepared.step, (state, batch), lambda result: (result[0], batch)
        work = flags.batch * flops.training(model, sequence)
    else:
        settings = sampler.SamplerSettings.of(config.sampling)
        function = jax.jit(sampler.make_sampler(prepared.network, settings, mesh))
        noise = sampler.noise(0, range(flags.batch), sequence.latent_length, channels)
        text = batch['text_features'].astype(jnp.float32)
        arguments = (state.params, partitioning.spread(noise, partitioning.batch_sharding(mesh)),
                     batch['clip_features'].astype(jnp.float32), batch['sync_features'].astype(jnp.float32), text, text)
        again, evaluations = (lambda _: arguments), settings.num_steps * sampler.EVALUATIONS[settings.solver]
        work = flags.batch * (1 + (settings.guidance > 1)) * (flops.conditions(model, sequence)
                                                              + evaluations * flops.velocity(model, sequence))
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    traced = time.perf_counter()
    compiled = lowered.compile()
    built = time.perf_counter()
    seconds = timed(compiled, arguments, again, flags.steps)
    peak = flops.peak(jax.devices()[0].device_kind)
    print(json.dumps({'config': flags.config, 'program': flags.program, 'batch': flags.batch, 'dtype': model.dtype.name,
                      'devices': f'{jax.device_count()} {jax.devices()[0].device_kind}', 'trace_s': round(traced - started, 2),
                      'compile_s': round(built - traced, 2), 'run_s': round(seconds, 4),
                      'clips_a_second': round(flags.batch / seconds, 3),
                      'model_tflops_a_second': round(work / seconds / 1e12, 3),
                      'utilisation': round(work / seconds / peak / mesh.size, 3) if peak else None}))


if __name__ == '__main__':
    main()
