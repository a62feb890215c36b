"""What the TPU compiler says of the real programs, for a topology that need not be there: --mode=compile.

train      the train step that train.py runs, with the same shardings and donation
sampler    features → conditions → guided flow → VAE → vocoder → waveforms, one program
frames     CLIP's image tower on the frames of a call of the feature extraction (one device, like the next three)
segments   Synchformer on the segments of a call
texts      CLIP's text tower on the captions of a call
latents    log-mel and the VAE's encoder on the waveforms of a call

Times are estimates by hlo_cost, whose method and limits the report repeats; memory is what the compiler laid out.
"""
from collections.abc import Mapping
import functools
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mmaudio_jax import chips
from mmaudio_jax import flops
from mmaudio_jax import hlo_cost
from mmaudio_jax import media
from mmaudio_jax import official_codec
from mmaudio_jax import official_encoder
from mmaudio_jax import partitioning
from mmaudio_jax import records
from mmaudio_jax import sampler
from mmaudio_jax import train_step
from mmaudio_jax.models import bigvgan
from mmaudio_jax.models import clip
from mmaudio_jax.models import mmaudio
from mmaudio_jax.models import synchformer
from mmaudio_jax.models import vae
from mmaudio_jax.sequence import Sequence
from mmaudio_jax.sequence import SYNC_SEGMENT_FRAMES
from mmaudio_jax.sequence import TEXT_LENGTH
from mmaudio_jax.weights import store

METHOD = ('Times are estimates: the compiler\'s cycles of every operation, loops times their trips, over the clock, and what '
          'collectives take beyond what runs beside them, at the full bandwidth of their links, without latency, and between '
          'slices at config.compile.network_gbits. Copies are counted where the program waits for them. Nothing of it was '
          'measured on a chip. Memory is the compiler\'s layout.')
_COSTLIEST = 10


def report(config, workdir: pathlib.Path | None) -> None:
    """Compiles config.compile.programs for config.compile.topology, prints what they need and writes workdir/compile.json.

    Without a workdir it only prints.

    Raises:
      ValueError: no TPU compiler, an unknown topology or program, or a config that does not fit the topology.
    """
    jax.config.update('jax_platforms', 'cpu')  # the devices are described: nothing runs
    unknown = sorted(set(config.compile.programs) - set(PROGRAMS))
    if unknown:
        raise ValueError(f'config.compile.programs names {", ".join(unknown)}; those that exist are {", ".join(PROGRAMS)}')
    if not config.compile.network_gbits > 0:
        raise ValueError(f'config.compile.network_gbits is {config.compile.network_gbits}; it must be above 0')
    devices = chips.devices_of(config.compile.topology, config.compile.slices)
    several = f' in {config.compile.slices} slices' if config.compile.slices > 1 else ''
    print(f'{config.name} for {len(devices)} devices {config.compile.topology}{several}, config.mesh '
          f'{json.dumps(dict(config.mesh))}', flush=True)
    results = {}
    for name in config.compile.programs:
        text = None if workdir is None else workdir / f'compile_{name}.txt'
        results[name] = measure(PROGRAMS[name], config, devices, text)
        print(table(name, results[name]), flush=True)
    print(METHOD)
    if workdir is None:
        return
    path = workdir / 'compile.json'
    report_of_all = {'config': config.name, 'topology': config.compile.topology, 'slices': config.compile.slices,
                     'mesh': dict(config.mesh), 'method': METHOD, 'programs': results}
    with media.atomic_file(path) as beside:
        beside.write_text(json.dumps(report_of_all, indent=1) + '\n')
    print(f'every figure is in {path}')


def measure(program: Any, config, devices: list[Any], text: pathlib.Path | None = None) -> dict[str, Any]:
    """Compiles one of PROGRAMS and reads what it costs; the compiled program is written to `text`.

    Returns:
      Plain data: what was compiled, and `fits`; when it does not, `memory_bytes` and the `reason`. Otherwise bytes a
      device, seconds of one run, `utilisation` (model operations over those that the devices could do in that time),
      `sent_bytes` by kind of collective, the costliest operations, and the seconds of tracing and compiling.
    """
    chip = chips.CHIPS[config.compile.topology.partition(':')[0]]
    started = time.monotonic()
    lowered, used, work = program(config, devices)
    traced = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error) or 'hbm' not in str(error):  # other memories are the compiler's own affair
            raise
        return {**work, 'fits': False, 'memory_bytes': chip.memory_bytes, 'reason': ' '.join(str(error).split())[:300]}
    finished = time.monotonic()
    written = compiled.as_text()
    if text is not None:
        with media.atomic_file(text) as beside:
            beside.write_text(written)
    shape = chips.torus(devices)

    def collective_cycles(collective):
        if not collective.group:  # between slices
            return chip.clock_hz * collective.bytes / (config.compile.network_gbits * 1e9 / 8)
        group = [used[place] for place in collective.group]
        return chip.clock_hz * chips.collective_seconds(chip, collective.bytes, group, shape)

    cost = hlo_cost.cost(hlo_cost.parse(written), chip.memory_bandwidth / chip.clock_hz, collective_cycles)
    seconds = {name: getattr(cost, f'{name}_cycles') / chip.clock_hz for name in ('compute', 'collective', 'copy', 'guessed')}
    seconds['all'] = cost.cycles / chip.clock_hz
    peak = flops.peak(used[0].device_kind)
    return {
        **work, 'fits': True, 'bytes': _memory(compiled.memory_analysis(), chip),
        'seconds': seconds, 'utilisation': work['model_flops'] / (seconds['all'] * peak * len(used)) if peak else None,
        'sent_bytes': cost.bytes_by_kind(), 'given_bytes': sum(c.given * c.runs for c in cost.collectives),
        'unknown_loops': cost.unknown_loops,
        'costliest': [{'seconds': cycles / chip.clock_hz, 'name': op.name, 'shape': op.shape[:200], 'source': op.source}
                      for op, cycles in cost.operations[:_COSTLIEST]],
        'trace_seconds': traced - started, 'compile_seconds': finished - traced,
    }


def _memory(stats: Any, chip: chips.Chip) -> dict[str, float]:
    """Bytes a device. The peak has the arguments, the results that do not take their place, temporaries and the program."""
    peak = (stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes + stats.temp_size_in_bytes
            + stats.generated_code_size_in_bytes)
    return {'arguments': stats.argument_size_in_bytes, 'temporaries': stats.temp_size_in_bytes,
            'program': stats.generated_code_size_in_bytes, 'peak': peak, 'memory': chip.memory_bytes}


def table(name: str, result: Mapping[str, Any]) -> str:
    """The result of `measure` as lines for a reader."""
    heading = f'\n{name}: {result["what"]}'
    if not result['fits']:
        return f'{heading}\n  does not fit into {result["memory_bytes"] / 2**30:.0f} GiB: {result["reason"]}'
    size, seconds = result['bytes'], result['seconds']
    share = size['peak'] / size['memory']
    lines = [heading,
             f'  memory a device  arguments {_gib(size["arguments"])}, temporaries {_gib(size["temporaries"])}, peak '
             f'{_gib(size["peak"])} of {_gib(size["memory"])} ({share:.0%})',
             f'  model operations {result["model_flops"]:.4g} by formula, over all devices',
             f'  estimated time   {1e3 * seconds["all"]:.2f} ms: operations {1e3 * seconds["compute"]:.2f} (without the '
             f'compiler\'s estimate {1e3 * seconds["guessed"]:.2f}), collectives beyond overlap '
             f'{1e3 * seconds["collective"]:.2f}, copies {1e3 * seconds["copy"]:.2f}']
    if result['utilisation'] is not None:
        lines.append(f'  utilisation      {result["utilisation"]:.1%} of the peak, estimated')
    if 'clips' in result:
        lines.append(f'  clips a second   {result["clips"] / seconds["all"] / result["devices"]:.3g} a device, estimated')
    sent = ', '.join(f'{kind} {_gib(value)}' for kind, value in result['sent_bytes'].items())
    lines.append(f'  sent by a device {sent or "nothing"}; given to collectives {_gib(result["given_bytes"])}')
    if result['unknown_loops']:
        lines.append(f'  counted once     loops of unknown length: {", ".join(result["unknown_loops"])}')
    lines.append(f'  compiled in      {result["compile_seconds"]:.0f} s, traced in {result["trace_seconds"]:.0f} s')
    lines.append('  costliest        ms       operation')
    for row in result['costliest']:
        milliseconds = f'{1e3 * row["seconds"]:.2f}'
        lines.append(f'                   {milliseconds:8} {row["name"]}  {row["shape"][:60]}  {row["source"][-70:]}')
    return '\n'.join(lines)


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 / 10 else f'{size / 2**20:.2f} MiB'


def _model(config, sequence: Sequence) -> mmaudio.MMAudio:
    """The network as accelerators run it."""
    fields = dict(config.model)
    fields['convolution'] = 'xla' if fields['convolution'] == 'auto' else fields['convolution']
    return mmaudio.build(fields, sequence)


def train(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """The train step."""
    mesh = partitioning.make_mesh(config.mesh, config.sharding.slice_axis, devices)
    sequence = Sequence(**config.sequence)
    model = _model(config, sequence)
    prepared = train_step.prepare(config, model, sequence, mesh)
    schema, size = records.schema_of(config), config.input.batch_size
    dtype = records.FEATURE_DTYPES[schema.feature_dtype]
    batch: dict[str, Any] = {name: jax.ShapeDtypeStruct((size, *shape), dtype) for name, shape in schema.shapes.items()}
    batch.update({name: jax.ShapeDtypeStruct((size,), np.bool_) for name in records.FLAGS})
    work = {'what': f'a step of {size} clips over {len(devices)} devices, {model.dtype.name}', 'devices': len(devices),
            'model_flops': size * flops.training(model, sequence)}
    return prepared.step.lower(prepared.state, batch), list(mesh.devices.flat), work


def sample(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """The sampler, from features to waveforms."""
    mesh = partitioning.make_mesh(config.mesh, config.sharding.slice_axis, devices)
    if config.compile.clips_per_device < 1:
        raise ValueError(f'config.compile.clips_per_device is {config.compile.clips_per_device}; it must be at least 1')
    size = config.compile.clips_per_device * partitioning.batch_shards(mesh)
    sequence = Sequence(**config.sequence)
    model = _model(config, sequence)
    settings = sampler.SamplerSettings.of(config.sampling)
    if settings.solver == 'dopri5':
        raise ValueError("config.sampling.solver is 'dopri5', which chooses the number of its steps as it goes: its time "
                         'cannot be estimated; choose another, or leave sampler out of config.compile.programs')
    decoder, vocoder = vae.build(sequence.rate), bigvgan.build(sequence.rate)
    decode = functools.partial(official_codec.waveforms, decoder, vocoder, official_codec.ACCELERATOR_FRAMES_A_CALL)
    run = jax.jit(sampler.make_sampler(partitioning.on_mesh(model, mesh, config), settings, mesh, decode))
    shape = lambda *sizes: jax.ShapeDtypeStruct((size, *sizes), jnp.float32)
    inputs = (shape(sequence.latent_length, sequence.latent_channels), shape(sequence.clip_length, model.clip_width),
              shape(sequence.sync_length, model.sync_width), shape(model.text_length, model.text_width),
              shape(model.text_length, model.text_width))
    one = lambda array: jax.ShapeDtypeStruct((1, *array.shape[1:]), array.dtype)
    init = lambda module, *arrays: jax.eval_shape(module.init, jax.random.key(0), *arrays)['params']
    params = init(model, one(inputs[0]), jax.ShapeDtypeStruct((1,), jnp.float32), *map(one, inputs[1:4]))
    mel = jax.ShapeDtypeStruct((1, 16, sequence.audio.mel_bins), jnp.float32)
    codec = {'vae': init(decoder, mel), 'vocoder': init(vocoder, mel)}
    whole = jax.tree.map(lambda _: partitioning.replicated(mesh), codec)
    split = partitioning.state_shardings(mesh, params, config)
    evaluations = settings.num_steps * sampler.EVALUATIONS[settings.solver]
    versions = 2 if settings.guidance > 1 else 1
    work = {'what': f'{size} clips of {sequence.duration_s:g} s over {len(devices)} devices, {settings.solver} '
                    f'{settings.num_steps}, guidance {settings.guidance:g}; operations and utilisation of the flow alone',
            'devices': len(devices), 'clips': size, 'model_flops':
            size * versions * (flops.conditions(model, sequence) + evaluations * flops.velocity(model, sequence))}
    batch = partitioning.batch_sharding(mesh)
    inputs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=batch), inputs)
    lowered = run.lower(partitioning.abstract(params, split), *inputs, partitioning.abstract(codec, whole))
    return lowered, list(mesh.devices.flat), work


def frames(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """CLIP's image tower."""
    dtype, count = _feature_dtype(config), official_encoder.ACCELERATOR_CALLS.frames
    size = clip.VARIANTS[official_encoder.CLIP_VARIANT]['image_size']
    return _tower(official_encoder.image_features, clip.build(official_encoder.CLIP_VARIANT, dtype), 'encode_image',
                  jax.ShapeDtypeStruct((count, size, size, 3), jnp.uint8), dtype, devices, f'CLIP features of {count} frames')


def segments(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """Synchformer's visual encoder."""
    dtype, count = _feature_dtype(config), official_encoder.ACCELERATOR_CALLS.segments
    size = synchformer.VARIANTS[official_encoder.SYNC_VARIANT]['image_size']
    return _tower(official_encoder.sync_features, synchformer.build(official_encoder.SYNC_VARIANT, dtype), None,
                  jax.ShapeDtypeStruct((count, SYNC_SEGMENT_FRAMES, size, size, 3), jnp.uint8), dtype, devices,
                  f'Synchformer features of {count} segments')


def texts(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """CLIP's text tower."""
    dtype, count = _feature_dtype(config), official_encoder.ACCELERATOR_CALLS.texts
    return _tower(official_encoder.text_features, clip.build(official_encoder.CLIP_VARIANT, dtype), 'encode_text',
                  jax.ShapeDtypeStruct((count, TEXT_LENGTH), jnp.int32), dtype, devices, f'CLIP features of {count} texts')


def latents(config, devices: list[Any]) -> tuple[Any, list[Any], dict]:
    """The codec's encoder, always float32."""
    sequence = Sequence(**config.sequence)
    model = vae.build(sequence.rate)
    count = max(1, min(config.extract.batch_size, official_codec.ACCELERATOR_FRAMES_A_CALL // sequence.mel_length))

    @jax.jit
    def encode(params, waveforms):
        return official_codec.latent_distribution(model, params, sequence.rate, waveforms)

    return _tower(encode, model, 'encode', jax.ShapeDtypeStruct((count, sequence.waveform_length), jnp.float32),
                  jnp.dtype(jnp.float32), devices, f'latents of {count} waveforms of {sequence.duration_s:g} s',
                  jax.ShapeDtypeStruct((1, sequence.mel_length, sequence.audio.mel_bins), jnp.float32))


def _feature_dtype(config) -> Any:
    """In which the extraction's condition encoders compute."""
    if config.weights.dtype not in store.DTYPES:
        raise ValueError(f'config.weights.dtype is {config.weights.dtype!r}; it must be one of {", ".join(store.DTYPES)}')
    return store.DTYPES[config.weights.dtype]


def _tower(function: Any, module: Any, method: str | None, items: jax.ShapeDtypeStruct, dtype: Any, devices: list[Any],
           what: str, example: jax.ShapeDtypeStruct | None = None) -> tuple[Any, list[Any], dict]:
    """An encoder's jitted function on one device, with parameters of the dtype.

    `example` is what the module itself takes: without it bytes in the dtype, and any other items as they are.
    """
    one = jax.sharding.SingleDeviceSharding(devices[0])
    if example is None:
        example = jax.ShapeDtypeStruct((1, *items.shape[1:]), dtype if items.dtype == jnp.uint8 else items.dtype)
    params = jax.eval_shape(functools.partial(module.init, method=method), jax.random.key(0), example)['params']
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=one), params)
    items = jax.ShapeDtypeStruct(items.shape, items.dtype, sharding=one)
    products = flops.traced(jax.make_jaxpr(function)(params, items).jaxpr)
    work = {'what': f'{what}, {dtype.name}', 'devices': 1, 'model_flops': products}
    return function.lower(params, items), devices[:1], work


PROGRAMS = {'train': train, 'sampler': sample, 'frames': frames, 'segments': segments, 'texts': texts, 'latents': latents}
