"""What a group of table lookups computes, as text: the spec of `torch.ops.recompile.lookup`.

A *bag* is one table lookup of one feature: for each sample it reads one or more ids, turns each into a row of its
table, and pools the rows:

    bag[b] = pool over l, keep(b, l) of  weight(b, l) * table[row(b, l)]     ( / divisor(b) for a mean )

`row`, `keep`, `weight`, `count` and `divisor` are scalar expressions (`recompile.lowering.scalar`) over

    x0, x1, ...   the bag's loads: element (b, l) of a source; x0 is always the ids
    l, L          the position in the bag, and the number of positions
    nonzero       1 if the row just read has a non-zero sum, else 0          (only in `count`)
    count         the sum over kept positions of `count` (1 each by default) (only in `divisor`)

A source is `[B]`, or `[B, L]` with either size 1 allowed (broadcast), or, when the bag has `offsets`, one value an id.
An *output* is what consumers wanted: bags side by side, or their sum, or the sum of their squares.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch

from recompile.lowering.fingerprint import fingerprint
from recompile.lowering.record import from_text, to_text


@dataclass(frozen=True)
class Table:
    """One embedding table: `name` for people, `dim` its width."""

    name: str
    dim: int


@dataclass(frozen=True)
class Bag:
    """One lookup (see the module's docstring). Numbers other than `dim`s are positions in the op's lists."""

    table: int
    loads: tuple[int, ...]
    pooling: str = "none"  # "none": the L rows side by side; "sum" (also means, by `divisor`); "max"
    row: str = "x0"
    keep: str = "true"
    weight: str = ""
    count: str = ""
    divisor: str = ""
    offsets: int = -1  # source of the bags' first positions; -1: ids are [B] or [B, L]
    include_last_offset: bool = False
    frozen_row: int = -1  # `padding_idx` of nn.Embedding: read, but its row gets no gradient
    empty: str = "0.0"  # the maximum over no row, a number
    dtype: str = ""  # of the pooled value, "float32", where it is not the table's

    @property
    def weight_load(self) -> int:
        """The source that `weight`, which names one load, is."""
        return self.loads[int(self.weight.removeprefix("x"))]

    def value_dtype(self, table: torch.dtype) -> torch.dtype:
        """What its value has where its table has the dtype `table`."""
        return getattr(torch, self.dtype) if self.dtype else table


@dataclass(frozen=True)
class Output:
    """`parts`: a bag's position, or `~s` for source `s` (`[B, ...]`), copied as it is.

    kind "concat": `[B, sum of widths]`; "sum", "sum_of_squares": `[B, width]`, where a part wider than `width`
    counts as several rows of it.
    """

    kind: str
    parts: tuple[int, ...]
    width: int = 0  # for the sums


@dataclass(frozen=True)
class Lookup:
    """A group of lookups over the same batch, in canonical text form: `str(spec)`, `Lookup.parse(text)`.

    The text ends in a comment with the generators' fingerprint: the text is part of Inductor's cache key.
    """

    tables: tuple[Table, ...]
    bags: tuple[Bag, ...]
    outputs: tuple[Output, ...]

    def __str__(self) -> str:
        return f"{to_text(self, _TYPES)}  # {fingerprint()}"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> "Lookup":
        """The spec that `str` printed as `text`.

        Raises:
            ValueError: the text is not a spec.
        """
        value = from_text(text, _TYPES)
        if not isinstance(value, Lookup):
            raise ValueError(f"expected a Lookup(...), got {text[:80]!r}")
        return value


_TYPES: dict[str, Any] = {cls.__name__: cls for cls in (Table, Bag, Output, Lookup)}
