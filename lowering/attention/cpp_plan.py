"""What a kernel has to know of an attention: what each extra depends on, how tables are read, and what is shared.

Batch axes are split: an item of work is one index of the outer axes, and a tile of its pairs is visited for all indices
of the inner ones. The inner axes are the last ones that the costly parts of the scores do not depend on (HSTU: all heads
share the biases of position and time, and a logarithm a pair with them), so these are computed once, as h0, h1, ...
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import sympy

from recompile.lowering import score as language
from recompile.lowering.attention.spec import Attention
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.score import (
    I,
    J,
    M,
    N,
    div,
    erf,
    floor,
    floordiv,
    log2,
    log10,
    nearest,
    sigmoid,
    trunc,
)
from recompile.lowering.score_bounds import Interval, interval, positions, widened
from recompile.lowering.score_cpp import ctype

_ROUNDED = (trunc, floor, nearest, floordiv, sympy.Mod)
_COSTLY = (sympy.exp, sympy.log, sympy.tanh, log2, log10, sigmoid, erf, div, *_ROUNDED)
_REAL = ("float", "at::BFloat16", "at::Half")
# With so few queries a packed copy of K costs more than it saves: each key is multiplied where it lies.
FEW = 4
ENDLESS = (0.0, float("inf"))  # a row of a tile is computed to the end of its registers, beyond the last key
_NARROW = {"bool": (0, 1), "uint8_t": (0, 255), "int8_t": (-128, 127), "int16_t": (-(2**15), 2**15 - 1)}


@dataclass(frozen=True)
class Load:
    """An extra that is not a table: what it varies by, and the C++ type that its values are computed in."""

    name: str
    operand: Operand
    axes: frozenset[int]
    by_row: bool
    by_column: bool

    @property
    def ctype(self) -> str:
        if self.operand.ctype in _REAL:
            return "float"
        return "int32_t" if self.operand.ctype in _NARROW else "int64_t"

    @property
    def where(self) -> str:
        """What it is to the rows of a tile: "batch", "row", "column" or "pair"."""
        return ("batch", "column", "row", "pair")[2 * self.by_row + self.by_column]


@dataclass(frozen=True)
class Line:
    """A table read at a i + b j + c, b = 1 or -1: laid out so that a row of pairs reads neighbours, upwards."""

    name: str
    table: str
    axes: frozenset[int]
    a: int
    b: int
    c: sympy.Basic


@dataclass(frozen=True)
class Gather:
    """A table read anywhere. `safe`: no index can be out of range."""

    name: str
    table: str
    axes: frozenset[int]
    index: sympy.Basic
    safe: bool


@dataclass
class Plan:
    """An attention's extras and its expressions, with every read of a table named (`T0_0`)."""

    spec: Attention
    rank: int
    extras: dict[str, Operand]
    sizes: dict[sympy.Basic, int]  # M and N where they are known
    loads: dict[str, Load] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)
    gathers: dict[str, Gather] = field(default_factory=dict)
    inner: int = 0  # how many of the last batch axes a tile is visited for
    hoisted: dict[sympy.Basic, sympy.Symbol] = field(default_factory=dict)

    @classmethod
    def of(cls, spec: Attention, rank: int, extras: Sequence[Operand], m: str, n: str) -> Plan:
        sizes = {symbol: int(size) for symbol, size in ((M, m), (N, n)) if size.isdigit()}
        plan = cls(spec, rank, dict(zip(spec.extras, extras, strict=True)), sizes)
        for name, x in plan.extras.items():
            if name[0] != "T":
                varies = [size != "1" for size in x.sizes]
                axes = frozenset(a for a in range(rank) if varies[a])
                plan.loads[name] = Load(name, x, axes, varies[-2], varies[-1])
        return plan

    @property
    def is_few(self) -> bool:
        """Whether there are so few queries that nothing is packed."""
        return self.sizes.get(M, FEW + 1) <= FEW

    @property
    def reads(self) -> list[Line | Gather]:
        """The reads of tables."""
        return [*self.lines.values(), *self.gathers.values()]

    @property
    def types(self) -> dict[str, str]:
        """The C++ type of each symbol."""
        types = dict.fromkeys((*"ijMN", "end"), "int32_t") | {
            name: load.ctype for name, load in self.loads.items()
        }
        types |= dict.fromkeys([*self.lines, *self.gathers, *"sgp", "lse", "delta", "norm"], "float")
        for expr, symbol in self.hoisted.items():
            types[symbol.name] = ctype(expr, types)
        return types

    @property
    def small(self) -> dict[str, Interval]:
        """The intervals of what is computed with 32 bits."""
        loads = {name: _NARROW.get(load.operand.ctype) for name, load in self.loads.items()}
        return positions(self.sizes) | {name: found for name, found in loads.items() if found is not None}

    def named(self, text: str) -> sympy.Basic:
        """The expression `text`, with symbols for the reads of tables."""
        return self._replaced(widened(_smooth(language.parse(text)), self.small))

    def _replaced(self, expr: sympy.Basic) -> sympy.Basic:
        while found := language.tables_in(expr):
            expr = expr.xreplace({found[0]: self._read(found[0])})
        return expr

    def _read(self, load: sympy.Basic) -> sympy.Symbol:
        table, index = type(load).__name__, load.args[0]
        operand = self.extras[table]
        axes = frozenset(a for a in range(self.rank) if operand.sizes[a] != "1")
        for known in self.reads:
            if known.table == table and _index_of(known) == index:
                return language.symbol(known.name)
        name = f"{table}_{sum(x.table == table for x in self.reads)}"
        line = linear(index)
        if line and abs(line[1]) == 1 and line[2].free_symbols <= {M, N}:
            self.lines[name] = Line(name, table, axes, line[0], line[1], line[2])
        else:
            size = operand.sizes[-1]
            low, high = interval(index, self.small | {"i": ENDLESS, "j": ENDLESS})
            safe = size.isdigit() and low >= 0 and high < int(size)
            self.gathers[name] = Gather(name, table, axes, index, safe)
        return language.symbol(name)

    def split(self, exprs: Iterable[sympy.Basic], keep: sympy.Basic) -> None:
        """Chooses the inner axes: as many as leave the costly parts shared."""
        exprs = list(exprs)
        blocked = {a for s in keep.free_symbols if s.name in self.loads for a in self.loads[s.name].axes}
        counts = [0]
        for inner in range(1, self.rank + 1):
            self.inner = inner
            shared = {part for e in self._with_indices(exprs) for part in self._shared_parts(e)}
            counts.append(0 if self.rank - inner in blocked else len(shared))
            if not counts[-1]:
                break
        most = max(counts)
        self.inner = max(k for k, count in enumerate(counts) if count == most) if most else 0

    def depends(self, expr: sympy.Basic) -> tuple[frozenset[int], bool, bool]:
        """(batch axes, by row, by column) that `expr` varies by."""
        axes, row, column = frozenset[int](), False, False
        for symbol in expr.free_symbols:
            name = symbol.name
            if name in self.gathers:
                own = self.depends(self.gathers[name].index)
                own = (own[0] | self.gathers[name].axes, own[1], own[2])
            elif name in self.lines:
                own = (self.lines[name].axes, self.lines[name].a != 0, True)
            elif name in self.loads:
                load = self.loads[name]
                own = (load.axes, load.by_row, load.by_column)
            elif name in ("M", "N", "end"):
                continue
            else:
                own = (frozenset(range(self.rank) if name not in "ij" else ()), name != "j", name != "i")
            axes, row, column = axes | own[0], row | own[1], column | own[2]
        return axes, row, column

    def hoist(self, expr: sympy.Basic) -> sympy.Basic:
        """`expr`, with a symbol for each costly part that does not depend on the inner axes."""
        if not self.inner or not expr.args:
            return self._hoisted(expr) if self.inner and self._worth(expr) else expr
        if self._worth(expr):
            return self._hoisted(expr)
        args = list(expr.args)
        if isinstance(expr, (sympy.Add, sympy.Mul, sympy.And, sympy.Or)):
            shared = [arg for arg in args if self.is_shared(arg)]
            if len(shared) > 1 and self._worth(expr.func(*shared)):
                args = [expr.func(*shared), *(arg for arg in args if arg not in shared)]
        return expr.func(*map(self.hoist, args))

    def index(self, name: str) -> sympy.Basic:
        """The index of a gather, where its value is computed."""
        gather = self.gathers[name]
        return gather.index if self.is_shared(language.symbol(name)) else self.hoist(gather.index)

    def _hoisted(self, expr: sympy.Basic) -> sympy.Symbol:
        return self.hoisted.setdefault(expr, sympy.Symbol(f"h{len(self.hoisted)}", real=True))

    def is_shared(self, expr: sympy.Basic) -> bool:
        """Whether the inner batch axes share it."""
        return all(a < self.rank - self.inner for a in self.depends(expr)[0])

    def _worth(self, expr: sympy.Basic) -> bool:
        return self.is_shared(expr) and all(self.depends(expr)[1:]) and self._is_costly(expr)

    def _is_costly(self, expr: sympy.Basic) -> bool:
        names = {symbol.name for symbol in expr.free_symbols}
        wide = any(name in self.loads and self.loads[name].ctype == "int64_t" for name in names)
        return wide or bool(names & self.gathers.keys()) or expr.has(*_COSTLY)

    def _shared_parts(self, expr: sympy.Basic) -> Iterable[sympy.Basic]:
        for part in sympy.preorder_traversal(expr):
            own = isinstance(part, _COSTLY) or (isinstance(part, sympy.Symbol) and part.name in self.gathers)
            if own and self._worth(part):
                yield part

    def _with_indices(self, exprs: list[sympy.Basic]) -> list[sympy.Basic]:
        return [*exprs, *(gather.index for gather in self.gathers.values())]


def _smooth(expr: sympy.Basic) -> sympy.Basic:
    """`expr`, with quotients by what is the same for all pairs as products, where no whole number is made of them."""
    if not expr.args or isinstance(expr, _ROUNDED) or language.is_table(expr):
        return expr
    args = [_smooth(arg) for arg in expr.args]
    if isinstance(expr, div) and args[1].free_symbols <= {M, N}:
        return args[0] * sympy.Pow(args[1], -1)
    return expr.func(*args)


def _index_of(read: Line | Gather) -> sympy.Basic:
    return read.index if isinstance(read, Gather) else read.a * I + read.b * J + read.c


def linear(expr: sympy.Basic) -> tuple[int, int, sympy.Basic] | None:
    """(a, b, c) for a i + b j + c."""
    expr = sympy.expand(expr)
    if not isinstance(expr, (sympy.Add, sympy.Mul, sympy.Symbol)) or not {I, J} & expr.free_symbols:
        return None
    if not all(
        isinstance(part, (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Integer))
        for part in sympy.preorder_traversal(expr)
    ):
        return None
    a, b = expr.coeff(I), expr.coeff(J)
    rest = sympy.expand(expr - a * I - b * J)
    return (
        (int(a), int(b), rest) if a.is_Integer and b.is_Integer and not rest.free_symbols & {I, J} else None
    )
