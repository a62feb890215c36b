"""MMAudio S-44k, 157.41 M parameters.

    python run.py --config=configs/s_44k.py --workdir=DIR

Features first: --mode=extract (docs/data.md) for every set of config.input.mixture, with the official encoders.
On TPU slices of 8 chips and more set --config.mesh.fsdp=8, with 8 clips a chip also --config.train.async_gradients=True
(docs/scaling.md).
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
