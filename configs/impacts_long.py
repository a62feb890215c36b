"""impacts trained for longer; a run of the table of configs/ablations/table.py.

    python run.py --config=configs/impacts_long.py --workdir=DIR

Cost: about 10 minutes on two CPU cores, data included. Expected: onset F1 at least 0.95 within 0.1 s.
"""
from configs import impacts


def get_config():
    """The run."""
    c = impacts.get_config()
    c.name = 'impacts_long'
    c.optimizer.polynomial_steps = c.train.total_steps = 2800
    c.train.update(validate_every=700, sample_every=1400, checkpoint_every=700)
    return c
