"""The ablations side by side, three seeds each, on the built-in dataset.

    python run.py --mode=ablations --config=configs/ablations/table.py --workdir=DIR --config.train.sample_every=0

Cost: 18 runs of impacts, about an hour on two CPU cores; resumes anywhere. At the paper's scale, with :s_16k: 15 runs
a seed, with the paper's columns.
Expected: the default at least 0.95 and clearly above no_sync, in onset F1 and in median error.
"""
from configs import ablations

ROWS = ('no_sync', 'no_rope', 'unaligned_rope', 'mlp', 'av')
MORE = ('sync_sum_with_visual', 'n1_2_n2_13', 'n1_6_n2_3', 'av_at', 'avt_a', 'av_a', 'text_share_50', 'text_share_25',
        'text_share_10')


def get_config(base: str = 'impacts'):
    """The table: rows and seeds."""
    c = ablations.start(base, 'table')
    rows = ROWS if base == 'impacts' else ROWS + MORE
    c.ablations.rows = (('default', f'configs/{base}.py'), *((row, f'configs/ablations/{row}.py:{base}') for row in rows))
    c.ablations.update(seeds=(0, 1, 2), at_once=2)
    if base != 'impacts':
        c.ablations.update(flags=ablations.PAPER_FLAGS, published='vggsound_ablations' if base == 's_16k' else '', at_once=1)
    return c
