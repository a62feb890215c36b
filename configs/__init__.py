"""One file for each run: overrides of base.py only."""
