"""MLPs in place of the ConvMLPs.

    python run.py --config=configs/ablations/mlp.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
73.84, 13.01, 28.99, 0.533; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'mlp')
    c.model.mlp = 'linear'
    return c
