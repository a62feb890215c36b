"""One file per published ablation. `--config=configs/ablations/no_rope.py:impacts` applies it to another base than s_16k."""
from collections.abc import Callable

import ml_collections

from configs import impacts
from configs import l_44k
from configs import m_44k
from configs import s_16k
from configs import s_44k

BASES: dict[str, Callable[[], ml_collections.ConfigDict]] = {
    's_16k': s_16k.get_config,
    's_44k': s_44k.get_config,
    'm_44k': m_44k.get_config,
    'l_44k': l_44k.get_config,
    'impacts': impacts.get_config,
}

# Of the runs of a table with the paper's columns: sample the test split and score it.
PAPER_FLAGS = ("--config.stages=('train', 'evaluate')", '--config.score.sample=True',
               "--config.score.metrics=('fd_passt', 'is_panns', 'ib_score', 'desync')")


def start(base: str, name: str) -> ml_collections.ConfigDict:
    """The config of `base`, named after the ablation.

    Raises:
      ValueError: an unknown base.
    """
    if base not in BASES:
        raise ValueError(f'the base {base!r} is not one of {", ".join(BASES)}; write it after the file, '
                         f'as in --config=configs/ablations/{name}.py:impacts')
    c = BASES[base]()
    c.name = f'{c.name}_{name}'
    return c


def audio_text_sets(c: ml_collections.ConfigDict) -> tuple[str, ...]:
    """The record sets of the mixture other than the main video set."""
    return tuple(name for name, _ in c.input.mixture if name != c.input.statistics)
