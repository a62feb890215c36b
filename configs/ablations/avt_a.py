"""Training data: video with captions, and sounds without (AVT + A).

    python run.py --config=configs/ablations/avt_a.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
71.01, 14.30, 28.72, 0.496; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'avt_a')
    c.input.without_text = ablations.audio_text_sets(c)
    return c
