"""No sync features: the global condition alone modulates.

    python run.py --config=configs/ablations/no_sync.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
69.33, 15.05, 29.31, 0.973; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'no_sync')
    c.model.sync_fusion = 'none'
    return c
