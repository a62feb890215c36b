"""What every stage wants of a configuration: numbers within their range, tuples of the right form. Imports none of them."""
import collections
import math
from typing import Any

# (field, least value, largest value): what would leave nothing after days, divide by zero, or stop somewhere inside.
RANGES: tuple[tuple[str, float, float], ...] = (
    ('seed', 0, 2**32 - 1), ('sampling.seed', 0, 2**32 - 1),
    ('input.batch_size', 1, math.inf), ('input.workers', 0, math.inf), ('input.prefetch', 0, math.inf),
    ('flow.min_sigma', 0, 1), ('flow.video_dropout', 0, 1), ('flow.text_dropout', 0, 1),
    ('optimizer.learning_rate', 0, math.inf), ('optimizer.clip_norm', 1e-12, math.inf),
    ('ema.snapshot_every', 0, math.inf), ('train.total_steps', 1, math.inf), ('train.max_skipped', 0, math.inf),
    ('train.log_every', 0, math.inf), ('train.validate_every', 0, math.inf), ('train.sample_every', 0, math.inf),
    ('train.sample_clips', 0, math.inf), ('train.checkpoint_every', 0, math.inf), ('train.keep_last', 1, math.inf),
    ('train.keep_every', 0, math.inf), ('sampling.batch_size', 1, math.inf), ('evaluate.max_clips', 0, math.inf),
    ('evaluate.save_clips', 0, math.inf), ('extract.batch_size', 1, math.inf), ('extract.clips_per_shard', 1, math.inf),
    ('extract.workers', 1, math.inf), ('extract.max_rejected', 0, 1), ('extract.process_count', 0, math.inf),
    ('extract.ray_actors', 1, math.inf), ('extract.ray_cpus', 0, math.inf), ('score.batch_size', 1, math.inf),
    ('score.workers', 1, math.inf))
# (field, parts of each of its tuples)
ENTRIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ('input.mixture', ('record set', 'repeats')), ('input.shares', ('record set', 'share')),
    ('input.balance', ('record set', 'exponent')), ('ablations.rows', ('name', 'file of configs/')),
    ('clips.datasets', ('record set', 'layout', 'folder')), ('clips.exclude', ('record set', 'file of ids')),
    ('train.compiler_options', ('option', 'value')), ('extract.datasets', ('record set', 'folder of clip tables')),
    ('extract.memmaps', ('record set', 'split', 'folder of memory maps')), ('extract.ray_resources', ('resource', 'amount')))
SERIES = ('optimizer.betas', 'optimizer.schedule_steps', 'ema.sigma_rels', 'evaluate.onset_windows_s', 'train.profile_steps')
# Parts that are numbers, each with an example; the others are strings.
NUMBERS = {'repeats': 5, 'share': 0.5, 'exponent': 0.5, 'amount': 1.0}
DISTINCT = {'clips.datasets': 1, 'extract.datasets': 1, 'extract.memmaps': 2}  # field → first parts that come once


def check(config) -> None:
    """Raises ValueError, naming the field, for a number out of its range, or a field of pairs that holds something else."""
    for field, least, most in RANGES:
        value = _read(config, field)
        if not least <= value <= most:  # so that NaN is refused, too
            wanted = f'at least {least:.10g}' if most == math.inf else f'from {least:.10g} to {most:.10g}'
            raise ValueError(f'config.{field} is {value}; it must be {wanted}')
    for field in SERIES:
        series = _read(config, field)
        if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in series):
            raise ValueError(f'config.{field} is {series}; it must hold numbers')
    if len(config.optimizer.betas) != 2:
        raise ValueError(f'config.optimizer.betas is {config.optimizer.betas}; it must be (first, second)')
    windows_s = config.evaluate.onset_windows_s
    if not windows_s or not all(0 < window_s < math.inf for window_s in windows_s):
        raise ValueError(f'config.evaluate.onset_windows_s is {windows_s}; it must hold numbers of seconds, at least one')
    for field, parts in ENTRIES:
        check_entries(field, _read(config, field), *parts)


def checked_stages(stages: Any, modes: tuple[str, ...]) -> Any:
    """config.stages; raises ValueError for none, and for one that is not of `modes`, which its turn would show days later."""
    wanted = f'it must be a tuple of one or more of {", ".join(modes)}, or set --mode'
    if not stages or not isinstance(stages, (tuple, list)):
        raise ValueError(f'config.stages is {stages!r}; {wanted}')
    unknown = [stage for stage in stages if stage not in modes]
    if unknown:
        raise ValueError(f'config.stages is {stages!r}, but there is no stage {unknown[0]!r}; {wanted}')
    return stages


def check_entries(field: str, value: Any, *parts: str) -> None:
    """Raises ValueError for a field of the config that is no tuple of tuples, each with one value for every one of `parts`, or
    that names twice what it must name once: one of the two would be left out."""
    for entry in value if isinstance(value, (tuple, list)) else [value]:
        if not isinstance(entry, (tuple, list)) or len(entry) != len(parts):
            form = ', '.join(f'"{part}"' for part in parts)
            raise ValueError(f'config.{field} is {value!r}; it must be a tuple of ({", ".join(parts)}) tuples with a comma '
                             f"behind each, also a single one: '(({form}),)'")
        for part, found in zip(parts, entry):
            if part in NUMBERS and not _is_number(found):
                raise ValueError(f'config.{field} is {value!r}; the {part} {found!r} must be a number, not in quotes: '
                                 f"'(({entry[0]!r}, {NUMBERS[part]}),)'")
            if part not in NUMBERS and not isinstance(found, str):
                raise ValueError(f'config.{field} is {value!r}; the {part} {found!r} must be a string, in quotes')
    names = collections.Counter(', '.join(entry[:DISTINCT[field]]) for entry in value) if field in DISTINCT else {}
    for name, count in names.items():
        if count > 1:
            raise ValueError(f'config.{field} names {name!r} {count} times; give every one a name of its own, or put its media '
                             'into one folder')


def _is_number(value: Any) -> bool:
    """Whether it is a finite int or float; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _read(config, field: str) -> Any:
    for name in field.split('.'):
        config = config[name]
    return config
