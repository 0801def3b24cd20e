"""The parts of OptimizedMoELayer (labs/full_moe.py), one idea a file."""
