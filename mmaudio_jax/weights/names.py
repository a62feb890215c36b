"""The strict comparison of tensor names and shapes that importers share."""
from collections.abc import Mapping

Shape = tuple[int, ...]


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
