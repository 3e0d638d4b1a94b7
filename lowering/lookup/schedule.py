"""How a program of a GPU kernel is shaped, for each class of bags.

A program (4 warps, 128 threads) computes a tile of `samples x positions x columns` elements. The numbers below keep 16
accumulators a thread, so that a tile and its addresses stay well below the 255 registers that a thread can have. They
were chosen by counting registers, not by timing: no GPU was at hand.

    one-hot narrow   many rows a program, so that reading the bag's pointers costs little
    one-hot wide     few rows, whole; beyond 1024 columns a row is cut among programs
    pooled short     a few rows of each sample in flight at a time
    pooled long      more rows of fewer samples in flight, so that one long bag does not hold many up
"""

from dataclasses import dataclass

TILE = 2048
WIDEST = 1024
SHORT = 32


@dataclass(frozen=True)
class Schedule:
    """A program's tile, each size a power of two; `chunks` programs share the columns of a row."""

    name: str
    samples: int
    positions: int
    columns: int
    chunks: int


def choose(pooling: str, dim: int, length: int | None, itemsize: int, whole: bool) -> Schedule:
    """The schedule of a class of bags.

    Args:
        pooling: as in `Bag`.
        dim: width of the tables.
        length: positions in each bag; None if they differ or are not known.
        itemsize: bytes of an accumulator, 4 or 8.
        whole: a program must see whole rows.
    """
    tile = TILE * 4 // itemsize
    columns = ceil_power(dim) if whole else min(ceil_power(dim), WIDEST)
    chunks = -(-dim // columns)
    if pooling == "none":
        name = "one-hot narrow" if dim <= 32 else "one-hot wide"
        return Schedule(name, _clamp(tile // columns, 256), 1, columns, chunks)
    short = length is not None and length <= SHORT
    positions = min(ceil_power(max(length, 1)), 4) if short and length is not None else 16
    name = "pooled short" if short else "pooled long"
    positions = _clamp(tile // columns, positions)
    return Schedule(name, _clamp(tile // (columns * positions), 64), positions, columns, chunks)


def ceil_power(n: int) -> int:
    """The smallest power of two that is not below `n`."""
    return 1 << max(n - 1, 0).bit_length()


def _clamp(n: int, most: int) -> int:
    return max(1, min(n, most))
