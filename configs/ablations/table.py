"""The ablations side by side, three seeds each, on the built-in dataset.

    python run.py --mode=ablations --config=configs/ablations/table.py --workdir=DIR --config.train.sample_every=0

Cost: 18 runs of impacts, about an hour on two CPU cores; stops and resumes anywhere. Append :s_16k for the paper's scale.
Expected: the default at least 0.95 and clearly above no_sync, in onset F1 and in median error.
"""
from configs import ablations

ROWS = ('no_sync', 'no_rope', 'unaligned_rope', 'mlp', 'av')


def get_config(base: str = 'impacts'):
    """The table: rows and seeds."""
    c = ablations.start(base, 'table')
    c.ablations.rows = (('default', f'configs/{base}.py'), *((row, f'configs/ablations/{row}.py:{base}') for row in ROWS))
    c.ablations.seeds = (0, 1, 2)
    c.ablations.at_once = 2
    return c
