"""The ablations side by side, three seeds each, on the built-in dataset.

    python run.py --mode=ablations --config=configs/ablations/table.py --workdir=DIR

Cost: 18 runs of impacts_long, about two hours on two CPU cores; stops and resumes anywhere. Append :impacts for shorter runs.
Expected: the default at least 0.95 and clearly above no_sync, in onset F1 and in median error.
"""
from configs import ablations

ROWS = ('no_sync', 'no_rope', 'unaligned_rope', 'mlp', 'av')


def get_config(base: str = 'impacts_long'):
    """The table: rows and seeds."""
    c = ablations.start(base, 'table')
    c.ablations.rows = (('default', f'configs/{base}.py'), *((row, f'configs/ablations/{row}.py:{base}') for row in ROWS))
    c.ablations.seeds = (0, 1, 2)
    return c
