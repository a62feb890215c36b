"""MMAudio S-16k, 157.28 M parameters: the defaults of base.py, without a loop over the layers.

    python run.py --config=configs/s_16k.py --workdir=DIR

Features first: --mode=extract (docs/data.md) for every set of config.input.mixture, with the official encoders.
On TPU slices of 8 chips and more set --config.mesh.fsdp=8, with 8 clips a chip also --config.train.async_gradients=True
(docs/scaling.md).
Cost: 300 000 steps of 512 clips; its authors advise two 80 GB H100s. Not run by us.
Expected (the paper, VGGSound test): FD PaSST 70.19, FD PANNs 5.22, IS 14.44, IB 29.13, DeSync 0.483.
"""
from configs import base


def get_config():
    """The run."""
    c = base.get_config()
    c.model.scan_layers = False
    # More scoped vector memory of a TPU, for attention: a shorter step, a longer compilation (docs/scaling.md).
    c.train.compiler_options += (('xla_tpu_scoped_vmem_limit_kib', '32768'),)
    return c
