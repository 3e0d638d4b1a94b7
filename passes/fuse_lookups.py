"""Table lookups over the same batch become one region op that writes straight into what consumes them.

    e0 = embedding(W0, x0); ...; e25 = embedding(W25, x25)
    y = cat([e0, ..., e25, dense], 1)
->
    y, = recompile.lookup([W0, ..., W25], [x0, ..., x25, dense], "...")

What consumers want of a group is followed through reshapes and concatenations as *rows*: values whose sample b is
certain bags side by side. Rows that something else reads become outputs of the op; sums over the fields, and sums of
their squares (a factorization machine's two terms), become outputs of their own.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from recompile.graph.order import depths, erase, segments, sort
from recompile.graph.walls import is_wall
from recompile.lowering.lookup import Bag, Lookup, Output, Table
from recompile.rewrite import Context, Pass, Refuse, register

from .bags import Found, find, table_name

aten = torch.ops.aten
RESHAPES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.flatten.using_ints,
)
Part = Found | fx.Node  # a bag, or a value to copy


@dataclass
class Group:
    """Lookups that become one op, and what is wanted of them."""

    members: list[Found]
    rows: dict[fx.Node, tuple[Part, ...]] = field(default_factory=dict)
    sums: dict[fx.Node, tuple[str, fx.Node]] = field(
        default_factory=dict
    )  # the sum -> its kind, the rows summed


@register
@dataclass(frozen=True)
class FuseLookups(Pass):
    """Fuses lookups (see the module). `min_tables`: a group of fewer unpooled lookups is left to Inductor."""

    min_tables: int = 2
    after = ("canonicalize", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        found = list(self._find(graph, ctx))
        ctx.tried(self.name(), len(found))
        segment = segments(graph)
        depth = depths(graph, [f.value for f in found])
        for members in _groups(found, segment, depth):
            if len(members) < self.min_tables and all(f.bag.pooling == "none" for f in members):
                ctx.refuse(self.name(), f"fewer than {self.min_tables} lookups to fuse", members[0].value)
                continue
            group = Group(members)
            _grow(group, segment, depth)
            if _written(group):
                ctx.refuse(self.name(), "a looked-up value is written in place", _written(group))
                continue
            _rewrite(graph, group, segment)
            ctx.fired(self.name(), len(members))
        sort(graph, segment)

    def _find(self, graph: fx.Graph, ctx: Context) -> Iterator[Found]:
        for node in graph.nodes:
            try:
                found = find(node)
            except Refuse as refusal:
                ctx.tried(self.name())
                ctx.refuse(self.name(), refusal.why, refusal.at)
                continue
            if found is not None:
                yield found


def _groups(
    found: Sequence[Found], segment: dict[fx.Node, int], depth: dict[fx.Node, int]
) -> Iterator[list[Found]]:
    groups: dict[tuple[object, ...], list[Found]] = defaultdict(list)
    for f in found:
        groups[segment[f.value], depth[f.value], str(f.batch)].append(f)
    yield from groups.values()


def _grow(group: Group, segment: dict[fx.Node, int], depth: dict[fx.Node, int]) -> None:
    """Finds the rows and sums that start from the members."""
    first = group.members[0].value
    here, deep = segment[first], depth[first]
    for f in group.members:
        group.rows[f.value] = (f,)
    todo = [f.value for f in group.members]
    while todo:
        for user in todo.pop().users:
            if user in group.rows or segment.get(user) != here or depth[user] != deep:
                continue
            parts = _rows(user, group, depth, deep)
            if parts:
                group.rows[user] = parts
                todo.append(user)
    for rows in list(group.rows):
        for user in rows.users:
            _add_sum(group, user, rows, here, segment)


def _rows(user: fx.Node, group: Group, depth: dict[fx.Node, int], deep: int) -> tuple[Part, ...]:
    """The parts of `user`, if each of its samples is parts of the group side by side; else ()."""
    if user.target in RESHAPES:
        source = user.args[0]
        same = str(user.meta["val"].shape[:1]) == str(source.meta["val"].shape[:1])  # type: ignore[union-attr]
        return group.rows[source] if same else ()  # type: ignore[index]
    if user.target is not aten.cat.default:
        return ()
    inputs: list[fx.Node] = user.args[0]  # type: ignore[assignment]
    dim = user.args[1] if len(user.args) > 1 else 0
    shape = user.meta["val"].shape
    dim = dim % len(shape)  # type: ignore[operator]
    if dim == 0 or any(s != 1 for s in shape[1:dim]):
        return ()
    parts: list[Part] = []
    for x in inputs:
        if x in group.rows:
            parts += group.rows[x]
        elif depth[x] < deep and x.meta["val"].dim() == len(shape) and _copyable(x):
            parts.append(x)
        else:
            return ()
    return tuple(parts)


def _copyable(x: fx.Node) -> bool:
    val = x.meta["val"]
    return val.is_floating_point() and all(isinstance(s, int) for s in val.shape[1:])


def _add_sum(group: Group, user: fx.Node, rows: fx.Node, here: int, segment: dict[fx.Node, int]) -> None:
    kind, total = "sum", user
    if _is_square(user) and len(user.users) == 1:
        kind, total = "sum_of_squares", next(iter(user.users))
    if segment.get(total) != here or not _sums_fields(total, rows):
        return
    width = _summed_width(total, rows)
    for part in group.rows[rows]:
        if isinstance(part, fx.Node) or part.table.meta["val"].shape[1] % width:
            return
        if kind == "sum_of_squares" and part.bag.pooling != "none":
            return
    group.sums[total] = (kind, rows)


def _is_square(node: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return node.args[1] == 2
    return node.target is aten.square.default or (
        node.target is aten.mul.Tensor and node.args[0] is node.args[1]
    )


def _sums_fields(node: fx.Node, rows: fx.Node) -> bool:
    """Whether `node` sums dim F of `[B, 1, ..., F, ...]`, in the dtype of its input."""
    if node.target is not aten.sum.dim_IntList or node.kwargs.get("dtype") is not None:
        return False
    val, dims = rows.meta["val"], node.args[1]
    if val.dim() < 2 or len(dims) != 1 or not all(isinstance(s, int) for s in val.shape[1:]):  # type: ignore[arg-type]
        return False
    dim = dims[0] % val.dim()  # type: ignore[index,operator]
    return dim >= 1 and all(s == 1 for s in val.shape[1:dim]) and node.meta["val"].dtype == val.dtype


def _summed_width(node: fx.Node, rows: fx.Node) -> int:
    """Columns of a sample of the sum."""
    val = rows.meta["val"]
    return math.prod(val.shape[node.args[1][0] % val.dim() + 1 :])  # type: ignore[index,operator]


def _written(group: Group) -> fx.Node | None:
    """A user that writes into the rows: then their storage matters, and they stay apart."""
    return next((rows for rows in group.rows for user in rows.users if is_wall(user)), None)


def _rewrite(graph: fx.Graph, group: Group, segment: dict[fx.Node, int]) -> None:
    """Puts the op in, and hands its outputs to the users."""
    squares = {
        s
        for total, (kind, _) in group.sums.items()
        if kind == "sum_of_squares"
        for s in total.all_input_nodes
    }
    wanted = [
        rows
        for rows in group.rows
        if any(u not in group.rows and u not in group.sums and u not in squares for u in rows.users)
    ]
    spec, tables, sources, places = _spec(group, wanted)
    last = next(reversed(graph.nodes))
    here = segment[group.members[0].value]
    line = group.members[0].value.meta.get("stack_trace")

    def call(target: object, *args: object) -> fx.Node:
        with graph.inserting_before(last):
            node = graph.call_function(target, args)  # type: ignore[arg-type]
        values = fx.node.map_arg(args, lambda n: n.meta["val"])
        with tables[0].meta["val"].fake_mode:
            node.meta["val"] = target(*values)  # type: ignore[operator]
        node.meta["stack_trace"] = line
        segment[node] = here
        return node

    flat = [
        x
        if x.meta["val"].dim() <= 2 or k not in places.copies
        else call(aten.reshape.default, x, [-1, _per_sample(x)])
        for k, x in enumerate(sources)
    ]
    op = call(torch.ops.recompile.lookup.default, tables, flat, str(spec))
    outs: dict[int, fx.Node] = {}
    for node, k in places.outputs:
        if k not in outs:
            outs[k] = call(operator.getitem, op, k)
        shape = node.meta["val"].shape
        new = outs[k]
        if str(tuple(shape)) != str(tuple(new.meta["val"].shape)):
            new = call(aten.view.default, new, [shape[0] if isinstance(shape[0], int) else -1, *shape[1:]])
        node.replace_all_uses_with(new, delete_user_cb=lambda u: u not in group.rows)
    for total in group.sums:
        erase(total)
    for rows in reversed(list(group.rows)):
        erase(rows)


def _per_sample(x: fx.Node) -> int:
    return math.prod(x.meta["val"].shape[1:])


@dataclass
class Places:
    """Where each wanted node is found among the op's outputs, and which sources are copied."""

    outputs: list[tuple[fx.Node, int]]
    copies: set[int]


def _spec(group: Group, wanted: Sequence[fx.Node]) -> tuple[Lookup, list[fx.Node], list[fx.Node], Places]:
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
    copies: set[int] = set()

    def part(p: Part) -> int:
        if isinstance(p, Found):
            return number[id(p)]
        copies.add(sources.setdefault(p, len(sources)))
        return ~sources[p]

    outputs: dict[Output, int] = {}
    places = []
    for rows in wanted:
        out = Output("concat", tuple(part(p) for p in group.rows[rows]))
        places.append((rows, outputs.setdefault(out, len(outputs))))
    for total, (kind, rows) in group.sums.items():
        out = Output(kind, tuple(part(p) for p in group.rows[rows]), _summed_width(total, rows))
        places.append((total, outputs.setdefault(out, len(outputs))))
    named = tuple(Table(table_name(t), int(t.meta["val"].shape[1])) for t in tables)
    return Lookup(named, tuple(bags), tuple(outputs)), list(tables), list(sources), Places(places, copies)
