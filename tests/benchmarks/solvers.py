"""How near few steps come to the exact solution of the flow: error against evaluations of the velocity, solver by solver.

    python -m tests.benchmarks.solvers --workdir=runs/impacts [--clips=8] [--evaluations=4,8,16,32,64]

The network is the trained one of the workdir, under its config's guidance, on clips of its evaluation split. The error is the
root mean square difference of the latents to those of 200 midpoint steps (400 evaluations) of the same noise, over the
deviation of the latents; a guided evaluation counts as one. Prints Markdown, and one line of JSON at the end.
"""
import argparse
import itertools
import json
import pathlib
from typing import Any

import jax
import ml_collections
import numpy as np

from mmaudio_jax import input_pipeline
from mmaudio_jax import record_sampler
from mmaudio_jax import sampler
from mmaudio_jax import snapshots
from mmaudio_jax.models import mmaudio
from mmaudio_jax.sequence import Sequence

REFERENCE_STEPS = 200


def inputs_of(workdir: pathlib.Path, clips: int) -> tuple[Any, Any, list[Any], float]:
    """The network, its parameters, the arguments of a sampler after them, and the guidance."""
    params, saved = snapshots.load_params(workdir)
    config = ml_collections.ConfigDict(saved)
    sequence = Sequence(config.sequence.rate, config.sequence.duration_s)
    model = mmaudio.build(config.model, sequence)
    records = pathlib.Path(config.data_dir or workdir) / 'records'
    split = input_pipeline.read_split(config, records, config.evaluate.dataset, config.evaluate.split)
    examples = list(itertools.islice(split, clips))
    fields = ('clip_features', 'sync_features', 'text_features', 'video_exists', 'text_exists')
    batch = {name: np.stack([np.asarray(example[name]) for example in examples]) for name in fields}
    noise = sampler.noise(config.sampling.seed, range(len(examples)), sequence.latent_length, sequence.latent_channels)
    return model, params, [noise, *record_sampler.with_empty_features(model, params, batch), None], config.sampling.guidance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--workdir', type=pathlib.Path, required=True)
    parser.add_argument('--clips', type=int, default=8)
    parser.add_argument('--evaluations', default='4,8,16,32,64')
    options = parser.parse_args()
    budgets = [int(word) for word in options.evaluations.split(',')]
    model, params, arguments, guidance = inputs_of(options.workdir, options.clips)
    params = jax.device_put(params)

    def solve(solver: str, schedule: str, steps: int) -> np.ndarray:
        settings = sampler.SamplerSettings(solver, steps, guidance, schedule)
        return np.asarray(sampler.make_sampler(model, settings)(params, *arguments))

    exact = solve('midpoint', 'uniform', REFERENCE_STEPS)
    print(f'| solver | schedule | {" | ".join(map(str, budgets))} |\n|---|---|{"---|" * len(budgets)}', flush=True)
    errors: dict[str, dict[int, float]] = {}
    for solver, schedule in itertools.product(sampler.EVALUATIONS, sampler.SCHEDULES):
        row = errors.setdefault(f'{solver} {schedule}', {})
        for budget in budgets:
            result = solve(solver, schedule, budget // sampler.EVALUATIONS[solver])
            row[budget] = float(np.sqrt(np.mean(np.square(result - exact))) / exact.std())
        print(f'| {solver} | {schedule} | {" | ".join(f"{error:.4f}" for error in row.values())} |', flush=True)
    print(json.dumps({'clips': options.clips, 'guidance': guidance, 'errors': errors}))


if __name__ == '__main__':
    main()
