"""One tile of scores as Triton: what is loaded for it, which keys or queries it meets, and expressions over it.

`outer` is what a program keeps ("i": queries, "j": keys) and lies along a tile's rows; it loops over tiles of the
other. Expressions do not mind: `i` and `j` broadcast against each other either way.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor

from recompile.lowering import score as language
from recompile.lowering.attention import op
from recompile.lowering.attention.spec import Attention
from recompile.lowering.attention.triton_bounds import Reach
from recompile.lowering.attention.triton_frame import TRITON, Frame, is_one, is_wide, offset
from recompile.lowering.attention.triton_schedule import padded
from recompile.lowering.attention.triton_spans import BYTES, FIRST, LAST, scan
from recompile.lowering.score_bounds import Interval, interval, positions, widened
from recompile.lowering.score_triton import Statements, bare

BAD_INDEX = "recompile: index out of range: a table of scores is read outside its elements"


@dataclass(frozen=True)
class Problem:
    """One call: the spec and its tensors. Sizes may be symbolic, but for the two head dims."""

    spec: Attention
    q: Tensor
    k: Tensor
    v: Tensor
    extras: tuple[Tensor, ...]

    @property
    def batch(self) -> tuple[Any, ...]:
        return op.batch_shape(self.q.shape, self.k.shape, self.v.shape)

    def frame(self) -> Frame:
        """The frame of one of its kernels."""
        frame = Frame(self.batch)
        frame.size("M", self.m)
        frame.size("N", self.n)
        return frame

    @property
    def m(self) -> Any:
        return self.q.shape[-2]

    @property
    def n(self) -> Any:
        return self.k.shape[-2]

    @property
    def dim(self) -> int:
        return int(self.q.shape[-1])

    @property
    def value_dim(self) -> int:
        return int(self.v.shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        return self.q.dtype

    def parsed(self, text: str) -> sympy.Basic:
        """An expression of the spec, with the sizes that are known."""
        sizes = {"M": self.m, "N": self.n}
        known = {
            language.symbol(s): sympy.Integer(size) for s, size in sizes.items() if isinstance(size, int)
        }
        return widened(language.parse(text).xreplace(known), self.small)

    @property
    def small(self) -> dict[str, Interval]:
        """The intervals of what is computed with 32 bits."""
        sizes = {
            symbol: x for symbol, x in ((language.M, self.m), (language.N, self.n)) if isinstance(x, int)
        }
        loads = {name: BYTES.get(x.dtype) for name, x in zip(self.spec.extras, self.extras, strict=True)}
        return positions(sizes) | {name: found for name, found in loads.items() if found is not None}

    @property
    def keep(self) -> sympy.Basic:
        return self.parsed(self.spec.keep)

    @property
    def score(self) -> sympy.Basic:
        return self.parsed(self.spec.score)

    @property
    def kept(self) -> sympy.Basic:
        """The score of a kept pair."""
        return self.parsed(self.spec.kept or self.spec.score)

    @property
    def weight(self) -> sympy.Basic:
        return self.parsed(self.spec.weight or "1")

    @property
    def skips(self) -> bool:
        """Whether there are pairs that `keep` rules out."""
        return bool(self.keep != sympy.true)

    @property
    def in_powers_of_two(self) -> bool:
        """Whether exp2 of the scores times log2(e) is taken. Not with real loads: masks of -1e9 that are added would be
        rounded otherwise than eager rounds them."""
        return not any(name[0] == "x" for name in self.spec.extras)

    def extra(self, name: str) -> Tensor:
        """The tensor that a symbol is read from."""
        return self.extras[self.spec.extras.index(name)]

    def varies(self, name: str) -> frozenset[str]:
        """Which of i and j an extra depends on."""
        if name[0] == "T":
            return frozenset()
        shape = self.extra(name).shape
        return frozenset(dim for dim, size in zip("ij", shape[-2:], strict=True) if not is_one(size))

    def depends(self, expr: sympy.Basic) -> frozenset[str]:
        """Which of i and j an expression depends on; s depends on both."""
        found: frozenset[str] = frozenset()
        for name in (s.name for s in expr.free_symbols):
            own = {"s": frozenset("ij"), "i": frozenset("i"), "j": frozenset("j")}
            found |= (
                own[name] if name in own else self.varies(name) if name in self.spec.extras else frozenset()
            )
        return found


class Tile:
    """The statements about one tile, in a kernel whose programs keep `outer`."""

    def __init__(self, problem: Problem, frame: Frame, outer: str) -> None:
        self.problem, self.frame, self.outer = problem, frame, outer
        self.inner = "j" if outer == "i" else "i"
        self.sizes = {"i": frame.size("M", problem.m), "j": frame.size("N", problem.n)}
        self.acc = "tl.float32"
        self.indices: dict[
            sympy.Basic, tuple[str, str]
        ] = {}  # a load from a table: its index, and if it is in range
        self.used = self._used()
        for name, x in zip(problem.spec.extras, problem.extras, strict=True):
            if name in self.used:
                frame.tensor(name, x, 1 if name[0] == "T" else 2)

    def _used(self) -> set[str]:
        problem, names = self.problem, set()
        for expr in (problem.score, problem.kept, problem.keep, problem.weight):
            names |= {s.name for s in expr.free_symbols} | {
                type(t).__name__ for t in language.tables_in(expr)
            }
        return names

    def positions(self) -> list[str]:
        """Declares the positions that a program keeps, and the columns of a row."""
        p = self.problem
        lines = [*self.numbered(self.outer, "tile * {}"), f"d = tl.arange(0, {padded(p.dim)})"]
        return [*lines, *([f"e = tl.arange(0, {padded(p.value_dim)})"] if p.dim != p.value_dim else [])]

    def next_positions(self) -> list[str]:
        """Declares the positions that a step of the loop meets, which starts at `start`."""
        return self.numbered(self.inner, "start")

    def numbered(self, side: str, start: str, size: int | None = None) -> list[str]:
        """Declares the positions of one side, a block or `size` of them."""
        many, block = {"i": ("queries", "BLOCK_M"), "j": ("keys", "BLOCK_N")}[side]
        block = block if size is None else str(size)
        shape = "[:, None]" if side == self.outer else "[None, :]"
        first = start.format(block)
        return [f"{many} = {first} + tl.arange(0, {block})", f"{side} = {many}{shape}"]

    def rows(self, value: str, name: str, x: Tensor, side: str) -> str:
        """Loads a tile of rows of q, k, v or a gradient, `[BLOCK, columns]`."""
        at, mask = self.row_address(name, x, side)
        return f"{value} = tl.load({at}, mask={mask}, other=0.0)"

    def row_address(self, name: str, x: Tensor, side: str) -> tuple[str, str]:
        """Where a tile of rows lies, and its mask."""
        many, letter = {"i": ("queries", "m"), "j": ("keys", "n")}[side]
        width = int(x.shape[-1])
        column = "d" if width == self.problem.dim else "e"
        stride = self.frame.number(f"{name}_{letter}", x.stride(-2))
        step = self.frame.number(f"{name}_{column}", x.stride(-1))
        at = offset([(f"{many}[:, None]", stride), (f"{column}[None, :]", step)], is_wide(x, (-2, -1)))
        mask = f"({many} < {self.sizes[side]})[:, None]"
        mask += f" & ({column} < {width})[None, :]" if padded(width) != width else ""
        return f"{name}_at{at}", mask

    def loads(self, kept: bool) -> list[str]:
        """Loads the extras that depend on what a program keeps only (`kept`), or those that each step reads."""
        names = [n for n in self.problem.spec.extras if n[0] != "T" and n in self.used]
        return [self.load(n) for n in names if (self.inner not in self.problem.varies(n)) == kept]

    def load(self, name: str) -> str:
        """Loads an extra at the positions that are declared."""
        x = self.problem.extra(name)
        at, mask = self.pair_address(name, x, self.problem.varies(name))
        mask = f", mask={mask}, other=0" if mask else ""
        cast = "tl.float32" if name[0] == "x" else "tl.int32" if x.dtype in BYTES else "tl.int64"
        return f"{name} = tl.load({at}{mask}).to({cast})"

    def pair_address(self, name: str, x: Tensor, varies: Iterable[str]) -> tuple[str, str]:
        """Where elements of a `[*batch, M, N]` tensor lie, and their mask."""
        strides = {"i": self.frame.stride(f"{name}_m", x, -2), "j": self.frame.stride(f"{name}_n", x, -1)}
        terms = [(side, strides[side]) for side in "ij" if side in varies]
        return f"{name}_at{offset(terms, is_wide(x, (-2, -1)))}", self.inside(varies)

    def inside(self, varies: Iterable[str] = "ij") -> str:
        """Whether positions exist."""
        return " & ".join(f"({side} < {self.sizes[side]})" for side in "ij" if side in varies)

    def statements(self, exprs: Sequence[sympy.Basic]) -> Statements:
        """A printer for several expressions over a tile."""
        return Statements(exprs, self._read, self._is_small, lambda expr: self._interval(expr)[0] >= 0)

    def _interval(self, expr: sympy.Basic) -> Interval:
        return interval(expr, self.problem.small)

    def _is_small(self, expr: sympy.Basic) -> bool:
        low, high = self._interval(expr)
        return low > -(2**31) and high < 2**31

    def index(self, printer: Statements, load: sympy.Basic) -> tuple[list[str], str, str]:
        """The statements that a read of a table still needs, its index, and whether that fits ("": it does)."""
        lines: list[str] = []
        if load not in self.indices:
            lines, text = printer.value(load.args[0])
            lines += self._read(type(load).__name__, load.args[0], text)[0]
        return lines, *self.indices[load]

    def _read(self, name: str, index: sympy.Basic, text: str) -> tuple[list[str], str]:
        table = self.problem.extra(name)
        at = f"index{len(self.indices)}"
        mask = self.inside(self.problem.depends(index))
        lines, fits = [f"{at} = {bare(text)}"], ""
        low, high = self._interval(index)
        size = self.frame.number(f"{name}_size", table.shape[-1])
        if low < 0 or not isinstance(table.shape[-1], int) or high >= table.shape[-1]:
            self.frame.asserts = True
            fits = f"({at} >= 0) & ({at} < {size})"
            lines.append(f'tl.device_assert({f"~({mask}) | " if mask else ""}({fits}), "{BAD_INDEX}")')
            mask = f"{mask} & {fits}" if mask else fits
        self.indices[language.table(name)(index)] = at, fits
        where = offset([(at, self.frame.stride(f"{name}_t", table, -1))], wide=False)
        masked = f", mask={mask}, other=0.0" if mask else ""
        return lines, f"tl.load({name}_at{where}{masked}).to({self.acc})"

    def define(self, printer: Statements, name: str, expr: sympy.Basic) -> list[str]:
        """The statements that set `name` to `expr` for every pair, also if it is the same for many."""
        blocks = "[BLOCK_M, BLOCK_N]" if self.outer == "i" else "[BLOCK_N, BLOCK_M]"
        lines = printer.define(name, expr)
        if self.problem.depends(expr) != {"i", "j"}:
            lines.append(f"{name} = {name} + tl.zeros({blocks}, tl.float32)")
        return lines

    def span(self, keep: sympy.Basic) -> tuple[list[str], str]:
        """The statements that find what the loop has to meet, and the loop's head."""
        block, size = ("BLOCK_N", self.sizes["j"]) if self.inner == "j" else ("BLOCK_M", self.sizes["i"])
        constants = {n for n in self.problem.spec.extras if n[0] == "n" and not self.problem.varies(n)} | {
            "M",
            "N",
        }
        symbols = [language.symbol(name) for name in (self.inner, self.outer)]
        reach = Reach(
            symbols[0],
            symbols[1],
            FIRST,
            LAST,
            frozenset({*map(language.symbol, constants), FIRST, LAST}),
        )
        low, high = reach.bounds(keep)
        lines: list[str] = []
        first, last = "0", size
        if low is not None:
            lines.append(
                f"begin = tl.cast(tl.maximum({bare(self.printed(low))}, 0), tl.int32) // {block} * {block}"
            )
            first = "begin"
        if high is not None:
            lines.append(f"end = tl.cast(tl.minimum({bare(self.printed(high + 1))}, {size}), tl.int32)")
            last = "end"
        met = scan(self, keep, first, last, block)
        if met:
            lines, first, last = [*lines, *met], "begin", "end"
        return [*(self._ends() if lines else []), *lines], f"for start in range({first}, {last}, {block}):"

    def whole(self) -> str:
        """The head of a loop over everything."""
        return self.span(sympy.true)[1]

    def printed(self, expr: sympy.Basic) -> str:
        """The text of a value that needs no statements, in parentheses where it needs them."""
        lines, text = self.statements([]).value(expr)
        assert not lines
        return text.replace(FIRST.name, "first").replace(LAST.name, "last")

    def _ends(self) -> list[str]:
        block = "BLOCK_M" if self.outer == "i" else "BLOCK_N"
        ends = f"tl.minimum(first + {block}, {self.sizes[self.outer]}) - 1"
        return [f"first = tile * {block}", f"last = {ends}"]

    def dot(self, a: str, b: str, add: str = "") -> str:
        """a @ b + add, in float32."""
        more = f", {add}" if add else ""
        precise = ', input_precision="ieee"' if self.problem.dtype == torch.float32 else ""
        return f"tl.dot({a}, {b}{more}{precise})"

    def narrow(self, text: str) -> str:
        """A tile as the matrix unit takes it."""
        return text if self.problem.dtype == torch.float32 else f"{text}.to({TRITON[self.problem.dtype]})"
