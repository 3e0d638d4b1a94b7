"""Triton for an attention's gradients: one kernel for those of queries and loads, one for those of keys and values.

The first keeps a tile of queries and loops over keys, the second the other way round, with its tiles transposed. Both
compute scores again, then the formulas of `reference.backward`; derivatives are sympy's. Gradients of what several
programs share (broadcast tensors, tables) are added atomically to zero-filled float32 buffers, so their last bits may
differ from run to run.

As in the forward kernel, rows without a kept score that counts (`unsettled`) take a second loop over all pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import sympy
import torch
from torch import Tensor

from recompile.lowering import score as language
from recompile.lowering.attention.triton_forward import mask, negligible, schedules, title
from recompile.lowering.attention.triton_frame import TRITON, Frame, Launch, is_one, kernel, offset
from recompile.lowering.attention.triton_schedule import padded
from recompile.lowering.attention.triton_tile import Problem, Tile
from recompile.lowering.lookup.triton_kernel import indent
from recompile.lowering.score_triton import LOG2E, Statements, bare, in_powers_of_two

_SCORE, _WEIGHT = language.symbol("dscore"), language.symbol("dweight")


def buffers(problem: Problem, wanted: Sequence[int]) -> dict[str, Tensor]:
    """What the gradients of q, k, v and the extras `wanted` are written to, by name."""
    found = {name: _buffer(problem, name, getattr(problem, name)) for name in "qkv"}
    return found | {name: _buffer(problem, name, problem.extra(name)) for name in _names(problem, wanted)}


def _names(problem: Problem, wanted: Sequence[int]) -> list[str]:
    return [problem.spec.extras[e] for e in wanted]


def _buffer(problem: Problem, name: str, x: Tensor) -> Tensor:
    if is_shared(problem, name, x):
        return x.new_zeros(x.shape, dtype=torch.float32)
    # Of the loads of pairs, those that `keep` rules out are not visited.
    return x.new_zeros(x.shape) if name[0] == "x" else x.new_empty(x.shape)


def is_shared(problem: Problem, name: str, x: Tensor) -> bool:
    """Whether several programs add to the same elements of a gradient."""
    if name[0] == "T" or (name[0] == "x" and not problem.varies(name)):
        return True
    outer = (1,) * (len(problem.batch) + 2 - x.dim()) + tuple(x.shape[:-2])
    return any(is_one(a) and not is_one(b) for a, b in zip(outer, problem.batch, strict=True))


def launches(
    problem: Problem, grad: Tensor, lse: Tensor, delta: Tensor, into: Mapping[str, Tensor]
) -> Iterator[Launch]:
    """The launches that fill `into` (see `buffers`)."""
    extras = [name for name in into if name not in ("q", "k", "v")]
    if any(name in _names_in(problem.keep) for name in extras):
        # What decides about a pair has a gradient of its own: no pair is skipped.
        spec = replace(problem.spec, keep="true", kept="", negligible=float("-inf"))
        problem = replace(problem, spec=spec)
    for outer in "ij":
        of_keys = [name for name in extras if problem.varies(name) == {"j"}]
        own = of_keys if outer == "j" else [name for name in extras if name not in of_keys]
        results = ("q",) if outer == "i" else ("k", "v")
        yield _Backward(problem, outer, {name: into[name] for name in (*results, *own)}).launch(
            grad, lse, delta
        )


def _names_in(expr: sympy.Basic) -> set[str]:
    return {s.name for s in expr.free_symbols} | {type(load).__name__ for load in language.tables_in(expr)}


def _slope(expr: sympy.Basic, by: sympy.Basic) -> sympy.Basic:
    """The derivative, with constant factors in front; indices and what they are made of stay as they are."""
    slope = language.diff(expr, by)
    whole = [
        part
        for part in sympy.preorder_traversal(slope)
        if language.is_table(part) or language.kind(part) != "real"
    ]
    hidden = {part: sympy.Dummy(real=True) for part in whole if part.args}
    shown = {dummy: part for part, dummy in hidden.items()}
    return sympy.factor_terms(slope.xreplace(hidden)).xreplace(shown)


class _Backward:
    """One of the two kernels; `into` are the gradients that it computes."""

    def __init__(self, problem: Problem, outer: str, into: Mapping[str, Tensor]) -> None:
        self.problem, self.outer, self.into = problem, outer, into
        self.softmax = problem.spec.softmax
        self.extras = [name for name in into if name not in ("q", "k", "v")]
        self.block = "BLOCK_M" if outer == "i" else "BLOCK_N"
        self.other = "BLOCK_N" if outer == "i" else "BLOCK_M"

    def launch(self, grad: Tensor, lse: Tensor, delta: Tensor) -> Launch:
        problem, frame = self.problem, self.problem.frame()
        self.grad, self.lse, self.delta = grad, lse, delta
        for name in "qkv":
            frame.tensor(name, getattr(problem, name), 2)
        frame.tensor("grad", grad, 2)
        if self.softmax:
            frame.tensor("lse", lse, 2)
            frame.tensor("delta", delta, 1)
        for name, x in self.into.items():
            frame.tensor(f"d{name}", x, 1 if name[0] == "T" else 2)
        self.tile = Tile(problem, frame, self.outer)
        body = self._body(frame)
        name, what = ("queries", "q") if self.outer == "i" else ("keys", "k and v")
        tried = schedules(problem, name)
        if any(is_shared(problem, n, x) for n, x in self.into.items()):
            tried = tried[:1]  # a tuner's runs would add up
        headline = f"gradients of {', '.join([what, *self.extras])} of {title(problem)}"
        size = problem.m if self.outer == "i" else problem.n
        return kernel(f"attention_backward_{name}", headline, frame, self.block, size, body, tried)

    def _body(self, frame: Frame) -> list[str]:
        tile, problem = self.tile, self.problem
        before, head = tile.span(problem.keep)
        split = self.softmax and problem.skips
        step = self._step(
            problem.kept, problem.keep, problem.in_powers_of_two, " & ~unsettled" if split else ""
        )
        return [
            *tile.positions(),
            *self._rows(self.outer),
            *tile.loads(kept=True),
            *self._zeros(),
            *before,
            head,
            *indent(step),
            *(self._again(frame) if split else []),
            *self._stores(),
        ]

    def _again(self, frame: Frame) -> list[str]:
        """The loop for unsettled rows. What the program keeps is loaded again, lest it be held in registers, as the
        matrix unit takes it, over both loops."""
        if self.outer == "i":
            step = self._step(self.problem.score, sympy.true, False, " & unsettled")
            again = [*self._rows("i", sums=False), self.tile.whole(), *indent(step)]
            return ["if tl.max(unsettled.to(tl.int32)) > 0:", *indent(again)]
        settled = (self.lse[..., 0] > self.problem.spec.negligible).all(-1, keepdim=True)
        frame.tensor("settled", settled, 1)
        start = [*self.tile.next_positions(), *self._sums()]
        step = self._step(self.problem.score, sympy.true, False, " & unsettled", positions=False)
        inner = [*start, "if tl.max(unsettled.to(tl.int32)) > 0:", *indent(step)]
        again = [*self._rows("j"), self.tile.whole(), *indent(inner)]
        return ["if tl.load(settled_at) == 0:", *indent(again)]

    def _rows(self, side: str, sums: bool = True) -> list[str]:
        """Loads the tiles of one side, with what the forward kernel knew of each row if `sums`."""
        tile, p = self.tile, self.problem
        if side == "j":
            return [tile.rows("k", "k", p.k, "j"), tile.rows("v", "v", p.v, "j")]
        rows = [tile.rows("q", "q", p.q, "i"), tile.rows("grad", "grad", self.grad, "i")]
        return rows + (self._sums() if sums else [])

    def _sums(self) -> list[str]:
        if not self.softmax:
            return []
        where = f"mask={self.tile.inside('i')}, other=0.0"
        step = self.tile.frame.number("delta_m", self.delta.stride(-1))
        lines = [f"most = tl.load(lse_at + i * 2, {where})"]
        lines += [f"log_total = tl.load(lse_at + i * 2 + 1, {where})"]
        lines += [f"delta = tl.load(delta_at{offset([('i', step)], False)}, {where})"]
        if self.problem.skips:
            unsettled = f"{self.tile.inside('i')} & ~(most > {negligible(self.problem)})"
            lines.append(f"unsettled = {unsettled}")
        if self.problem.spec.safe:
            lines.append("most = tl.where(most == float('-inf'), 0.0, most)")
        return lines

    def _zeros(self) -> list[str]:
        lines = [
            f"d{name} = tl.zeros([{self.block}, {padded(int(x.shape[-1]))}], tl.float32)"
            for name, x in self.into.items()
            if name in ("q", "k", "v")
        ]
        return lines + [
            f"d{name} = tl.zeros([{self.block}], tl.float32)" for name in self.extras if self._summed(name)
        ]

    def _summed(self, name: str) -> bool:
        """Whether a gradient adds up over a program's loop."""
        return name[0] == "x" and self.problem.varies(name) != {"i", "j"}

    def _step(
        self, score: sympy.Basic, keep: sympy.Basic, twos: bool, more: str, positions: bool = True
    ) -> list[str]:
        """What a loop does with a tile: scores, their gradients, and all that follows from them."""
        tile, inner = self.tile, "j" if self.outer == "i" else "i"
        written = in_powers_of_two(score) if twos and self.softmax else score
        products = self._products(score)
        printer = tile.statements([written, keep, self.problem.weight, *products.values()])
        a, b = (("q", "k"), ("grad", "v")) if self.outer == "i" else (("k", "q"), ("v", "grad"))
        start = tile.next_positions() if positions else []
        return [
            *start,
            *self._rows(inner, sums=positions),
            f"s = {tile.dot(a[0], f'tl.trans({a[1]})')}",
            f"g = {tile.dot(b[0], f'tl.trans({b[1]})')}",
            *tile.loads(kept=False),
            *(tile.define(printer, "score", written) if self.softmax or self.outer == "j" else []),
            *mask(tile, printer, keep, queries=True, more=more),
            *self._of_scores(printer, twos),
            *self._of_values(),
            *self._of_all(printer, products),
        ]

    def _products(self, score: sympy.Basic) -> dict[sympy.Basic, sympy.Basic]:
        """The gradient of s, and by each wanted load of an extra, as expressions."""
        parts = [(score, _SCORE)] + ([(self.problem.weight, _WEIGHT)] if self.problem.spec.weight else [])
        loads = [load for expr, _ in parts for load in language.tables_in(expr)]
        by = [language.symbol(n) for n in self.extras if n[0] == "x"]
        by += [load for load in dict.fromkeys(loads) if type(load).__name__ in self.extras]
        found = {x: sympy.Add(*(language.times(g, _slope(e, x)) for e, g in parts)) for x in by}
        return {language.S: language.times(_SCORE, _slope(score, language.S))} | found

    def _of_scores(self, printer: Statements, twos: bool) -> list[str]:
        """Declares p, dscore and dweight."""
        if not self.softmax:
            p = ["p = tl.where(inside, score, 0.0)"] if self.outer == "j" else []
            return [*p, "dscore = tl.where(inside, g, 0.0)"]
        power = "tl.exp(score - most - log_total)"
        power = f"tl.exp2(score - (most + log_total) * {LOG2E!r})" if twos else power
        lines = [f"p = tl.where(inside, {power}, 0.0)"]
        weight, weighted = [], "g"
        if self.problem.spec.weight:
            lines += printer.define("weight", self.problem.weight)
            weight, weighted = ["dweight = p * g", "p = p * weight"], "g * weight"
        dscore = f"p * ({weighted} - delta)"
        # The delta of a row without keys may be NaN: not for the loop that leaves it out.
        dscore = f"tl.where(inside, {dscore}, 0.0)" if self.problem.skips else dscore
        return [*lines, f"dscore = {dscore}", *weight]

    def _of_values(self) -> list[str]:
        return [f"dv = {self.tile.dot(self.tile.narrow('p'), 'grad', 'dv')}"] if self.outer == "j" else []

    def _of_all(self, printer: Statements, products: Mapping[sympy.Basic, sympy.Basic]) -> list[str]:
        """Adds to the gradients of a program."""
        lines: list[str] = []
        values: dict[sympy.Basic, str] = {}
        to, rows = ("dq", "k") if self.outer == "i" else ("dk", "q")
        for by, product in products.items():
            name = "s" if by == language.S else str(getattr(by, "name", type(by).__name__))
            if product not in values:
                values[product] = f"grad_{name}"
                lines += self._defined(printer, values[product], product)
            value = values[product]
            if name == "s":
                lines.append(f"{to} = {self.tile.dot(self.tile.narrow(value), rows, to)}")
            elif name[0] == "T":
                lines += self._scattered(printer, by, name, value)
            else:
                lines.append(self._added(name, value))
        return lines

    def _defined(self, printer: Statements, name: str, product: sympy.Basic) -> list[str]:
        if product == 0:
            return [f"{name} = tl.zeros([{self.block}, {self.other}], tl.float32)"]
        lines, text = printer.value(product)
        factor = product.xreplace({_SCORE: sympy.Integer(1), _WEIGHT: sympy.Integer(1)})
        # Off the kept pairs a derivative may be infinite, and 0 * infinity is NaN.
        return [
            *lines,
            f"{name} = {bare(text)}" if factor.is_number else f"{name} = tl.where(inside, {bare(text)}, 0.0)",
        ]

    def _scattered(self, printer: Statements, by: sympy.Basic, name: str, value: str) -> list[str]:
        lines, index, fits = self.tile.index(printer, by)
        inside = f"inside & {fits}" if fits else "inside"
        at = f"d{name}_at + tl.broadcast_to({index}, [{self.block}, {self.other}])"
        return [*lines, f'tl.atomic_add({at}, {value}, mask={inside}, sem="relaxed")']

    def _added(self, name: str, value: str) -> str:
        x = self.into[name]
        if self._summed(name):
            return f"d{name} += tl.sum({value}, 1)"
        at, _ = self.tile.pair_address(f"d{name}", x, "ij")
        if is_shared(self.problem, name, x):
            return f'tl.atomic_add({at}, {value}, mask=inside, sem="relaxed")'
        return f"tl.store({at}, {value}, mask=inside)"

    def _stores(self) -> list[str]:
        return [line for name, x in self.into.items() for line in self._stored(name, x)]

    def _stored(self, name: str, x: Tensor) -> list[str]:
        many = "queries" if self.outer == "i" else "keys"
        if name in ("q", "k", "v"):
            at, inside = self.tile.row_address(f"d{name}", x, self.outer)
        elif not self._summed(name):
            return []
        elif not self.problem.varies(name):
            return [f'tl.atomic_add(d{name}_at, tl.sum(d{name}, 0), sem="relaxed")']
        else:
            step = self.tile.frame.stride(f"d{name}_{self.outer}", x, -2 if self.outer == "i" else -1)
            at, inside = (
                f"d{name}_at{offset([(many, step)], False)}",
                f"{many} < {self.tile.sizes[self.outer]}",
            )
        if is_shared(self.problem, name, x):
            return [f'tl.atomic_add({at}, d{name}, mask={inside}, sem="relaxed")']
        kind = TRITON.get(x.dtype, "tl.float32")
        return [f"tl.store({at}, d{name}.to({kind}), mask={inside})"]
