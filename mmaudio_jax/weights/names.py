"""What importers share: the shapes of our parameters, and the strict comparison of tensor names and shapes."""
from collections.abc import Mapping
from typing import Any

from flax import traverse_util
import jax

Shape = tuple[int, ...]


def parameter_shapes(model: Any, *inputs: jax.ShapeDtypeStruct) -> dict[tuple[str, ...], Shape]:
    """Path → shape of every parameter of `model`, a Flax module that can be initialised with such inputs."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)['params']
    return {path: leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}


def check(expected: Mapping[str, Shape], found: Mapping[str, Shape], message: str) -> None:
    """Passes when both hold the same names with the same shapes.

    Raises:
      ValueError: `message`, then a line for every missing, unexpected and misshapen tensor.
    """
    problems = [f'  missing: {name} {expected[name]}' for name in sorted(expected.keys() - found.keys())]
    problems += [f'  unexpected: {name} {found[name]}' for name in sorted(found.keys() - expected.keys())]
    problems += [
        f'  wrong shape: {name} is {found[name]}, must be {expected[name]}' for name in sorted(expected.keys() & found.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise ValueError('\n'.join([f'{message} ({len(problems)} tensors):', *problems]))
