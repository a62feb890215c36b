"""MMAudio L-44k, 1 030.00 M parameters.

    python run.py --config=configs/l_44k.py --workdir=DIR

Features first: --mode=extract (docs/data.md) for every set of config.input.mixture, with the official encoders.
The mesh is for TPU slices of 16 chips and more. On fewer devices set --config.mesh.fsdp to their number, and
--config.train.microbatches so that each has at most 16 clips at once for every 16 GiB of its memory. With 8 clips a device,
--config.train.async_gradients=True makes steps shorter and their compilation longer; with 2, on v5e,
--config.model.convolution=xla_taps and --config.mesh.fsdp=32 do, without it (docs/scaling.md).
Cost: 300 000 steps of 512 clips; its authors advise eight 80 GB H100s. Not run by us.
Expected (the paper, VGGSound test): FD PaSST 60.60, FD PANNs 4.72, IS 17.40, IB 33.22, DeSync 0.442.
"""
from configs import base


def get_config():
    """The run."""
    c = base.get_config()
    c.name = 'l_44k'
    c.sequence.rate = '44k'
    c.mesh.fsdp = 16
    c.model.scan_layers = False
    c.model.variant = 'large_44k'
    c.input.mixture = (('vggsound', 3), *c.input.mixture[1:])
    return c
