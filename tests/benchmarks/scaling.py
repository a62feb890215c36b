"""The tables of docs/scaling.md: what the TPU compiler says of the train step and the sampler on slices of every kind.

    python -m tests.benchmarks.scaling [--rows='L v5e-64,S v6e-8'] [--samplers='L v5e'] [--encoders='frames v5e']
        [--growth='S v5e-8'] [--only_write]

A row takes minutes of a core. Finished rows are in scaling.json beside this file, and are not compiled again unless `choose`
says otherwise by now; delete those whose program has changed. Without flags the missing ones follow in the order below. The
tables are written after every row.
"""
import argparse
from collections.abc import Callable
import importlib
import json
import math
import pathlib
from typing import Any

import jax

from mmaudio_jax import chips
from mmaudio_jax import compile_report
from mmaudio_jax import flops
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

RESULTS = pathlib.Path(__file__).with_suffix('.json')
PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'scaling.md'
MODELS = {'L': 'l_44k', 'M': 'm_44k', 'S': 's_16k'}
# Google's names: v4 and v5p count cores, two a chip.
SLICES = {'v5e-64': 'v5e:8x8', 'v5p-128': 'v5p:4x4x4', 'v5e-8': 'v5e:2x4', 'v6e-8': 'v6e:2x4', 'v5e-256': 'v5e:16x16',
          'v6e-256': 'v6e:16x16', 'v5p-8': 'v5p:2x2x1', 'v4-32': 'v4:2x2x4'}
BATCH, STEPS = 512, 300_000
H100S = (2, 8, 64)
H100_UTILISATION = 0.4  # assumed
FSDP = {'L': 16, 'M': 16, 'S': 8}  # chips over which the state is split, where there are so many
FEW_CLIPS = {'fsdp': 32, 'convolution': 'xla_taps'}  # 2 a chip: L and M gain by both
AT_ONCE = {'L': 16, 'M': 32, 'S': 64}  # clips at once for every 16 GiB of a chip's memory
LOOP = {'scan_layers': True, 'remat': 'dots'}  # where the compiler needs more time or memory for a program without one
ONE_PART = {'microbatches': 1, 'remat': 'none', 'scan_layers': False, 'async_gradients': False, 'convolution': 'xla'}
DATA_PARALLEL = {'data': -1, 'fsdp': 1, **ONE_PART}
ASYNC = {'async_gradients': True}
BETTER = {('L', 'v5e-64'): ASYNC, ('M', 'v5e-64'): ASYNC, ('S', 'v5e-64'): ASYNC,
          ('L', 'v5p-128'): ASYNC, ('M', 'v5p-128'): ASYNC, ('S', 'v5p-128'): ASYNC,
          ('L', 'v5e-256'): FEW_CLIPS, ('M', 'v5e-256'): FEW_CLIPS,
          ('L', 'v6e-8'): LOOP, ('M', 'v6e-8'): LOOP, ('L', 'v4-32'): LOOP}
ENCODERS = ('frames', 'segments')  # of compile_report.PROGRAMS
GROWTH = [('S', name) for name in ('v5e-8', 'v5e-64', 'v5e-256')]  # L and M do not fit on a chip
PRIMARY = [(model, name) for name in SLICES for model in MODELS]


def choose(model: str, name: str) -> dict[str, Any]:
    """Mesh, microbatches and remat policy: as few microbatches as the memory allows, nothing recomputed."""
    devices = len(chips.devices_of(SLICES[name]))
    clips = BATCH // devices
    at_once = AT_ONCE[model] * round(chips.CHIPS[name.split('-')[0]].memory_bytes / 2**34)
    microbatches = 2**max(0, math.ceil(math.log2(clips / at_once)))
    return {'data': -1, 'fsdp': min(FSDP[model], devices), **ONE_PART, 'microbatches': microbatches,
            **BETTER.get((model, name), {})}


def configure(model: str, choice: dict[str, Any]) -> Any:
    """The model's config with a choice like that of `choose`."""
    config = importlib.import_module(f'configs.{MODELS[model]}').get_config()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = choice['data'], choice['fsdp'], 1
    config.train.microbatches, config.model.remat = choice['microbatches'], choice['remat']
    config.model.scan_layers = choice['scan_layers']
    config.train.async_gradients, config.model.convolution = choice['async_gradients'], choice['convolution']
    config.input.batch_size = BATCH
    return config


def memory(row: dict[str, Any]) -> str:
    """'7.6 of 16 GiB': the peak of a chip, and what it has."""
    return f'{row["bytes"]["peak"] / 2**30:.1f} of {row["bytes"]["memory"] / 2**30:.0f} GiB'


def smallest(kind: str) -> str:
    """The topology of the smallest slice of these chips."""
    return next(shape for name, shape in reversed(SLICES.items()) if name.startswith(kind) and '16' not in shape)


def measure(program: Callable, config: Any, topology: str) -> dict[str, Any]:
    """What is kept of the report on a program."""
    config.compile.topology = topology
    result = compile_report.measure(program, config, chips.devices_of(topology))
    result.pop('costliest', None)
    return result


def measure_row(model: str, name: str) -> dict[str, Any]:
    """The train step as `choose` has it."""
    choice = choose(model, name)
    return {**choice, **measure(compile_report.train, configure(model, choice), SLICES[name])}


def measure_sampler(model: str, kind: str) -> dict[str, Any]:
    """Clips a second on the smallest slice: nothing is exchanged, so that a chip of any slice does as many."""
    config = configure(model, DATA_PARALLEL)
    return measure(compile_report.sample, config, smallest(kind))


def measure_encoder(program: str, kind: str) -> dict[str, Any]:
    """One call of an image encoder, on one chip."""
    config = configure('L', DATA_PARALLEL)
    config.weights.dtype = 'bfloat16'
    return measure(compile_report.PROGRAMS[program], config, smallest(kind))


def measure_growth(model: str, name: str) -> dict[str, Any]:
    """Data parallel, one clip a chip on every slice: what a chip gives to collectives should not grow."""
    config = configure(model, DATA_PARALLEL)
    config.input.batch_size = len(chips.devices_of(SLICES[name]))
    return measure(compile_report.train, config, SLICES[name])


def largest_batch(results: dict[str, Any], model: str, name: str) -> int | None:
    """Clips at once, over all chips, that leave a tenth of the memory free.

    By the line through what the fewest and the most clips a chip need, on chips of any kind, with the same remat policy and
    loop; None where only one number was compiled.
    """
    row = results[f'{model} {name}']
    points = sorted((other['at_once'], other['bytes']['temporaries']) for key, other in results.items()
                    if key.split()[0] == model and other['fits'] and all(other[field] == row[field] for field in LOOP))
    if points[0][0] == points[-1][0]:
        return None
    (small, less), (large, more) = points[0], points[-1]
    slope = (more - less) / (large - small)
    free = 0.9 * row['bytes']['memory'] - (row['bytes']['peak'] - row['bytes']['temporaries'])
    at_once = row['at_once'] + (free - row['bytes']['temporaries']) / slope
    return int(at_once) * row['devices']


def options(row: dict[str, Any]) -> list[str]:
    """Those of a row that differ from what the configs have."""
    changed = [name for name in ('async_gradients', 'scan_layers') if row[name]]
    return changed + [row[name] for name in ('convolution', 'remat') if row[name] != ONE_PART[name]]


def train_table(results: dict[str, Any]) -> str:
    """One line a network and slice."""
    lines = ['| network | slice | chips | data × fsdp | microbatches | options | memory | largest batch at once '
             '| step ms | of it collectives | utilisation | days for 300 000 steps |', '|' + '---|' * 12]
    for model in MODELS:
        for name in SLICES:
            row = results.get(f'{model} {name}')
            if row is None:
                continue
            if not row['fits']:
                lines.append(f'| {model} | {name} | {row["devices"]} | | {row["microbatches"]} | | does not fit '
                             '| | | | | |')
                continue
            seconds, largest = row['seconds'], largest_batch(results, model, name)
            lines.append(f'| {model} | {name} | {row["devices"]} | {row["devices"] // row["fsdp"]} × {row["fsdp"]} '
                         f'| {row["microbatches"]} | {", ".join(options(row))} | {memory(row)} '
                         f'| {largest or ""} | {1e3 * seconds["all"]:.0f} | {1e3 * seconds["collective"]:.0f} '
                         f'| {row["utilisation"]:.0%} | {STEPS * seconds["all"] / 86_400:.2g} |')
    return '\n'.join(lines)


def sampler_table(results: dict[str, Any]) -> str:
    """One line a network and chip."""
    lines = ['| network | chip | clips at once a chip | memory | clips a second a chip | utilisation by the flow |',
             '|' + '---|' * 6]
    for key, row in sorted(results.items()):
        if not key.startswith('sampler '):
            continue
        _, model, kind = key.split()
        if not row['fits']:
            lines.append(f'| {model} | {kind} | {row["clips"] // row["devices"]} | does not fit | | |')
            continue
        lines.append(f'| {model} | {kind} | {row["clips"] // row["devices"]} | {memory(row)} '
                     f'| {row["clips"] / row["devices"] / row["seconds"]["all"]:.2f} '
                     f'| {row["utilisation"]:.0%} |')
    return '\n'.join(lines)


def encoder_table(results: dict[str, Any]) -> str:
    """One line an encoder and chip."""
    lines = ['| in one call | chip | memory | ms | utilisation |', '|' + '---|' * 5]
    for program in ENCODERS:
        for key in sorted(key for key in results if key.startswith(f'encoder {program} ')):
            row = results[key]
            lines.append(f'| {row["what"]} | {key.split()[-1]} | {memory(row)} '
                         f'| {1e3 * row["seconds"]["all"]:.1f} | {row["utilisation"]:.0%} |')
    return '\n'.join(lines)


def growth_table(results: dict[str, Any]) -> str:
    """One line a slice."""
    lines = ['| slice | chips | given to collectives a chip | sent by a chip, as a ring does it |', '|' + '---|' * 4]
    for model, name in GROWTH:
        row = results.get(f'growth {model} {name}')
        if row is not None:
            sent = sum(row['sent_bytes'].values())
            lines.append(f'| {name} | {row["devices"]} | {row["given_bytes"] / 2**20:.3f} MiB | {sent / 2**20:.3f} MiB |')
    return '\n'.join(lines)


def h100_table() -> str:
    """On paper: operations over the peak."""
    lines = ['| network | H100s | step ms | days for 300 000 steps |', '|' + '---|' * 4]
    for model, name in MODELS.items():
        config = importlib.import_module(f'configs.{name}').get_config()
        sequence = Sequence(**config.sequence)
        work = BATCH * flops.training(mmaudio.build(config.model, sequence), sequence)
        for count in H100S:
            seconds = work / (count * flops.peak('NVIDIA H100') * H100_UTILISATION)
            lines.append(f'| {model} | {count} | {1e3 * seconds:.0f} | {STEPS * seconds / 86_400:.1f} |')
    return '\n'.join(lines)


def write_page(results: dict[str, Any]) -> None:
    """Puts the tables between the page's marks."""
    text = PAGE.read_text()
    for name, table in (('train', train_table(results)), ('sampler', sampler_table(results)),
                        ('encoder', encoder_table(results)), ('growth', growth_table(results)), ('h100', h100_table())):
        start, end = f'<!-- {name} -->\n', f'<!-- end of {name} -->'
        before, rest = text.split(start)
        text = before + start + table + '\n' + end + rest.split(end)[1]
    PAGE.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rows', help='e.g. "L v5e-64,S v6e-8"; without it all')
    parser.add_argument('--samplers', help='e.g. "L v5e"; without it all')
    parser.add_argument('--encoders', help='e.g. "frames v5e"; without it all')
    parser.add_argument('--growth', help='e.g. "S v5e-8"; without it all')
    parser.add_argument('--only_write', action='store_true', help='compile nothing')
    flags = parser.parse_args()
    jax.config.update('jax_platforms', 'cpu')
    finished = lambda: json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    chosen = lambda text, every: every if text is None else [tuple(row.split()) for row in text.split(',') if row]
    kinds = [(model, kind) for kind in chips.CHIPS for model in MODELS]
    work = [(f'{model} {name}', measure_row, model, name) for model, name in chosen(flags.rows, PRIMARY)]
    work += [(f'sampler {model} {kind}', measure_sampler, model, kind) for model, kind in chosen(flags.samplers, kinds)]
    encoders = chosen(flags.encoders, [(program, kind) for kind in chips.CHIPS for program in ENCODERS])
    work += [(f'encoder {program} {kind}', measure_encoder, program, kind) for program, kind in encoders]
    work += [(f'growth {model} {name}', measure_growth, model, name) for model, name in chosen(flags.growth, GROWTH)]
    for key, function, model, place in [] if flags.only_write else work:
        row = finished().get(key)
        if row is not None and (function is not measure_row or choose(model, place).items() <= row.items()):
            continue
        row = function(model, place)
        if function is measure_row:
            row['at_once'] = BATCH // row['devices'] // row['microbatches']
        results = {**finished(), key: row}  # another process may have written meanwhile
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + '\n')
        shown = {name: row.get(name) for name in ('fits', 'utilisation', 'seconds', 'compile_seconds')}
        print(key, json.dumps(shown), flush=True)
        write_page(results)
    write_page(finished())


if __name__ == '__main__':
    main()
