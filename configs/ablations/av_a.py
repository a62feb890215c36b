"""Training data: video and sounds, no captions (AV + A).

    python run.py --config=configs/ablations/av_a.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
77.38, 12.53, 27.98, 0.562; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'av_a')
    c.input.without_text = (c.input.statistics, *ablations.audio_text_sets(c))
    return c
