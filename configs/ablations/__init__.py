"""One file for each published ablation (SPEC: table 10)."""
