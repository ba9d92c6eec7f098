"""Benchmarks of the optimizers' own time."""
