"""Which positions a program meets at all, where `keep` compares loads of queries or keys (documents, padding).

    keep: Eq(n0, n1) & (j <= i)     n0: one a query, n1: one a key; a program keeps queries
    ->    (n0_low - n1 <= 0) & (n0_high - n1 >= 0) & (j - last <= 0)     for each key

A first loop over the keys' loads alone finds the first and the last key for which this holds (none is needed where it
holds for all keys or none), and the loop over tiles runs from one to the other. So samples that lie side by side meet
their own keys only; between two documents with the same id all is met. A branch in the loop over tiles would skip more
there, but Triton pipelines no loads under one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Not, Or

from recompile.lowering.attention.triton_schedule import padded
from recompile.lowering.lookup.triton_kernel import indent
from recompile.lowering.score import kind, symbol, tables_in
from recompile.lowering.score_triton import bare

if TYPE_CHECKING:
    from recompile.lowering.attention.triton_tile import Tile

FIRST, LAST = symbol("integer0"), symbol("integer1")  # of the positions that a program keeps
BYTES = {
    torch.bool: (0, 1),
    torch.uint8: (0, 255),
    torch.int8: (-128, 127),
}  # loaded as 32 bits, others as 64
SCANNED = 1024  # positions that a step of the first loop looks at


@dataclass
class Meeting:
    """What can be said of a position for a tile of `outer` positions.

    Args:
        ends: the least and greatest value of a tile's `outer` position, and of each integer load of it, by symbol.
        exact: whether an expression is the same for all `outer` positions.
    """

    ends: Mapping[sympy.Symbol, tuple[sympy.Basic, sympy.Basic]]
    exact: Callable[[sympy.Basic], bool]
    used: set[sympy.Symbol] = field(default_factory=set)  # those of `ends` that were

    def possible(self, keep: sympy.Basic) -> sympy.Basic:
        """Where it is false, `keep` is for every position of the tile."""
        return self._decided(keep, True)

    def _decided(self, expr: sympy.Basic, possible: bool) -> sympy.Basic:
        """What follows from `expr` for some position of the tile, or what it follows from for all."""
        if self.exact(expr):
            return expr
        if isinstance(expr, Not):
            return Not(self._decided(expr.args[0], not possible))
        if isinstance(expr, (And, Or)):
            return expr.func(*(self._decided(arg, possible) for arg in expr.args))
        found = self._range(expr) if isinstance(expr, Relational) else None
        if not found:
            return sympy.true if possible else sympy.false
        low, high = found
        if isinstance(expr, (sympy.StrictLessThan, sympy.LessThan)):
            return expr.func(low if possible else high, 0)
        if isinstance(expr, (sympy.StrictGreaterThan, sympy.GreaterThan)):
            return expr.func(high if possible else low, 0)
        near, same = And(low <= 0, high >= 0), And(sympy.Eq(low, 0), sympy.Eq(high, 0))
        if isinstance(expr, sympy.Eq):
            return near if possible else same
        return Not(same if possible else near)

    def _range(self, expr: Relational) -> tuple[sympy.Basic, sympy.Basic] | None:
        """The least and greatest value of left - right over the tile."""
        apart = sympy.expand(expr.lhs - expr.rhs)
        if kind(apart) != "integer":
            return None
        rest, low, high, used = apart, sympy.Integer(0), sympy.Integer(0), set()
        for name, (first, last) in self.ends.items():
            factor = rest.coeff(name)
            if factor.is_Integer and factor != 0:
                rest = sympy.expand(rest - factor * name)
                low += factor * (first if factor > 0 else last)
                high += factor * (last if factor > 0 else first)
                used.add(name)
        if not self.exact(rest):
            return None
        self.used |= used
        return low + rest, high + rest


def scan(tile: "Tile", keep: sympy.Basic, first: str, last: str, block: str) -> list[str]:
    """The statements that declare `begin` and `end` of what is met of `first` to `last`; none where it is all."""
    problem, inner, outer = tile.problem, tile.inner, tile.outer

    def loads(side: str) -> list[str]:
        return [name for name in problem.spec.extras if problem.varies(name) == {side}]

    spanned = {name: _ends_of(name) for name in loads(outer) if name[0] == "n"}
    meeting = Meeting(
        {symbol(outer): (FIRST, LAST)} | {symbol(name): ends for name, ends in spanned.items()},
        lambda expr: outer not in problem.depends(expr) and not tables_in(expr),
    )
    possible = meeting.possible(keep)
    read = [name for name in loads(inner) if symbol(name) in possible.free_symbols]
    known = [name for name in spanned if symbol(name) in meeting.used]
    if not read and not known:
        return []
    extremes = [line for name in known for line in _extremes(tile, name)]
    condition = tile.printed(possible)
    if inner not in problem.depends(possible):
        begin = [f"begin = {first}"] if first != "begin" else []
        return [*extremes, *begin, f"end = tl.where({bare(condition)}, {last}, 0)"]
    size, number = tile.sizes[inner], problem.n if inner == "j" else problem.m
    step = min(SCANNED, padded(number)) if isinstance(number, int) else SCANNED
    return [
        *extremes,
        f"nearest = tl.full([1, {step}], {size}, tl.int32)",
        f"farthest = tl.zeros([1, {step}], tl.int32)",
        f"for start in range({first}, {last}, {step}):",
        *indent([*tile.numbered(inner, "start", step), *map(tile.load, read)]),
        f"    met = {tile.inside(inner)} & {condition}",
        f"    nearest = tl.minimum(nearest, tl.where(met, {inner}, {size}))",
        f"    farthest = tl.maximum(farthest, tl.where(met, {inner} + 1, 0))",
        f"begin = tl.min(nearest) // {block} * {block}",
        "end = tl.max(farthest)",
    ]


def _ends_of(name: str) -> tuple[sympy.Symbol, sympy.Symbol]:
    """The variables that hold the least and greatest value of a load over a tile."""
    return symbol(f"{name}_low"), symbol(f"{name}_high")


def _extremes(tile: "Tile", name: str) -> list[str]:
    """Declares the least and greatest value of an integer load, where there are positions."""
    most = 2**31 - 1 if tile.problem.extra(name).dtype in BYTES else 2**63 - 1
    inside, (low, high) = bare(tile.inside(tile.outer)), _ends_of(name)
    return [
        f"{low} = tl.min(tl.where({inside}, {name}, {most}))",
        f"{high} = tl.max(tl.where({inside}, {name}, {-most}))",
    ]
