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
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.lowering.lookup.op import op_for
from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, arguments, register, replace

from .bags import check_table, table_name
from .pool_divisors import absorb_division
from .pooled_rows import Pooled, find
from .positions import Reader

aten = torch.ops.aten
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
                ctx.begin(self.name(), pooled.root)
                _rewrite(pooled, builder)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or node)
            else:
                ctx.fired(self.name())
            builder.discard()


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
        raise Refuse("the pooled rows are laid out [columns, samples], not [samples, columns]", root)
    if new.meta["val"].dtype != root.meta["val"].dtype:
        raise Refuse("the pooled value has another dtype than its table's rows", root)
    if len(pooled.axes) > 2:
        new = builder.call(aten.reshape.default, new, list(root.meta["val"].shape))
    replace((root,), new, builder)
    erase(root)


def _masks(pooled: Pooled, reader: Reader) -> tuple[sympy.Basic, sympy.Basic | None]:
    """(which positions are kept, the load that their rows are multiplied with)."""
    keep: Any = sympy.true
    weight = None
    for what, by, axes in pooled.rows.steps:
        found = reader.element(by, axes)
        if scalar.is_truth(found):
            keep = sympy.And(keep, sympy.Not(found) if what == "drop" else found)
        elif what == "weight" and weight is None:
            weight = found if found.is_Symbol else reader.loaded(by, axes)
        elif what == "weight":
            raise Refuse("the rows have several weights", by)
        else:
            raise Refuse("the mask holds numbers, not true and false", by)
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
