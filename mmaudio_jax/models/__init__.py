"""The networks: functional Flax modules that take plain fields and import only each other."""
