"""Fewer joint blocks, more fused ones (2 and 13), at about the same number of parameters.

    python run.py --config=configs/ablations/n1_2_n2_13.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
70.33, 15.18, 29.39, 0.487; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'n1_2_n2_13')
    c.model.joint_blocks, c.model.fused_blocks = 2, 13
    return c
