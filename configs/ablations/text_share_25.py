"""A quarter of the audio-text data.

    python run.py --config=configs/ablations/text_share_25.py --workdir=DIR

Cost: that of the base; append :impacts for another base than s_16k. Expected on s_16k (the paper): FD PaSST, IS, IB, DeSync
71.67, 14.41, 28.75, 0.505; the default has 70.19, 14.44, 29.13, 0.483.
"""
from configs import ablations


def get_config(base: str = 's_16k'):
    """The run."""
    c = ablations.start(base, 'text_share_25')
    c.input.shares = tuple((name, 0.25) for name in ablations.audio_text_sets(c))
    return c
