"""Benchmarks on a GPU, each case with a target: `python -m benchmarks.gpu`. See docs/gpu.md."""
