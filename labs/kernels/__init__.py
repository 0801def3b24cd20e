"""Kernels of the upper rungs, one job a file: routing, rounding, GEMMs for few rows and for many, combine."""
