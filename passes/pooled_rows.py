"""Finding what pools a looked-up sequence by hand: a sum, mean, maximum or matrix product over its positions.

sum(mul(permute(embedding(W, ids), [0, 2, 1]), m), [2])      Rows of the embedding, axes (b0, d, l), weighted by m
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.rewrite import arguments, same

from .positions import Axes

aten = torch.ops.aten
_KINDS: dict[Any, str] = {
    aten.sum.dim_IntList: "sum",
    aten.mean.dim: "mean",
    aten.amax.default: "max",
    aten.max.dim: "max",
}


@dataclass(frozen=True)
class Rows:
    """A looked-up sequence, `axes` of its dims, and what it went through: "weight", "keep", "drop" and of what."""

    lookup: fx.Node
    axes: Axes
    steps: tuple[tuple[str, fx.Node, Axes], ...] = ()
    inside: tuple[fx.Node, ...] = ()  # what is gone once the sequence is a bag
    fill: float = 0.0  # what masked positions hold


@dataclass
class Pooled:
    """`root` pools `rows` over the positions: a "sum", a "mean" or a "max"; `axes` are those of `root`."""

    root: fx.Node
    rows: Rows
    kind: str
    axes: Axes
    inside: list[fx.Node] = field(default_factory=list)
    divisor: sympy.Basic | None = None
    count: str = ""


def find(node: fx.Node) -> Pooled | None:
    """What `node` pools, or None if it pools no looked-up sequence."""
    if node.target in (aten.bmm.default, aten.matmul.default):
        return _product(node)
    kind = _KINDS.get(node.target)
    if kind is None:
        return None
    given = arguments(node)
    rows = _trace(given["self"])
    dims = given["dim"] if isinstance(given["dim"], list) else [given["dim"]]
    if rows is None or len(dims) != 1 or rows.axes[dims[0]] != "l" or given.get("dtype") is not None:
        return None
    axes = tuple("" if axis == "l" else axis for axis in rows.axes if axis != "l" or given["keepdim"])
    if node.target is not aten.max.dim:
        return Pooled(node, rows, kind, axes)
    values = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), None)
    return None if values is None else Pooled(values, rows, kind, axes, [node])


def _product(node: fx.Node) -> Pooled | None:
    """`bmm(m[B, 1, L], rows)` or `bmm(rows transposed, m[B, L, 1])`."""
    for which in (0, 1):
        rows, other = _trace(node.args[1 - which]), node.args[which]
        if rows is None or len(rows.axes) != 3 or not isinstance(other, fx.Node):
            continue
        shape, summed = other.meta["val"].shape, rows.axes[1 if which == 0 else 2]
        if summed != "l" or len(shape) != 3 or not same(shape[1 + which], 1):
            continue
        axes = ("b0", "", "l") if which == 0 else ("b0", "l", "")
        rows = replace(rows, steps=(*rows.steps, ("weight", other, axes)))
        return Pooled(node, rows, "sum", tuple("" if axis == "l" else axis for axis in rows.axes))
    return None


def _trace(node: Any) -> Rows | None:
    """The looked-up sequence that `node` is, masked or weighted position by position."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target is aten.embedding.default:
        rank = node.meta["val"].dim()
        samples = tuple(f"b{k}" for k in range(rank - 2))
        return Rows(node, (*samples, "l", "d")) if rank > 2 else None
    if node.target is aten.permute.default:
        rows = _trace(node.args[0])
        order = arguments(node)["dims"]
        return rows and replace(rows, axes=tuple(rows.axes[k] for k in order), inside=(*rows.inside, node))
    for rows, what, by, fill in _steps(node):
        traced = _trace(rows)
        if traced is None or not same(node.meta["val"].shape, rows.meta["val"].shape):
            continue
        if traced.steps and fill != traced.fill:
            return None
        axes = traced.axes[len(traced.axes) - by.meta["val"].dim() :]
        zeros = [x for x in node.args[2:] if isinstance(x, fx.Node) and rows in x.all_input_nodes]
        inside = (*traced.inside, *zeros, node)
        return replace(traced, steps=(*traced.steps, (what, by, axes)), inside=inside, fill=fill)
    return None


def _steps(node: fx.Node) -> Iterator[tuple[Any, str, fx.Node, float]]:
    """How `node` may mask or weight something: that, "weight", "keep" or "drop", by what, filling with what."""
    target, args = node.target, node.args
    found: list[tuple[Any, str, Any, Any]] = []
    if target is aten.mul.Tensor:
        found = [(args[0], "weight", args[1], 0), (args[1], "weight", args[0], 0)]
    elif target is aten.masked_fill.Scalar:
        found = [(args[0], "drop", args[1], args[2])]
    elif target is aten.where.ScalarOther:
        found = [(args[1], "keep", args[0], args[2])]
    elif target is aten.where.self:
        found = [(args[1], "keep", args[0], _constant(args[2]))]
    elif target is aten.sub.Tensor and isinstance(args[1], fx.Node) and args[1].target is aten.mul.Tensor:
        mask, large = args[1].args  # e - (1 - m) * 1e9
        found = [(args[0], "drop", mask, -large)] if isinstance(large, int | float) else []
    for rows, what, by, fill in found:
        if isinstance(by, fx.Node) and isinstance(fill, int | float):
            yield rows, what, by, float(fill)


def _constant(node: Any) -> float | None:
    """The number that fills all of `node`."""
    if not isinstance(node, fx.Node):
        return None
    if node.target in (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
        return 0.0
    filled = node.target in (aten.full.default, aten.full_like.default, aten.scalar_tensor.default)
    value = arg(node, 0 if node.target is aten.scalar_tensor.default else 1) if filled else None
    return value if isinstance(value, int | float) else None
