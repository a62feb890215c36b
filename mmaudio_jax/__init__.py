"""MMAudio (arXiv 2412.15322) in JAX: the sound of a silent video or of a text prompt."""
