"""Short spellings of flags."""
from collections.abc import Sequence
import re

_COMPARE = '--config.score.compare='
_SWITCHES = ('--compat', '--traceback', '--notraceback')  # flags that take no value
_FIELDS = {'--topology=': '--config.compile.topology=', '--executor=': '--config.extract.executor='}


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with --topology=X, --executor=X, --profile=N-M, --compat and --compare a=DIR b=DIR … as their fields.

    A flag with a value is --name=value in the result, however it was spelled. --config comes first, because its fields can only
    be set after it; the others keep their order. Of flags of one field only the last stays, as it is the last that counts:
    tuples would be joined to one otherwise.

    Raises:
      ValueError: --compare without a system, or --profile without two steps.
    """
    result: list[str] = []
    for argument in _joined(argv):
        if result and result[-1].startswith(_COMPARE) and not argument.startswith('-'):
            result[-1] += f' {argument}'
        elif argument == '--compare' or argument.startswith('--compare='):
            result.append(_COMPARE + argument.partition('=')[2])
        elif argument == '--profile' or argument.startswith('--profile='):
            steps = re.fullmatch(r'--profile=(\d+)-(\d+)', argument)
            if not steps:
                raise ValueError('--profile needs the first and the last step, as in --profile=100-110')
            result.append(f'--config.train.profile_steps=({steps[1]}, {steps[2]})')
        elif argument == '--compat':
            result.append('--config.score.compat=True')
        else:
            flag, is_field, value = argument.partition('=')
            result.append(_FIELDS.get(flag + is_field, flag + is_field) + value)
    if _COMPARE in result:
        raise ValueError('--compare needs name=FOLDER for every system, as in --compare ours=A theirs=B')
    last = {_field(argument): place for place, argument in enumerate(result)}
    result = [argument for place, argument in enumerate(result) if not _field(argument) or last[_field(argument)] == place]
    return result[:1] + sorted(result[1:], key=lambda argument: not argument.startswith('--config='))


def _field(argument: str) -> str:
    """'--config.FIELD' of a flag that sets a field, '' of any other argument."""
    return argument.partition('=')[0] if argument.startswith('--config.') else ''


def _joined(argv: Sequence[str]) -> list[str]:
    """The arguments with `--name value`, `-name value` and `-name=value` as `--name=value`."""
    result: list[str] = []
    for argument in argv:
        argument = re.sub('^-(?=[A-Za-z])', '--', argument)
        waits = result and re.fullmatch('--[A-Za-z][^=]*', result[-1]) and result[-1] not in _SWITCHES
        if waits and not argument.startswith('--'):
            result[-1] += f'={argument}'
        else:
            result.append(argument)
    return result
