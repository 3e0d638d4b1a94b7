"""A sequence looked up and pooled by hand becomes a bag: masked positions are never read, rows never written out.

    e = embedding(W, ids[B, L])
    sum(e * m, 1), sum(where(m, e, 0), 1), bmm(m[B, 1, L], e), mean(e, 1), ... / (sum(m) + eps)
->
    y[b] = sum over l with m[b, l] of W[ids[b, l]]   / (count + eps)

and max(masked_fill(e, ~m, -inf), 1) the maximum over the same. A mask that is computed from ids, positions or lengths
is computed in the kernel (`positions.py`); any other is loaded. A multiplier that is no mask is a weight, and gets its
gradient.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.lowering.lookup.op import op_for
from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, arguments, register, same
from recompile.rewrite import replace as put

from .bags import check_table, table_name
from .pool_divisors import Pooled, Rows, absorb_division
from .positions import Reader

aten = torch.ops.aten
_MATMULS = (aten.bmm.default, aten.matmul.default)
LEAST = -1e8  # a maximum filled with this or less is one over the kept rows: tables hold no such numbers


@register
@dataclass(frozen=True)
class PoolSequences(Pass):
    """Rewrites hand-written pooling of a looked-up sequence (see the module)."""

    after = ("canonicalize",)
    before = ("fuse-lookups",)

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        effects = Effects(graph)
        for node in list(graph.nodes):
            pooled = None if node._erased or not node.users else find(node)
            if pooled is None:
                continue
            ctx.tried(self.name())
            builder = Builder(effects, pooled.root, self.name())
            try:
                _rewrite(pooled, builder)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or node)
            else:
                ctx.fired(self.name())
            builder.discard()


def find(node: fx.Node) -> Pooled | None:
    """What `node` pools, or None if it pools no looked-up sequence."""
    if node.target in _MATMULS:
        return _product(node)
    kinds = {
        aten.sum.dim_IntList: "sum",
        aten.mean.dim: "mean",
        aten.amax.default: "max",
        aten.max.dim: "max",
    }
    kind = kinds.get(node.target)  # type: ignore[call-overload]
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


def _rewrite(pooled: Pooled, builder: Builder) -> None:
    """Puts the bag in the place of what it computes."""
    lookup = pooled.rows.lookup
    table, ids = check_table(lookup), arg(lookup, 1)
    samples = tuple(axis for axis in pooled.rows.axes if axis.startswith("b"))
    reader = Reader(builder, tuple(sorted(samples)), ids.meta["val"].shape)
    row = reader.element(ids, (*sorted(samples), "l"))
    keep, weight = _masks(pooled, reader)
    if pooled.kind == "max":
        _check_max(pooled, weight, table)
    elif pooled.rows.fill:
        raise Refuse(f"masked positions are filled with {pooled.rows.fill}, not with zeros", pooled.root)
    if pooled.kind == "mean":
        pooled.divisor = scalar.symbol("L")
    elif pooled.kind == "sum" and weight is None:
        absorb_division(pooled, keep, reader)
    _check_unshared(pooled, builder.effects)
    loads, exprs = reader.numbered([row, *([] if weight is None else [weight]), keep], full=weight)
    for node in (table, *loads):
        if builder.effects.is_written(node):
            raise Refuse(f"{node.name}, which the lookup reads, is written in place", node)
    bag = Bag(
        0,
        tuple(range(len(loads))),
        "max" if pooled.kind == "max" else "sum",
        row=str(exprs[0]),
        keep=scalar.text(exprs[-1]),
        weight="" if weight is None else str(exprs[1]),
        count=pooled.count,
        divisor="" if pooled.divisor is None else str(pooled.divisor),
        frozen_row=int(arguments(lookup)["padding_idx"]),
        empty=str(pooled.rows.fill),
    )
    spec = Lookup(
        (Table(table_name(table), int(table.meta["val"].shape[1])),), (bag,), (Output("concat", (0,)),)
    )
    new = builder.call(op_for(table.meta["val"].device.type), [table], loads, str(spec))
    _put(pooled, builder.call(operator.getitem, new, 0), builder)


def _put(pooled: Pooled, new: fx.Node, builder: Builder) -> None:
    root = pooled.root
    if [axis for axis in pooled.axes if axis] != [*sorted(a for a in pooled.axes if a.startswith("b")), "d"]:
        raise Refuse("the pooled value has its columns before its samples", root)
    if new.meta["val"].dtype != root.meta["val"].dtype:
        raise Refuse("the pooled value has another dtype than its table's rows", root)
    if len(pooled.axes) > 2:
        new = builder.call(aten.reshape.default, new, list(root.meta["val"].shape))
    put((root,), new, builder)
    erase(root)


def _masks(pooled: Pooled, reader: Reader) -> tuple[sympy.Basic, sympy.Basic | None]:
    """(which positions are kept, the load that their rows are multiplied with)."""
    keep: Any = sympy.true
    weight = None
    for what, by, axes in pooled.rows.steps:
        found = reader.element(by, axes)
        if scalar.is_truth(found):
            keep = sympy.And(keep, sympy.Not(found) if what == "drop" else found)
        elif what == "weight" and weight is None and found.is_Symbol:
            weight = found
        else:
            raise Refuse(
                "the mask is no boolean" if what != "weight" else "the rows have several weights", by
            )
    return keep, weight


def _check_max(pooled: Pooled, weight: object, table: fx.Node) -> None:
    fill = pooled.rows.fill
    if weight is not None or (pooled.rows.steps and fill > LEAST):
        raise Refuse(
            "a maximum of rows that are multiplied, or masked with zeros, reads them all", pooled.root
        )
    learns = table.meta["val"].requires_grad and torch.is_grad_enabled()
    if pooled.root.target is aten.amax.default and learns:
        raise Refuse("amax shares its gradient among equal values, a bag gives it to the first", pooled.root)


def _check_unshared(pooled: Pooled, effects: Effects) -> None:
    """What becomes part of the bag is used for nothing else, and nothing is written between.

    Raises:
        Refuse: otherwise.
    """
    inside = [pooled.rows.lookup, *pooled.rows.inside, *pooled.inside]
    for node in inside:
        for user in node.users:
            if user is not pooled.root and user not in inside:
                raise Refuse(f"the looked-up rows are also used by {user.name}", pooled.rows.lookup)
        if (wall := effects.between(node, pooled.root)) is not None:
            raise Refuse(f"{wall.name} stands between the lookup and the pooling", wall)
