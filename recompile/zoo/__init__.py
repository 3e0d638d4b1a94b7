"""Real recommendation models with inputs of a realistic shape: for the demo, the benchmarks and the checks.

model, inputs, batches = build("rechub.DeepFM")
model(*inputs(512))
"""

from .registry import Built, build, names

__all__ = ["Built", "build", "names"]
