"""A sequence looked up and pooled by hand becomes a bag: masked positions are never read, rows never written out.

    e = embedding(W, ids[B, L])
    sum(e * m, 1), sum(where(m, e, 0), 1), bmm(m[B, 1, L], e), mean(e, 1), ... / (sum(m) + eps)
->
    y[b] = sum over l with m[b, l] of W[ids[b, l]]   / (count + eps)

and max(masked_fill(e, ~m, -inf), 1) the maximum over the same. A mask that is computed from ids, positions or lengths
is computed in the kernel (`positions.py`); any other is loaded. A multiplier that is no mask is a weight, and gets its
gradient. Sequences side by side, or added up, become a bag each.

First every pooling is planned. What reads looked-up rows beside a pooling keeps them from going away, so that a plan
is made true only if all readers of its rows are plans that are.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.lowering.lookup.op import op_for
from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, arguments, register, replace, same
from recompile.rewrite.schema import is_size

from .bags import check_table, table_name
from .computed import learns
from .pool_divisors import Division, find_division
from .pooled_rows import Finder, Part, Pooled
from .pooled_steps import LEAST
from .positions import Reader

aten = torch.ops.aten
_HALVES = (torch.bfloat16, torch.float16)


@register
@dataclass(frozen=True)
class PoolSequences(Pass):
    """Rewrites hand-written pooling of looked-up sequences (see the module)."""

    after = ("canonicalize",)
    before = ("fuse-lookups",)

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        effects = Effects(graph)
        finder = Finder(effects)
        plans: list[_Plan] = []
        for node in list(graph.nodes):
            if (pooled := finder.find(node)) is None:
                continue
            ctx.tried(self.name())
            builder = Builder(effects, pooled.root, self.name())
            try:
                plans.append(_plan(pooled, builder))
            except Refuse as refusal:
                builder.discard()
                ctx.refuse(self.name(), refusal.why, refusal.at or node)
        while (shared := _shared(plans)) is not None:
            plan, user = shared
            plans.remove(plan)
            plan.builder.discard()
            why = f"the looked-up rows are also used by {user.name}"
            ctx.refuse(self.name(), why, plan.inside[0])
        for plan in plans:
            try:
                ctx.begin(self.name(), plan.root)
                replace((plan.root,), plan.new, plan.builder)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or plan.root)
            else:
                erase(plan.root)
                ctx.fired(self.name())
            plan.builder.discard()


@dataclass
class _Plan:
    """`new` may take the place of `root`; `inside` is what is gone then, if nothing else reads it."""

    root: fx.Node
    new: fx.Node
    inside: tuple[fx.Node, ...]
    builder: Builder


@dataclass(frozen=True)
class _Read:
    """What is pooled of one part: which rows, which of them are kept, the load that they are multiplied with."""

    part: Part
    reader: Reader
    row: sympy.Basic
    keep: sympy.Basic
    weight: sympy.Basic | None


def _plan(pooled: Pooled, builder: Builder) -> _Plan:
    """The bags of a pooling, in the graph but with no user yet."""
    if "d" not in pooled.axes:
        raise Refuse("the rows have one column: Inductor pools them as fast or faster", pooled.root)
    if same(arg(pooled.rows.parts[0].lookup, 1).meta["val"].shape[-1], 0):
        raise Refuse("there are no positions to pool", pooled.root)
    rows, reads = pooled.rows, [_read(part, builder) for part in pooled.rows.parts]
    if pooled.kind == "max":
        _check_max(pooled, reads)
    elif rows.fill:
        raise Refuse(f"masked positions are filled with {rows.fill}, not with zeros", pooled.root)
    division = _division(pooled, reads)
    root, inside = division.root, (*rows.inside, *pooled.inside, *division.inside)
    for node in inside:
        if (wall := builder.effects.between(node, root)) is not None:
            raise Refuse(f"{wall.name} stands between the lookup and the pooling", wall)
    held = [axis for axis in division.axes if axis]  # what else there was has size 1
    if held != [axis for axis in (*reads[0].reader.samples, "d") if axis in held]:
        raise Refuse("the pooled rows are laid out [columns, samples], not [samples, columns]", root)
    bags = [_bag(read, pooled, division, builder) for read in reads]
    if rows.added:
        new = reduce(lambda a, b: builder.call(aten.add.Tensor, a, b), bags)
    else:
        new = bags[0] if len(bags) == 1 else builder.call(aten.cat.default, bags, 1)
    shape = root.meta["val"].shape
    if not same(new.meta["val"].shape, shape):
        new = builder.call(aten.reshape.default, new, list(shape))
    return _Plan(root, new, inside, builder)


def _division(pooled: Pooled, reads: Sequence[_Read]) -> Division:
    """What the pooled rows are divided by, and where."""
    divisor = scalar.symbol("L") if pooled.kind == "mean" else sympy.Integer(1)
    if pooled.kind == "sum" and all(read.weight is None for read in reads):
        found = [find_division(pooled, read.part.lookup, read.keep, read.reader) for read in reads]
        if found[0] is not None and all(division is not None for division in found):
            return found[0]  # one node divides all of them, by what each counts alike
    return Division(pooled.root, pooled.axes, divisor)


def _read(part: Part, builder: Builder) -> _Read:
    ids = arg(part.lookup, 1)
    shape = ids.meta["val"].shape
    reader = Reader(builder, tuple(f"b{k}" for k in range(len(shape) - 1)), shape)
    row = reader.element(ids, (*reader.samples, "l"))
    keep: Any = sympy.true
    weight = None
    for what, by, axes in part.steps:
        found = reader.element(by, axes)
        if scalar.is_truth(found):
            keep = sympy.And(keep, sympy.Not(found) if what in ("drop", "lower") else found)
        elif what == "weight" and weight is None:
            weight = found if found.is_Symbol else reader.loaded(by, axes)
        elif what == "weight":
            raise Refuse("the rows have several weights", by)
        else:
            raise Refuse("the mask holds numbers, not true and false", by)
    return _Read(part, reader, row, keep, weight)


def _bag(read: _Read, pooled: Pooled, division: Division, builder: Builder) -> fx.Node:
    """The bag `[B, columns]` of one part, of the dtype of the pooled value."""
    lookup, root = read.part.lookup, division.root
    table = check_table(lookup, arg(lookup, 0))
    held, wanted = table.meta["val"].dtype, root.meta["val"].dtype
    if held != wanted and not (held in _HALVES and wanted == torch.float32):
        raise Refuse("the pooled value has another dtype than its table's rows", root)
    weights = [] if read.weight is None else [read.weight]
    loads, exprs = read.reader.numbered([read.row, *weights, read.keep], full=read.weight)
    for node in (table, *loads):
        if builder.effects.is_written(node):
            raise Refuse(f"{node.name}, which the lookup reads, is written in place", node)
    over = division.divisor / read.part.scale
    bag = Bag(
        0,
        tuple(range(len(loads))),
        "max" if pooled.kind == "max" else "sum",
        row=scalar.text(exprs[0]),
        keep=scalar.text(exprs[-1]),
        weight="" if read.weight is None else str(exprs[1]),
        count=division.count,
        divisor="" if over == 1 else scalar.text(over),
        frozen_row=int(arguments(lookup)["padding_idx"]),
        empty=str(pooled.rows.fill),
        dtype="" if held == wanted else "float32",
    )
    spec = Lookup(
        (Table(table_name(table), int(table.meta["val"].shape[1])),), (bag,), (Output("concat", (0,)),)
    )
    new = builder.call(op_for(table.meta["val"].device.type), [table], loads, str(spec))
    return builder.call(operator.getitem, new, 0)


def _check_max(pooled: Pooled, reads: Sequence[_Read]) -> None:
    rows = pooled.rows
    multiplied = any(read.weight is not None or read.part.scale != 1 for read in reads)
    if multiplied or (rows.is_masked and rows.fill > LEAST):
        raise Refuse(
            "a maximum of rows that are multiplied, or masked with zeros, reads them all", pooled.root
        )
    if rows.added:
        raise Refuse("a maximum of sums is no sum of maxima", pooled.root)
    tables = [check_table(part.lookup, arg(part.lookup, 0)) for part in rows.parts]
    if not any(map(learns, tables)):
        return
    if any(what == "lower" and not _is_frozen(read) for read in reads for what, *_ in read.part.steps):
        raise Refuse(
            "a sample whose positions are all masked learns from its lowered rows, and would not from a bag",
            pooled.root,
        )
    if pooled.root.target is aten.amax.default:
        raise Refuse("amax shares its gradient among equal values, a bag gives it to the first", pooled.root)


def _is_frozen(read: _Read) -> bool:
    """Whether the positions that are not kept are those of the padding row, which learns nothing."""
    row = int(arguments(read.part.lookup)["padding_idx"])
    return row >= 0 and bool(read.keep == sympy.Ne(read.row, row))


def _shared(plans: Sequence[_Plan]) -> tuple[_Plan, fx.Node] | None:
    """A plan whose rows stay, since a node reads them that no plan takes away; and that node."""
    gone = {node for plan in plans for node in (*plan.inside, plan.root)}
    for plan in plans:
        for node in plan.inside:
            for user in node.users:
                if user not in gone and not is_size(user):
                    return plan, user
    return None
