"""python run.py --config=configs/impacts.py --workdir=DIR [--mode=MODE] [--config.FIELD=VALUE ...].
Without --mode the stages of config.stages run in order, each skipped when its result is there."""
from collections.abc import Callable
import io
import pathlib
import re
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from mmaudio_jax import config_checks
from mmaudio_jax import distributed
from mmaudio_jax import shorthands

ALONE = {'import', 'export', 'compile'}  # need no other process, and no device of a pod
MODES = ('impacts', 'extract', 'train', 'evaluate', 'generate', 'ablations', 'import', 'export', 'compile')

_CONFIG = config_flags.DEFINE_config_file('config', None, 'A file of configs/, e.g. configs/impacts.py.', lock_config=True)
_WORKDIR = flags.DEFINE_string('workdir', None, 'Folder of everything that the run makes; --mode=compile needs none.')
_MODE = flags.DEFINE_enum('mode', None, MODES, 'One stage; without it, those of config.stages.')
flags.mark_flag_as_required('config')
flags.register_multi_flags_validator(['workdir', 'mode'], lambda f: f['workdir'] or f['mode'] == 'compile', 'needs --workdir')
_TRACEBACK = flags.DEFINE_bool('traceback', False, 'Show where an error came from.')


def run_mode(mode: str, config, workdir: pathlib.Path | None) -> int:
    """Runs one stage and returns its exit code. Imports are here: a stage loads only what it needs."""
    stage: Callable[..., int | None]
    if mode == 'impacts':
        from data_pipelines.impacts import render as stage
    elif mode == 'extract':
        from data_pipelines.extract import extract as stage
    elif mode == 'train':
        from mmaudio_jax.train import train as stage
    elif mode == 'evaluate':
        from mmaudio_jax.evaluate import evaluate as stage
    elif mode == 'generate':
        from mmaudio_jax.generate import generate as stage
    elif mode == 'ablations':
        from mmaudio_jax.ablations import run as stage
    elif mode == 'import':
        from mmaudio_jax.exchange import import_weights as stage
    elif mode == 'export':
        from mmaudio_jax.exchange import export_weights as stage
    elif mode == 'compile':
        from mmaudio_jax.compile_report import report as stage
    else:
        raise ValueError(f'{mode!r} is not one of {", ".join(MODES)}')
    return stage(config, workdir) or 0


def _folder(field: str, text: str) -> pathlib.Path:
    """The folder of a field; ~ is the user's own."""
    if '://' in text:
        raise ValueError(f'{field} is {text!r}, an address; a folder is needed that every host sees, such as a mounted bucket')
    return pathlib.Path(text).expanduser()


def main(argv: list[str]) -> None:
    """Dispatches; every error of the user's is one line on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors='backslashreplace')  # as stderr has it: a file's name need not be text
    try:
        if len(argv) > 1:
            raise ValueError(f'unexpected argument {argv[1]!r}; flags look like --mode=train')
        workdir = _folder('--workdir', _WORKDIR.value) if _WORKDIR.value else None  # --mode=compile then only prints
        if _CONFIG.value.data_dir:
            _CONFIG.value.data_dir = str(_folder('config.data_dir', _CONFIG.value.data_dir))
        pathlib.Path(workdir or '.').mkdir(parents=True, exist_ok=True)
        config_checks.check(_CONFIG.value)
        modes = [_MODE.value] if _MODE.value else config_checks.checked_stages(_CONFIG.value.stages, MODES)
        alone = 'ablations' in modes or ALONE.issuperset(modes)  # the runs of ablations join for themselves
        with distributed.joined(_CONFIG.value.hosts, alone):
            code = next(filter(None, (run_mode(mode, _CONFIG.value, workdir) for mode in modes)), 0)  # the first failure
        sys.exit(code)
    except (ValueError, OSError) as error:
        if _TRACEBACK.value:
            raise
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        if _TRACEBACK.value:
            raise
        print('stopped', file=sys.stderr)
        sys.exit(130)  # as shells have it


def parse_flags(argv: list[str]) -> list[str]:
    """Parses `argv`; an unknown flag, field, mode or config file ends the program with one line."""
    try:
        argv = sys.argv = shorthands.expand(argv)
        for path in [argument.removeprefix('--config=').split(':')[0] for argument in argv if argument.startswith('--config=')]:
            if not pathlib.Path(path).is_file():
                raise ValueError(f'no config file {path!r}; those that exist are in configs/')
        fields = [argument for argument in argv if argument.startswith('--config.')]
        if fields and not any(re.match('--?config(=|$)', argument) for argument in argv):
            raise ValueError('--config is missing: name the file of the run, such as --config=configs/l_44k_v2.py')
        return flags.FLAGS(argv)
    except (flags.Error, LookupError, AttributeError, ValueError, TypeError) as error:
        unknown = 'the configuration has no field ' if isinstance(error, (KeyError, AttributeError)) else ''
        reason: object = error
        while isinstance(reason, (KeyError, AttributeError)) and reason.args:  # whose text has \n for the ends of its lines
            reason = reason.args[0]
        text = '. '.join(filter(None, map(str.strip, str(reason).splitlines())))
        sys.exit(f'error: {unknown}{text}; every field and its meaning: configs/base.py')


if __name__ == '__main__':
    app.run(main, flags_parser=parse_flags)
