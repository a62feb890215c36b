"""MMAudio L-44k v2, 1 030.58 M parameters: other activations and time embedding, CLIP and sync dropped independently.

    python run.py --config=configs/l_44k_v2.py --workdir=DIR

Features first: --mode=extract (docs/data.md) for every set of config.input.mixture, with the official encoders.
Mesh and microbatches as in l_44k.py.
Cost: as l_44k. Not run by us.
Expected (the paper, VGGSound test): not published for this version; l_44k has FD PaSST 60.60, IS 17.40, IB 33.22, DeSync 0.442.
"""
from configs import l_44k


def get_config():
    """The run."""
    c = l_44k.get_config()
    c.name = 'l_44k_v2'
    c.model.variant = 'large_44k_v2'
    c.flow.independent_video_dropout = True
    return c
