"""Table lookups over the same batch become one region op that writes straight into what consumes them.

    e0 = embedding(W0, x0); ...; e25 = embedding(W25, x25)
    y = cat([e0, ..., e25, dense], 1)
->
    y, = recompile.lookup([W0, ..., W25], [x0, ..., x25, dense], "...")

Lookups of one group do not depend on each other, and no wall of unknown effect stands between them. What
consumers want of them is found in `rows.py`: rows that something else reads become outputs of the op; sums over
the fields, and sums of their squares (a factorization machine's two terms), become outputs of their own.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from recompile.graph.order import depths, erase
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.lowering.lookup.op import op_for
from recompile.rewrite import Context, Effects, Pass, Refuse, register
from recompile.rewrite.effects import storages
from recompile.rewrite.sort import dependences, sort

from .bags import Found, find, table_name
from .rows import Group, Part, is_summed

aten = torch.ops.aten
ALONE = "nothing concatenates or sums the looked-up rows: Inductor reads them where they are used"


@register
@dataclass(frozen=True)
class FuseLookups(Pass):
    """Fuses lookups (see the module). `min_tables`: a group of fewer unpooled lookups is left to Inductor."""

    min_tables: int = 2
    after = ("canonicalize", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        effects = Effects(graph)
        found = list(self._find(graph, effects, ctx))
        depth = depths(dependences(graph, effects), [f.value for f in found])
        for members in _groups(found, effects, depth):
            few = f"fewer than {self.min_tables} lookups to fuse"
            if self._are_few(members):
                ctx.refuse(self.name(), few, members[0].value)
                continue
            try:
                ctx.begin(self.name(), members[0].value)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at)
                continue
            group = Group(members, effects, depth)
            group.grow()
            for alone in members:
                if alone not in group.members:
                    ctx.refuse(self.name(), ALONE, alone.value)
            if self._are_few(group.members):
                for alone in group.members:
                    ctx.refuse(self.name(), few, alone.value)
                continue
            _rewrite(graph, group)
            ctx.fired(self.name(), len(group.members))
        sort(graph, effects)

    def _are_few(self, members: Sequence[Found]) -> bool:
        return len(members) < self.min_tables and all(_is_one_id(f) for f in members)

    def _find(self, graph: fx.Graph, effects: Effects, ctx: Context) -> Iterator[Found]:
        for node in graph.nodes:
            try:
                found = find(node)
                if found is not None:
                    ctx.tried(self.name())
                    _check_unwritten(found, effects)
                    if found.is_sequence and not is_summed(found.value):
                        raise Refuse("an unpooled sequence is as fast under Inductor", found.value)
                    yield found
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at)


def _is_one_id(found: Found) -> bool:
    return found.bag.pooling == "none" and not found.is_sequence


def _check_unwritten(found: Found, effects: Effects) -> None:
    if effects.is_written(found.value):
        raise Refuse("the looked-up value is written in place", found.value)
    ends, seen, todo = {found.table, *found.sources}, set[fx.Node](), [found.value]
    while todo:
        node = todo.pop()
        if effects.is_written(node):
            raise Refuse(f"{node.name}, which the lookup reads, is written in place", found.value)
        seen.add(node)
        todo += [] if node in ends else [x for x in node.all_input_nodes if x not in seen]


def _groups(found: Sequence[Found], effects: Effects, depth: dict[fx.Node, int]) -> Iterator[list[Found]]:
    groups: dict[tuple[object, ...], list[Found]] = defaultdict(list)
    for f in found:
        groups[effects.region[f.value], depth[f.value], str(f.batch), f.device].append(f)
    yield from groups.values()


def _rewrite(graph: fx.Graph, group: Group) -> None:
    """Puts the op in, and hands its outputs to the users."""
    spec, tables, sources, places = _spec(group)
    last = graph.output_node()
    first = group.members[0].value

    def call(target: Any, *args: Any) -> fx.Node:
        with graph.inserting_before(last):
            node = graph.call_function(target, args)
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with tables[0].meta["val"].fake_mode:
            node.meta["val"] = target(*values)
        node.meta["stack_trace"] = first.meta.get("stack_trace")
        group.effects.adopt(node, first)
        group.effects.learn(node)
        group.depth[node] = group.depth[first]  # a later group may read it
        return node

    flat = [
        x if x.meta["val"].dim() <= 2 else call(aten.reshape.default, x, [-1, _per_sample(x)])
        for x in sources
    ]
    op = call(op_for(group.members[0].device.type), tables, flat, str(spec))
    outs: dict[int, fx.Node] = {}
    for node, k in places:
        if k not in outs:
            outs[k] = call(operator.getitem, op, k)
        shape, new = node.meta["val"].shape, outs[k]
        if str(tuple(shape)) != str(tuple(new.meta["val"].shape)):
            new = call(aten.view.default, new, [shape[0] if isinstance(shape[0], int) else -1, *shape[1:]])
        if node in group.sums and group.sums[node].divisor > 1:
            new = call(aten.div.Scalar, new, group.sums[node].divisor)
        node.replace_all_uses_with(new, delete_user_cb=lambda u: u not in group.rows)
    for node in (*group.sums, *reversed(group.rows)):
        erase(node)


def _per_sample(x: fx.Node) -> int:
    return math.prod(x.meta["val"].shape[1:])


def _spec(group: Group) -> tuple[Lookup, list[fx.Node], list[fx.Node], list[tuple[fx.Node, int]]]:
    """The group's spec, its tables, its sources, and which output each wanted node is."""
    tables: dict[fx.Node, int] = {}
    sources: dict[fx.Node, int] = {}
    bags: dict[Bag, int] = {}  # equal bags are read once
    number = {}
    for f in group.members:
        at = [sources.setdefault(s, len(sources)) for s in f.sources]
        offsets = at[f.bag.offsets] if f.bag.offsets >= 0 else -1
        table = tables.setdefault(f.table, len(tables))
        bag = replace(f.bag, table=table, loads=tuple(at[k] for k in f.bag.loads), offsets=offsets)
        number[id(f)] = bags.setdefault(bag, len(bags))

    def numbered(parts: Sequence[Part]) -> tuple[int, ...]:
        return tuple(
            number[id(p)] if isinstance(p, Found) else ~sources.setdefault(p, len(sources)) for p in parts
        )

    # Two nodes share an output only where eager's values share memory.
    outputs: dict[tuple[Output, tuple[int, ...]], int] = {}
    places = []
    wanted = [(rows, Output("concat", numbered(group.rows[rows]))) for rows in group.wanted()]
    wanted += [(total, Output(s.kind, numbered(s.parts), s.width)) for total, s in group.sums.items()]
    for node, out in wanted:
        places.append((node, outputs.setdefault((out, tuple(storages(node))), len(outputs))))
    named = tuple(Table(table_name(t), int(t.meta["val"].shape[1])) for t in tables)
    spec = Lookup(named, tuple(bags), tuple(out for out, _ in outputs))
    return spec, list(tables), list(sources), places
