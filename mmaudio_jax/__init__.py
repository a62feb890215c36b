"""MMAudio (arXiv 2412.15322) in JAX: the sound of a silent video or of a text prompt."""


def __getattr__(name: str):
    """`from mmaudio_jax import Pipeline`, while `import mmaudio_jax` alone loads neither JAX nor anything else."""
    if name == 'Pipeline':
        from mmaudio_jax.pipeline import Pipeline
        return Pipeline
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
