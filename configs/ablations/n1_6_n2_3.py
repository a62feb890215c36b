"""More joint blocks, fewer fused ones (6 and 3), at about the same number of parameters.

    python run.py --config=configs/ablations/n1_6_n2_3.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
72.53, 13.75, 29.06, 0.509; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'n1_6_n2_3')
    c.model.joint_blocks, c.model.fused_blocks = 6, 3
    return c
