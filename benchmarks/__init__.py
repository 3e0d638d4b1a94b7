"""Benchmarks and the zoo's check, run from the repository: `python -m benchmarks.run`."""
