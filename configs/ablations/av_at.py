"""Training data: video without captions, and sounds with captions (AV + AT).

    python run.py --config=configs/ablations/av_at.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
72.77, 12.88, 28.10, 0.502; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'av_at')
    c.input.without_text = (c.input.statistics, )
    return c
