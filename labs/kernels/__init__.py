"""The kernels of the Hopper level, one job a file: routing, the decode GEMMs, combine."""
