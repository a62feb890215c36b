"""Rotary angles count positions of each stream, not time.

    python run.py --config=configs/ablations/unaligned_rope.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
70.25, 14.54, 29.25, 0.496; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'unaligned_rope')
    c.model.rope = 'unaligned'
    return c
