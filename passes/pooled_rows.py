"""Finding what pools looked-up sequences by hand: a sum, mean, maximum or matrix product over their positions.

sum(mul(permute(embedding(W, ids), [0, 2, 1]), m), [2])        Rows of the embedding, axes (b0, d, l), weighted by m
sum(mul(cat([embedding(V, a), embedding(W, b)], 2), m), [1])   Rows of two parts side by side, each weighted by m
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from recompile.rewrite import Effects, arguments, same

from .ids import CASTS
from .pooled_steps import factor, steps
from .positions import Axes, after_view

aten = torch.ops.aten
_KINDS: dict[Any, str] = {
    aten.sum.dim_IntList: "sum",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
    aten.max.dim: "max",
}


@dataclass(frozen=True)
class Part:
    """A looked-up sequence, times `scale`, and the steps that it went through (`pooled_steps.py`), each by what."""

    lookup: fx.Node
    steps: tuple[tuple[str, fx.Node, Axes], ...] = ()
    scale: sympy.Expr = sympy.S.One


@dataclass(frozen=True)
class Rows:
    """Looked-up sequences side by side, or `added` up; `axes` of their dims."""

    parts: tuple[Part, ...]
    axes: Axes
    inside: tuple[fx.Node, ...]  # what is gone once they are bags
    fill: float = 0.0  # what masked positions hold
    added: bool = False

    @property
    def is_masked(self) -> bool:
        return any(part.steps for part in self.parts)

    def through(self, *nodes: fx.Node, **changed: Any) -> Rows:
        """These rows after `nodes`, which read nothing else that is pooled."""
        return replace(self, inside=(*self.inside, *nodes), **changed)

    def with_step(self, what: str, by: fx.Node, axes: Axes) -> tuple[Part, ...]:
        """The parts, each masked or weighted once more."""
        return tuple(replace(part, steps=(*part.steps, (what, by, axes))) for part in self.parts)


@dataclass
class Pooled:
    """`root` pools `rows` over the positions: a "sum", a "mean" or a "max"; `axes` are those of `root`."""

    root: fx.Node
    rows: Rows
    kind: str
    axes: Axes
    inside: list[fx.Node] = field(default_factory=list)


class Finder:
    """Finds the poolings in a graph, to whose nodes it is shown in order."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self._rows: dict[Any, Rows] = {}

    def find(self, node: fx.Node) -> Pooled | None:
        """What `node` pools, or None if it pools no looked-up sequence."""
        if node.op != "call_function" or not node.users:
            return None
        if (rows := self._trace(node)) is not None:
            self._rows[node] = rows
            return None
        if node.target in (aten.bmm.default, aten.matmul.default):
            return self._product(node)
        kind = _KINDS.get(node.target)
        rows = self._rows.get(node.args[0]) if kind is not None else None
        return None if rows is None else _reduced(node, rows, str(kind))

    def _product(self, node: fx.Node) -> Pooled | None:
        """`bmm(m[B, 1, L], rows)` or `bmm(rows transposed, m[B, L, 1])`."""
        for which in (0, 1):
            rows, other = self._rows.get(node.args[1 - which]), node.args[which]
            if rows is None or len(rows.axes) != 3 or not isinstance(other, fx.Node):
                continue
            shape, summed = other.meta["val"].shape, rows.axes[1 if which == 0 else 2]
            if summed != "l" or len(shape) != 3 or not same(shape[1 + which], 1):
                continue
            if not same(shape[0], node.args[1 - which].meta["val"].shape[0]):  # type: ignore[union-attr]
                continue  # `matmul` repeats the rows, or the weights, for each sample
            axes = ("b0", "", "l") if which == 0 else ("b0", "l", "")
            rows = replace(rows, parts=rows.with_step("weight", other, axes))
            return Pooled(node, rows, "sum", tuple("" if axis == "l" else axis for axis in rows.axes))
        return None

    def _trace(self, node: fx.Node) -> Rows | None:
        """The looked-up sequences that `node` is, masked or weighted position by position."""
        if node.target is aten.embedding.default:
            rank = node.meta["val"].dim()
            axes = (*(f"b{k}" for k in range(rank - 2)), "l", "d")
            return Rows((Part(node),), axes, (node,)) if rank > 2 else None
        if node.target is aten.cat.default:
            given = arguments(node)
            return self._joined(node, given["tensors"], given["dim"])
        if node.target is aten.add.Tensor and (rows := self._joined(node, node.args, None)) is not None:
            return rows
        rows = self._rows.get(node.args[0]) if node.args and isinstance(node.args[0], fx.Node) else None
        if rows is not None and node.target in CASTS:
            old, new = (x.meta["val"].dtype for x in (node.args[0], node))  # type: ignore[union-attr]
            return rows.through(node) if torch.promote_types(old, new) == new else None
        if rows is not None and (view := after_view(node, rows.axes)) is not None:
            return rows.through(node, axes=view) if "l" in view else None
        if rows is not None and (scale := factor(node)) is not None:
            return rows.through(
                node, parts=tuple(replace(part, scale=part.scale * scale) for part in rows.parts)
            )
        return self._masked(node)

    def _joined(self, node: fx.Node, of: Sequence[Any], dim: int | None) -> Rows | None:
        """Rows concatenated along their columns, the dim `dim`, or added up: the sum of `of` with no factor."""
        found = [self._rows.get(x) for x in of]
        if len(found) < 2 or None in found or (dim is None and node.kwargs):
            return None
        each: list[Rows] = found  # type: ignore[assignment]
        axes, added = each[0].axes, dim is None
        if any(rows.axes != axes or (len(rows.parts) > 1 and rows.added != added) for rows in each):
            return None
        if dim is None and not all(same(x.meta["val"].shape, node.meta["val"].shape) for x in of):
            return None
        fills = [rows.fill for rows in each if rows.is_masked] or [0.0]
        if len(set(fills)) > 1 or (dim is not None and axes[dim] != "d"):
            return None
        inside = dict.fromkeys(x for rows in each for x in rows.inside)
        return Rows(
            tuple(part for rows in each for part in rows.parts), axes, (*inside, node), fills[0], added
        )

    def _masked(self, node: fx.Node) -> Rows | None:
        for source, what, by, fill, zeros in steps(node):
            rows = self._rows.get(source)
            if rows is None or not same(node.meta["val"].shape, source.meta["val"].shape):
                continue
            if (rows.is_masked and fill != rows.fill) or any(map(self.effects.is_written, zeros)):
                return None
            axes = rows.axes[len(rows.axes) - by.meta["val"].dim() :]
            made = [x for x in zeros if source in x.all_input_nodes]
            return rows.through(*made, node, parts=rows.with_step(what, by, axes), fill=fill)
        return None


def _reduced(node: fx.Node, rows: Rows, kind: str) -> Pooled | None:
    """The pooling that a reduction of `rows` over the positions is."""
    given = arguments(node)
    dims = given["dim"] if isinstance(given["dim"], list) else [given["dim"]]
    if len(dims) != 1 or dims[0] is None or rows.axes[dims[0]] != "l":
        return None
    kept = ["" if axis == "l" else axis for axis in rows.axes if axis != "l" or given["keepdim"]]
    if node.target is not aten.max.dim:
        return Pooled(node, rows, kind, tuple(kept))
    values = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)
    return None if values is None else Pooled(values, rows, kind, tuple(kept), [node])
