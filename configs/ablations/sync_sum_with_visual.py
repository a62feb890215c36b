"""Sync features summed into the visual stream instead of modulating each latent.

    python run.py --config=configs/ablations/sync_sum_with_visual.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
73.59, 16.70, 28.65, 0.490; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'sync_sum_with_visual')
    c.model.sync_fusion = 'sum_with_visual'
    return c
