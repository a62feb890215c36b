"""Official weight files and our parameter trees: one strict mapping for each model."""
