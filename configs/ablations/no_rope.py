"""No rotary position embeddings.

    python run.py --config=configs/ablations/no_rope.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
70.24, 14.54, 29.23, 0.509; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'no_rope')
    c.model.rope = 'none'
    return c
