"""Which pairs of a tile may be kept: `Attention.keep` at a tile's corners, as C++.

For rows i0 to i1 and keys j0 to j1 (inclusive): `possible` holds unless no pair is kept, `certain` only if all are.
Comparisons that are linear in i, j and integer loads are decided at the corners, for a load of the row or the key by its
least and greatest value there (documents, of which a tile of queries meets few); what depends on the key only (padding)
by `any` and `all` over the tile's keys, found once a tile; other conditions on rows and keys, as a mask that is a tensor,
by cells that are found before (`cpp_cells.py`). What reads tables may be either.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from recompile.lowering import scalar
from recompile.lowering.attention.cpp_plan import Load, Plan, linear
from recompile.lowering.score import I, J
from recompile.lowering.score_cpp import text


@dataclass
class Keep:
    """`columns` are the conditions on the key alone that `possible` and `certain` speak of, as any0, all0, ...;
    `spans` the loads of a row or a key whose least and greatest value they speak of, as n0_low and n0_high;
    `cells` the conditions on both that are found before."""

    plan: Plan
    expr: sympy.Basic
    columns: list[sympy.Basic] = field(default_factory=list)
    spans: dict[str, Load] = field(default_factory=dict)
    cells: list[sympy.Basic] = field(default_factory=list)

    def possible(self) -> str:
        return self._decide(self.expr, True)

    def certain(self) -> str:
        return self._decide(self.expr, False)

    def bounds(self) -> tuple[str, str]:
        """(first, end) of the keys that rows i0 to i1 may keep."""
        return self._hull(self.expr)

    def _decide(self, expr: sympy.Basic, possible: bool) -> str:
        if isinstance(expr, (BooleanTrue, BooleanFalse)):
            return "true" if expr else "false"
        if isinstance(expr, Not):
            return f"!({self._decide(expr.args[0], not possible)})"
        _, row, column = self.plan.depends(expr)
        if column and not row and J not in expr.free_symbols and not self._reads_tables(expr):
            if expr not in self.columns:
                self.columns.append(expr)
            return f"t.{'any' if possible else 'all'}{self.columns.index(expr)}"
        if isinstance(expr, (And, Or)):
            parts = [self._decide(arg, possible) for arg in expr.args]
            return "(" + (" && " if isinstance(expr, And) else " || ").join(parts) + ")"
        found = self._ends(expr) if isinstance(expr, Relational) else None
        if not found:
            if (cells := self._cells(expr)) is not None:
                return f"{'any' if possible else 'all'}_cells({cells}, i0, i1, j0, j1)"
            return "true" if possible else "false"
        low, high = found
        kind = type(expr)
        if kind in (sympy.StrictLessThan, sympy.LessThan):
            return f"({low if possible else high} {'<' if kind is sympy.StrictLessThan else '<='} 0)"
        if kind in (sympy.StrictGreaterThan, sympy.GreaterThan):
            return f"({high if possible else low} {'>' if kind is sympy.StrictGreaterThan else '>='} 0)"
        same, near = f"({low} == 0 && {high} == 0)", f"({low} <= 0 && {high} >= 0)"
        if kind is sympy.Eq:
            return near if possible else same
        return f"!{same if possible else near}"

    def _cells(self, expr: sympy.Basic) -> str | None:
        """The cells of a condition on positions and loads that is another for each pair; None for any other."""
        _, row, column = self.plan.depends(expr)
        known = {symbol.name for symbol in expr.free_symbols} <= {*"ijMN", *self.plan.loads}
        if not (row and column and known) or self.plan.is_few:
            return None
        if expr not in self.cells:
            self.cells.append(expr)
        return f"t.cells{self.cells.index(expr)}"

    def _ends(self, expr: Relational) -> tuple[str, str] | None:
        """The least and greatest value of left - right over the tile."""
        rest, spans = sympy.expand(expr.lhs - expr.rhs), dict[str, int]()
        for symbol in sorted(rest.free_symbols & set(map(scalar.symbol, self.plan.loads)), key=str):
            load, factor = self.plan.loads[symbol.name], rest.coeff(symbol)
            if load.where in ("row", "column") and load.ctype != "float" and factor.is_Integer:
                spans[symbol.name] = int(factor)
                rest = sympy.expand(rest - factor * symbol)
        found = self._linear(rest)
        if not found:
            return None
        self.spans |= {name: self.plan.loads[name] for name in spans}
        corners = [_corner(self._end_names(spans), found, highest) for highest in (False, True)]
        return corners[0], corners[1]

    def _end_names(self, spans: dict[str, int]) -> list[tuple[int, tuple[str, str]]]:
        """For each factor, what it is the factor of where that is least, and where it is greatest."""
        where = {name: "t." * (self.plan.loads[name].where == "column") + name for name in spans}
        return [(factor, (f"{where[name]}_low", f"{where[name]}_high")) for name, factor in spans.items()]

    def _linear(self, expr: sympy.Basic) -> tuple[int, int, str] | None:
        """(a, b, c) for a i + b j + c, where c is the same for a batch index."""
        found = linear(expr)
        if not found:
            if expr.free_symbols & {I, J}:
                return None
            found = (0, 0, expr)
        for symbol in found[2].free_symbols:
            load = self.plan.loads.get(symbol.name)
            if symbol.name not in "MN" and (load is None or load.where != "batch" or load.ctype == "float"):
                return None
        types = dict.fromkeys(self.plan.types, "int64_t")
        return (
            (found[0], found[1], text(found[2], types, "int64_t"))
            if found[2].is_integer is not False
            else None
        )

    def _reads_tables(self, expr: sympy.Basic) -> bool:
        return any(s.name in self.plan.lines or s.name in self.plan.gathers for s in expr.free_symbols)

    def _hull(self, expr: sympy.Basic) -> tuple[str, str]:
        if isinstance(expr, (And, Or)):
            parts = [self._hull(arg) for arg in expr.args]
            inner, outer = ("std::max", "std::min") if isinstance(expr, And) else ("std::min", "std::max")
            return _joined(inner, [first for first, _ in parts]), _joined(outer, [end for _, end in parts])
        found = self._linear(expr.lhs - expr.rhs) if isinstance(expr, Relational) else None
        if not found and expr in self.cells:
            cells = self._cells(expr)
            return f"first_cell({cells}, i0, i1)", f"std::min(N, end_cell({cells}, i0, i1))"
        if not found or abs(found[1]) != 1 or isinstance(expr, sympy.Ne):
            return "int64_t(0)", "N"
        return _key_bounds(type(expr), *found)


def _key_bounds(kind: type, a: int, b: int, rest: str) -> tuple[str, str]:
    """Bounds on j where a i + b j + rest is below, at or above 0, b = 1 or -1."""
    strict = int(kind in (sympy.StrictLessThan, sympy.StrictGreaterThan))
    first, end = "int64_t(0)", "N"
    below = kind in (sympy.StrictLessThan, sympy.LessThan)
    # The value of j at which it is 0: -b (a i + rest).
    zero = (-b * a, rest if b < 0 else f"-({rest})")
    if kind is sympy.Eq or below == (b > 0):
        end = _plus(_at(zero[0], 0, zero[1], True), 1 - strict)
    if kind is sympy.Eq or below != (b > 0):
        first = _plus(_at(zero[0], 0, zero[1], False), strict)
    return first, end


def _at(a: int, b: int, rest: str, highest: bool) -> str:
    """a i + b j + rest at the corner of a tile where it is highest, or lowest."""
    return _corner([], (a, b, rest), highest)


def _corner(spans: list[tuple[int, tuple[str, str]]], found: tuple[int, int, str], highest: bool) -> str:
    a, b, rest = found
    parts = [] if rest == "0" else [rest]
    for factor, ends in ((a, ("i0", "i1")), (b, ("j0", "j1")), *spans):
        if factor:
            corner = ends[(factor > 0) == highest]
            parts.append({1: corner, -1: f"-{corner}"}.get(factor, f"{factor} * {corner}"))
    return f"({' + '.join(parts)})" if parts else "int64_t(0)"


def _plus(value: str, more: int) -> str:
    return f"{value} + {more}" if more else value


def _joined(function: str, parts: list[str]) -> str:
    kept = list(dict.fromkeys(parts))
    neutral = {"std::max": "int64_t(0)", "std::min": "N"}[function]
    return_early = {"std::max": "N", "std::min": "int64_t(0)"}[function]
    if return_early in kept:
        return return_early
    kept = [part for part in kept if part != neutral] or [neutral]
    found = kept[0]
    for part in kept[1:]:
        found = f"{function}<int64_t>({found}, {part})"
    return found
