"""Loops over the pairs of one row of a tile, written so that gcc turns them into vectors.

A tile `t` (struct Tile) points at everything that varies; column c of it is key j = t.j0 + c. What varies by column is
read side by side, `x_[c]`; values that vary by row or batch are scalars. Columns c0 to c1 are whole registers: the last
ones may lie behind the tile's last key, where everything readable is, and nothing counts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import sympy

from recompile.lowering.attention.cpp_plan import Line, Load, Plan
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.scalar import symbol
from recompile.lowering.score import I, J, where
from recompile.lowering.score_cpp import Statements, ctype, text


@dataclass
class Loop:
    """One loop: `reads` are the float arrays that symbols are read from, `stores` (left side, type, expression)."""

    plan: Plan
    reads: Mapping[str, str]
    stores: Sequence[tuple[str, str, sympy.Basic]]
    scalars: Mapping[str, str] = field(default_factory=dict)
    lets: Sequence[tuple[str, sympy.Basic]] = ()  # floats that `stores` use, by name
    slots: Collection[str] = ()  # gathers whose index is stored, as `T0_0_slot[c]`

    def __str__(self) -> str:
        used = self._used()
        gathers = [name for name in self.plan.gathers if name in used]
        indices = [self.plan.index(name) for name in gathers]
        exprs = [*(expr for _, expr in self.lets), *(expr for _, _, expr in self.stores)]
        written = Statements([*indices, *exprs], self.plan.types)
        kinds = {name: self._kind(name, index) for name, index in zip(gathers, indices, strict=True)}
        for k, name in enumerate(gathers):
            safe = self.plan.gathers[name].safe
            written.lines += self._gathered(name, written.result(k, "" if safe else kinds[name]), kinds[name])
        for k, (name, _) in enumerate(self.lets, len(gathers)):
            written.lines.append(f"const float {name} = {written.result(k, 'float')};")
        for k, (left, kind, _) in enumerate(self.stores, len(gathers) + len(self.lets)):
            written.lines.append(f"{left} {written.result(k, kind)};")
        checked = [name for name in gathers if not self.plan.gathers[name].safe]
        ends = "".join(f"\n    {kinds[name]} {name}_low = 0, {name}_high = 0;" for name in checked)
        low, high = (", ".join(f"{name}_{end}" for name in checked) for end in ("low", "high"))
        reduction = f" reduction(min : {low}) reduction(max : {high})" if checked else ""
        lines = "\n      ".join([*self._columns(used), *written.lines])
        return f"""{"".join(f"{chr(10)}    {x}" for x in self._rows(used))}{ends}
    #pragma omp simd{reduction}
    for (int32_t c = int32_t(c0); c < int32_t(c1); ++c) {{
      {lines}
    }}{"".join(self._check(name) for name in checked)}"""

    def _used(self) -> set[str]:
        exprs = [*(expr for _, expr in self.lets), *(expr for _, _, expr in self.stores)]
        names = {s.name for expr in exprs for s in expr.free_symbols}
        for name in [n for n in names if n in self.plan.gathers]:
            names |= {s.name for s in self.plan.index(name).free_symbols}
        return names

    def _rows(self, used: set[str]) -> list[str]:
        """Declares what is the same for the whole row, and where its columns are read."""
        found = [
            f"const int32_t {name} = int32_t({value});" for name, value in _WHOLE.items() if name in used
        ]
        found += [f"const float {name} = {value};" for name, value in self.scalars.items() if name in used]
        for name in sorted(used & self.plan.loads.keys()):
            found += _load(self.plan.loads[name])
        for name in sorted(used & self.plan.lines.keys()):
            found.append(f"const float* const {name}_ = t.{name} + {line_at(self.plan.lines[name])};")
        for name in sorted(used & self.plan.gathers.keys()):
            found.append(f"const float* const {name}_ = t.{self.plan.gathers[name].table};")
        for name in sorted(used & set(self.slots)):
            found.append(f"int32_t* const {name}_slot = t.{name}_slots + (row - t.i0) * BN;")
        for hoisted in self.plan.hoisted.values():
            if hoisted.name in used:
                kind = self.plan.types[hoisted.name]
                found.append(f"const {_stored(kind)}* const {hoisted}_ = t.{hoisted} + (row - t.i0) * BN;")
        return found

    def _columns(self, used: set[str]) -> list[str]:
        """Reads what varies by column."""
        found = ["const int32_t j = int32_t(t.j0) + c;"] if "j" in used else []
        arrays = [n for n, x in self.plan.loads.items() if x.by_column] + list(self.plan.lines)
        for name in sorted(used & set(arrays)):
            found.append(f"const {self.plan.types[name]} {name} = {name}_[c];")
        for hoisted in self.plan.hoisted.values():
            if hoisted.name in used:
                found.append(f"const {self.plan.types[hoisted.name]} {hoisted} = {hoisted}_[c];")
        return found + [f"const float {n} = {array}[c];" for n, array in self.reads.items() if n in used]

    def _kind(self, name: str, index: sympy.Basic) -> str:
        """The type that an index is checked in: half as wide, twice as many are checked at once."""
        size = self.plan.extras[self.plan.gathers[name].table].sizes[-1]
        short = size.isdigit() and int(size) < 2**30 and ctype(index, self.plan.types) == "int32_t"
        return "int32_t" if short else "int64_t"

    def _gathered(self, name: str, index: str, kind: str) -> list[str]:
        gather = self.plan.gathers[name]
        read = [f"const float {name} = {name}_[{name}_in];"]
        if name in self.slots:
            read.append(f"{name}_slot[c] = {name}_in;")
        if gather.safe:
            return [f"const int32_t {name}_in = int32_t({index});", *read]
        size = f"{kind}({gather.table}_size)"
        return [
            f"const {kind} {name}_at = real::select(c < int32_t(t.j1 - t.j0), {kind}({index}), {kind}(0));",
            f"{name}_low = {name}_at < {name}_low ? {name}_at : {name}_low;",
            f"{name}_high = {name}_at > {name}_high ? {name}_at : {name}_high;",
            f"const {kind} {name}_up = {name}_at < 0 ? {name}_at + {size} : {name}_at;",
            f"const int32_t {name}_in = int32_t(real::select(({name}_up >= 0) & ({name}_up < {size}), {name}_up, {kind}(0)));",
            *read,
        ]

    def _check(self, name: str) -> str:
        table = self.plan.gathers[name].table
        size = f"{table}_size"
        return f"""
    if (({name}_low < -{size}) | ({name}_high >= {size})) [[unlikely]] bad.report({table[1:]}, {name}_low, {name}_high, {size});"""


_WHOLE = {"i": "row", "M": "this->M", "N": "this->N", "end": "t.j1"}


def masked(keep: sympy.Basic, value: sympy.Basic, other: sympy.Basic) -> sympy.Basic:
    """`value` where a pair is kept and its key is one of the tile's, else `other`."""
    return where(sympy.And(sympy.StrictLessThan(J, symbol("end")), keep), value, other)


def _stored(kind: str) -> str:
    return "int32_t" if kind == "bool" else kind


def _load(load: Load) -> list[str]:
    name, kind = load.name, load.ctype
    if load.where == "batch":
        return [f"const {kind} {name} = t.{name};"]
    if load.where == "row":
        return [f"const {kind} {name} = static_cast<{kind}>(t.{name}[row * {name}_m]);"]
    if load.where == "column":
        return [f"const {kind}* const {name}_ = t.{name};"]
    return [
        f"alignas(64) {kind} {name}_row[BN];",
        f"const {kind}* const {name}_ = line(t.{name} + row * {name}_m + t.j0 * {name}_n, {name}_n, t.j1 - t.j0, {name}_row);",
    ]


def line_at(line: Line) -> str:
    """Where column 0 of a row is in a table laid out as a line."""
    index = text(line.a * I, {"i": "int64_t"}, "int64_t").replace("i", "row")
    return f"t.j0 + {line.name}_first() - {index}" if line.b < 0 else f"t.j0 - {line.name}_first() + {index}"


def pointer(operand: Operand, name: str, axes: Sequence[int]) -> str:
    """The first element of a batch index `at` of an operand, over these axes."""
    return name + "".join(f" + at[{a}] * {name}_{a}" for a in axes if operand.sizes[a] != "1")


def hoisting(plan: Plan, slots: Collection[str] = ()) -> str:
    """The function that computes the shared parts of a row of a tile."""
    if not plan.hoisted:
        return ""
    stores = [(f"{symbol}_to[c] =", ctype_of(plan, expr), expr) for expr, symbol in plan.hoisted.items()]
    arrays = "".join(
        f"\n    {_stored(ctype_of(plan, expr))}* const {symbol}_to = t.{symbol} + (row - t.i0) * BN;"
        for expr, symbol in plan.hoisted.items()
    )
    return f"""
  // What all indices of the inner batch axes share.
  void shared(const Tile& t, int64_t row, int64_t c0, int64_t c1, Bad& bad) const {{{arrays}{Loop(plan, {}, stores, slots=slots)}
  }}"""


def ctype_of(plan: Plan, expr: sympy.Basic) -> str:
    return ctype(expr, plan.types)
