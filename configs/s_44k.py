"""MMAudio S-44k, 157.41 M parameters.

    python run.py --config=configs/s_44k.py --workdir=DIR

Set config.extract.datasets to your clip tables and add --mode=extract for the features first; the official encoders are needed.
Cost: 300 000 steps of 512 clips; its authors advise two 80 GB H100s. Not run by us.
Expected (the paper, VGGSound test): FD PaSST 65.25, FD PANNs 5.55, IS 18.02, IB 32.27, DeSync 0.444.
"""
from configs import s_16k


def get_config():
    """The run."""
    c = s_16k.get_config()
    c.name = 's_44k'
    c.sequence.rate = '44k'
    c.model.variant = 'small_44k'
    return c
