"""How a program of an attention kernel is shaped: its tile of queries and keys, its warps, its pipeline's stages.

Chosen by counting registers and shared memory for sm_80, sm_90 and sm_100, not by timing: no GPU was at hand. With
RECOMPILE_AUTOTUNE=1 Triton times the neighbours as well, and takes the fastest.
"""

import os
from dataclasses import dataclass, replace

import torch

from recompile.lowering.lookup.schedule import ceil_power


@dataclass(frozen=True)
class Schedule:
    """A program's tile, in queries and keys, each a power of two of at least 16 (what a matrix unit takes)."""

    queries: int
    keys: int
    warps: int
    stages: int

    def __str__(self) -> str:
        blocks = f'{{"BLOCK_M": {self.queries}, "BLOCK_N": {self.keys}}}'
        return f"triton.Config({blocks}, num_warps={self.warps}, num_stages={self.stages})"


def padded(dim: int) -> int:
    """The width of a tile of rows of `dim`."""
    return max(16, ceil_power(dim))


def choose(kernel: str, dtype: torch.dtype, width: int, heavy: bool, m: object, n: object) -> list[Schedule]:
    """The schedules to try, the default first: only that one, unless asked to tune.

    Args:
        kernel: "forward", "queries" (their gradients, and the loads') or "keys" (gradients of keys and values).
        dtype: of q, k and v.
        width: the larger of the two head dims.
        heavy: something is read for each pair of a query and a key, so that a tile needs as many addresses.
        m: queries, n: keys; an int where known.
    """
    default = _default(kernel, dtype, padded(width), heavy)
    tried = [default, *_neighbours(default)] if os.environ.get("RECOMPILE_AUTOTUNE") == "1" else [default]
    return list(dict.fromkeys(_shrunk(s, m, n) for s in tried))


# Columns: light and heavy with rows of at most 64, light and heavy with rows of at most 128.
_HALF = {  # Matrix units: accumulators fill the registers.
    "forward": (
        Schedule(64, 64, 4, 3),
        Schedule(64, 32, 4, 2),
        Schedule(64, 32, 4, 2),
        Schedule(32, 32, 4, 2),
    ),
    "queries": (
        Schedule(64, 32, 4, 2),
        Schedule(32, 32, 4, 2),
        Schedule(32, 32, 4, 2),
        Schedule(32, 32, 4, 2),
    ),
    "keys": (Schedule(32, 64, 4, 2), Schedule(16, 32, 4, 2), Schedule(32, 32, 4, 2), Schedule(16, 32, 4, 2)),
}
# Exact float32 has no matrix unit on NVIDIA: a thread holds rows of its operands. What a program keeps is no smaller
# than what it loops over, which each program reads again. Light ones have registers left for a second stage.
_SINGLE = {
    "forward": (
        Schedule(32, 16, 4, 2),
        Schedule(32, 16, 4, 1),
        Schedule(16, 16, 4, 1),
        Schedule(16, 16, 4, 1),
    ),
    "queries": (
        Schedule(32, 16, 4, 2),
        Schedule(32, 16, 4, 1),
        Schedule(16, 16, 8, 1),
        Schedule(16, 16, 8, 1),
    ),
    "keys": (Schedule(16, 32, 4, 2), Schedule(32, 32, 8, 1), Schedule(16, 32, 8, 1), Schedule(16, 16, 8, 1)),
}


def _default(kernel: str, dtype: torch.dtype, width: int, heavy: bool) -> Schedule:
    single = dtype == torch.float32
    if width > 128:  # registers spill
        return Schedule(16, 16, 4, 1) if single else Schedule(32, 32, 4, 1)
    return (_SINGLE if single else _HALF)[kernel][heavy + 2 * (width > 64)]


def _neighbours(s: Schedule) -> list[Schedule]:
    wider = [replace(s, queries=2 * s.queries), replace(s, keys=2 * s.keys)]
    return [*wider, *(replace(w, warps=8) for w in wider), replace(s, stages=s.stages + 1)]


def _shrunk(s: Schedule, m: object, n: object) -> Schedule:
    """No larger than what there is."""
    queries = min(s.queries, padded(m)) if isinstance(m, int) else s.queries
    keys = min(s.keys, padded(n)) if isinstance(n, int) else s.keys
    return replace(s, queries=queries, keys=keys)
