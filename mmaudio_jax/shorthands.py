"""Short spellings of flags."""
from collections.abc import Sequence
import re

_COMPARE = '--config.score.compare='
_FIELDS = {'--topology=': '--config.compile.topology=', '--executor=': '--config.extract.executor='}


def expand(argv: Sequence[str]) -> list[str]:
    """The arguments with --topology=X, --executor=X, --profile=N-M, --compat and --compare a=DIR b=DIR … as their fields.

    --config comes first in the result, because its fields can only be set after it; the others keep their order.

    Raises:
      ValueError: --compare without a system, or --profile without two steps.
    """
    result: list[str] = []
    for argument in argv:
        if result and result[-1].startswith(_COMPARE) and not argument.startswith('-'):
            result[-1] += f' {argument}'
        elif result and result[-1] == '--config':
            result[-1] += f'={argument}'
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
    return result[:1] + sorted(result[1:], key=lambda argument: not argument.startswith('--config='))
