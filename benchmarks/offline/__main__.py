"""`python -m benchmarks.offline`: writes benchmarks/results/offline.json and offline.md anew (minutes, no GPU)."""

from .table import write

write()
