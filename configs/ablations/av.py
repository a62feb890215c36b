"""Training data: video only, no captions and no other sounds (AV).

    python run.py --config=configs/ablations/av.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
77.27, 12.69, 28.10, 0.502; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'av')
    c.input.mixture = tuple(pair for pair in c.input.mixture if pair[0] == c.input.statistics)
    c.input.without_text = (c.input.statistics, )
    return c
