"""The built-in run: render objects that strike, extract, train, evaluate.

    python run.py --config=configs/impacts.py --workdir=DIR

Cost: at most 15 minutes and 6 GB on two CPU cores. Expected: onset F1 at least 0.85 within 0.1 s, at most 0.35 when shuffled.
"""
from configs import base


def get_config():
    """The run."""
    c = base.get_config()
    c.name, c.stages = 'impacts', ('impacts', 'extract', 'train', 'evaluate')
    c.sequence.duration_s = 4.0
    c.extract.update(datasets=(('impacts', 'media/impacts'), ('impacts_sounds', 'media/impacts_sounds')),
                     encoder='pixels', codec='pca', codec_fit_dataset='impacts')
    c.input.update(mixture=(('impacts', 5), ('impacts_sounds', 1)), validation='impacts', statistics='impacts', batch_size=8,
                   validation_batch_size=8, validation_examples=32, workers=0)
    c.model.update(hidden_size=64, num_heads=1, joint_blocks=2, fused_blocks=2, dtype='float32')
    c.optimizer.update(learning_rate=1e-3, warmup_steps=50, schedule='polynomial', polynomial_steps=600, eps=1e-8)
    c.ema.update(snapshot_every=100, synthesis_sigma_rel=0.1)
    c.train.update(total_steps=600, validate_every=200, sample_every=300, checkpoint_every=200, keep_every=0)
    c.sampling.guidance = 2.0
    c.evaluate.dataset = 'impacts'
    return c
