"""A sequence looked up and pooled by hand becomes a bag: masked positions are never read, rows never written out.

    e = embedding(W, ids[B, L])
    sum(e * m, 1), sum(where(m, e, 0), 1), bmm(m[B, 1, L], e), mean(e, 1), ... / (sum(m) + eps)
->
    y[b] = sum over l with m[b, l] of W[ids[b, l]]   / (count + eps)

A mask that is a comparison of ids, or of positions with lengths, is evaluated in the kernel; any other boolean
`[B, L]` is loaded. A multiplier that is not a cast boolean is a weight, and gets its gradient.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.lowering.lookup.op import op_for
from recompile.rewrite import Context, Pass, Refuse, register

from .bags import check_table, ids_of, table_name
from .canonicalize import emit

aten = torch.ops.aten
_COMPARE = {
    aten.ne.Scalar: sympy.Ne,
    aten.eq.Scalar: sympy.Eq,
    aten.gt.Scalar: sympy.Gt,
    aten.ge.Scalar: sympy.Ge,
    aten.lt.Scalar: sympy.Lt,
    aten.le.Scalar: sympy.Le,
}
_COMPARE_TENSORS = {
    aten.lt.Tensor: sympy.Lt,
    aten.le.Tensor: sympy.Le,
    aten.gt.Tensor: sympy.Gt,
    aten.ge.Tensor: sympy.Ge,
}
_CASTS = (aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.other)


@dataclass(frozen=True)
class Pooled:
    """What a pooling node computes: the lookup, and what each row is multiplied with."""

    rows: fx.Node
    mask: fx.Node | None = None  # kept where true
    masked: fx.Node | None = None  # dropped where true
    mean: bool = False


@register
@dataclass(frozen=True)
class PoolSequences(Pass):
    """Rewrites hand-written pooling over dim 1 of a looked-up sequence (see the module)."""

    after = ("canonicalize",)
    before = ("fuse-lookups",)

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        for node in list(graph.nodes):
            pooled = None if node._erased else pooling(node)
            if pooled is None:
                continue
            ctx.tried(self.name())
            try:
                _rewrite(node, pooled)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at)
                continue
            ctx.fired(self.name())


def pooling(node: fx.Node) -> Pooled | None:
    """What `node` pools, or None if it pools no looked-up sequence."""
    if node.target is aten.bmm.default:
        mask, rows = arg(node, 0), arg(node, 1)
        one = mask.meta["val"].shape[1]
        return Pooled(rows, mask) if _is_lookup(rows) and isinstance(one, int) and one == 1 else None
    if node.target not in (aten.sum.dim_IntList, aten.mean.dim) or node.kwargs.get("dtype") is not None:
        return None
    x, dims = arg(node, 0), arg(node, 1)
    if x.meta["val"].dim() != 3 or list(dims) not in ([1], [-2]):
        return None
    mean = node.target is aten.mean.dim
    if _is_lookup(x):
        return Pooled(x, mean=mean)
    if x.target is aten.mul.Tensor:
        for rows, mask in (x.args, reversed(x.args)):
            if _is_lookup(rows) and isinstance(mask, fx.Node):
                return Pooled(rows, mask, mean=mean)
    if x.target is aten.masked_fill.Scalar and arg(x, 2) == 0 and _is_lookup(arg(x, 0)):
        return Pooled(arg(x, 0), masked=arg(x, 1), mean=mean)
    if x.target is aten.where.ScalarOther and arg(x, 2) == 0 and _is_lookup(arg(x, 1)):
        return Pooled(arg(x, 1), arg(x, 0), mean=mean)
    return None


def _is_lookup(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target is aten.embedding.default and node.meta["val"].dim() == 3


class _Loads:
    """The bag's loads while its mask is read off the graph: x0 the ids, x1, ... what else is needed."""

    def __init__(self, ids: fx.Node) -> None:
        self.nodes = [ids]

    def symbol(self, node: fx.Node) -> sympy.Symbol:
        if node not in self.nodes:
            self.nodes.append(node)
        return scalar.symbol(f"x{self.nodes.index(node)}")

    def number(self, node: fx.Node) -> sympy.Basic:
        """An integer tensor `[B, L]` (or `[B, 1]`, `[L]`) at (b, l)."""
        if _is_positions(node):
            return scalar.symbol("l")
        if node.meta["val"].dim() != 2:
            raise Refuse("the mask compares something that is not [B, L]", node)
        base, expr = ids_of(node)
        return expr.subs(scalar.symbol("x0"), self.symbol(base))

    def mask(self, node: fx.Node, length: object) -> sympy.Basic:
        """A boolean as an expression; `[B, L]`, `[B, L, 1]` or `[B, 1, L]`."""
        if node.target in _CASTS and isinstance(arg(node, 0), fx.Node):
            return self.mask(arg(node, 0), length)
        if node.target is aten.unsqueeze.default:
            return self.mask(arg(node, 0), length)
        if node.target in (aten.logical_not.default, aten.bitwise_not.default):
            return sympy.Not(self.mask(arg(node, 0), length))
        if node.target in (aten.logical_and.default, aten.bitwise_and.Tensor):
            return sympy.And(*(self.mask(arg(node, k), length) for k in (0, 1)))
        if node.meta["val"].dtype is not torch.bool:
            raise Refuse("the multiplier is not a boolean", node)
        if node.target in _COMPARE and isinstance(arg(node, 1), int) and not isinstance(arg(node, 1), bool):
            return _COMPARE[node.target](self.number(arg(node, 0)), arg(node, 1))
        if node.target in _COMPARE_TENSORS:
            return _COMPARE_TENSORS[node.target](*(self.number(arg(node, k)) for k in (0, 1)))
        if node.meta["val"].dim() == 2:
            return sympy.Ne(self.symbol(node), 0)
        raise Refuse("the mask is not [B, L]", node)


def _is_positions(node: fx.Node) -> bool:
    """`arange(L)`, with or without leading dims of size 1."""
    while node.target is aten.unsqueeze.default:
        node = arg(node, 0)
    if node.target in (aten.arange.default,):
        return True
    return node.target is aten.arange.start and arg(node, 0) == 0


def _rewrite(node: fx.Node, pooled: Pooled) -> None:
    rows = pooled.rows
    if len(rows.users) != 1:
        other = next((u for u in rows.users if u is not node and node not in u.users), next(iter(rows.users)))
        raise Refuse(f"the looked-up rows are also used by {other.name}", rows)
    table = check_table(rows)
    ids, row = ids_of(arg(rows, 1))
    loads, keep, weight = _Loads(ids), sympy.true, ""
    length = rows.meta["val"].shape[1]
    if pooled.masked is not None:
        keep = sympy.Not(loads.mask(pooled.masked, length))
    elif pooled.mask is not None:
        keep, weight = _mask_or_weight(pooled, loads, length, node)
    divisor, root = ("L", node) if pooled.mean else _division(node, keep, loads, length, weight)
    padding = arg(rows, 2, rows.kwargs.get("padding_idx", -1))
    bag = Bag(
        0,
        tuple(range(len(loads.nodes))),
        "sum",
        row=str(row),
        keep=str(keep).lower() if keep in (sympy.true, sympy.false) else str(keep),
        weight=weight,
        divisor=divisor,
        frozen_row=padding,
    )
    spec = Lookup(
        (Table(table_name(table), int(table.meta["val"].shape[1])),), (bag,), (Output("concat", (0,)),)
    )
    target = op_for(table.meta["val"].device.type)
    op = emit(root, target, [table], loads.nodes, str(spec))
    new = emit(root, operator.getitem, op, 0)
    shape = root.meta["val"].shape
    if len(shape) == 3:
        new = emit(root, aten.unsqueeze.default, new, 1)
    if new.meta["val"].dtype != root.meta["val"].dtype or str(new.meta["val"].shape) != str(shape):
        raise Refuse("the pooled value has another shape or dtype than its table's rows", root)
    root.replace_all_uses_with(new)
    erase(root)


def _mask_or_weight(pooled: Pooled, loads: _Loads, length: object, node: fx.Node) -> tuple[sympy.Basic, str]:
    mask = pooled.mask
    assert mask is not None
    wide = mask.meta["val"].shape
    singles = 1 if node.target is aten.bmm.default else 2
    if len(wide) != 3 or not isinstance(wide[singles], int) or wide[singles] != 1:
        raise Refuse("the multiplier differs from column to column, or over the batch", mask)
    try:
        return loads.mask(mask, length), ""
    except Refuse:
        if str(wide[0]) != str(pooled.rows.meta["val"].shape[0]) or str(wide[3 - singles]) != str(length):
            raise
    loads.nodes[1:] = [emit(node, aten.select.int, mask, singles, 0)]
    return sympy.true, "x1"


def _division(
    node: fx.Node, keep: sympy.Basic, loads: _Loads, length: object, weight: str
) -> tuple[str, fx.Node]:
    """(divisor, the node that divides) where the sum's only user divides it by the number of kept positions."""
    total, user = node, next(iter(node.users)) if len(node.users) == 1 else None
    if user is not None and user.target is aten.squeeze.dim and len(user.users) == 1:
        total, user = user, next(iter(user.users))
    if user is None or weight or user.target is not aten.div.Tensor or arg(user, 0) is not total:
        return "", node
    divisor = arg(user, 1)
    if not isinstance(divisor, fx.Node):
        return "", node
    expr = _count(divisor, keep, loads, length)
    if expr is None or user.meta["val"].shape != total.meta["val"].shape:
        return "", node
    return str(expr), user


def _count(node: fx.Node, keep: sympy.Basic, loads: _Loads, length: object) -> sympy.Basic | None:
    """`node` as an expression of the number of kept positions, or None."""
    number = arg(node, 1, None)
    if node.target in (aten.add.Tensor, aten.add.Scalar) and isinstance(number, int | float):
        inner = _count(arg(node, 0), keep, loads, length)
        return None if inner is None else inner + number
    low = number if number is not None else node.kwargs.get("min")
    if node.target in (aten.clamp.default, aten.clamp_min.default) and isinstance(low, int | float):
        if len(node.args) > 2 or "max" in node.kwargs:
            return None
        inner = _count(arg(node, 0), keep, loads, length)
        return None if inner is None else sympy.Max(inner, low)
    if node.target in _CASTS or node.target is aten.unsqueeze.default:
        return _count(arg(node, 0), keep, loads, length)
    if node.target is not aten.sum.dim_IntList or len(number) != 1:
        return None
    known = len(loads.nodes)
    counted = arg(node, 0)
    try:
        same = loads.mask(counted, length) == keep
    except Refuse:
        same = False
    del loads.nodes[known:]
    shape = counted.meta["val"].shape
    over = str(shape[number[0]]) == str(length)
    return scalar.symbol("count") if same and over else None
