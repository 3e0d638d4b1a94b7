"""Following looked-up values through reshapes, concatenations and sums: what their consumers want of a group.

*Rows* are a value whose sample b is certain parts side by side. A lookup is rows of one part; reshapes that keep
the samples apart keep the parts; a concatenation along the features joins them. A *stack* has its fields first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import fx

from recompile.graph.nodes import arg
from recompile.rewrite import Effects

from .bags import Found

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


@dataclass(frozen=True)
class Sum:
    """A sum over fields: kind "sum" or "sum_of_squares", of `width` columns a sample; a mean has a `divisor`."""

    kind: str
    parts: tuple[Part, ...]
    width: int
    divisor: int = 1


@dataclass
class Group:
    """Lookups that become one op, and what is wanted of them."""

    members: list[Found]
    effects: Effects
    depth: dict[fx.Node, int]  # lookups on the longest path to a node
    rows: dict[fx.Node, tuple[Part, ...]] = field(default_factory=dict)
    stacks: dict[fx.Node, tuple[Part, ...]] = field(default_factory=dict)
    sums: dict[fx.Node, Sum] = field(default_factory=dict)

    def grow(self) -> None:
        """Finds the rows and sums that start from the members, and lets members go that meet no others."""
        self.rows = {f.value: (f,) for f in self.members}
        todo = [f.value for f in self.members]
        while todo:
            for user in list(todo.pop().users):
                if user in self.rows or user in self.stacks or not self._moves(user):
                    continue
                if parts := self._stack(user):
                    self.stacks[user] = parts
                elif parts := self._parts(user):
                    self.rows[user] = parts
                if parts:
                    todo.append(user)
        for user in {u: None for rows in self.rows for u in rows.users}:
            self._split(user)
        for known in (self.rows, self.stacks):
            for rows in list(known):
                for user in rows.users:
                    self._sum(user, rows, known[rows])
        self._let_go()

    def _let_go(self) -> None:
        """Leaves lookups to Inductor that nothing pools, joins or sums: it reads their rows where they are used.

        Written out first, the rows of three products of two take 1.8 times as long, those of three layers 1.2 times
        (10k rows a table, width 16, batch 2048, one thread); no sum `a + b + c` by `add` was faster either.
        """
        together = [parts for parts in self.rows.values() if len(parts) > 1]
        together += [total.parts for total in self.sums.values()]
        met = {part for parts in together for part in parts}
        self.members = [f for f in self.members if f.bag.pooling != "none" or f in met]
        kept = set(self.members)
        self.rows = {rows: parts for rows, parts in self.rows.items() if len(parts) > 1 or parts[0] in kept}

    def _moves(self, node: fx.Node) -> bool:
        """Whether `node` depends on nothing later than this group, and can be computed with it."""
        first = self.members[0].value
        here = self.effects.region.get(node) == self.effects.region[first]
        return here and self.depth[node] == self.depth[first] and not self.effects.is_written(node)

    def _parts(self, user: fx.Node) -> tuple[Part, ...]:
        """The parts of `user`; () if it is no rows."""
        if user.target in RESHAPES:
            source = arg(user, 0)
            same = str(user.meta["val"].shape[:1]) == str(source.meta["val"].shape[:1])
            return self.rows.get(source, ()) if same else ()
        if user.target is aten.permute.default:
            swapped = arg(user, 1) == [1, 0, 2] and all(map(_lays_out_anew, user.users))
            return self.stacks.get(arg(user, 0), ()) if swapped else ()
        if not _joins_features(user):
            return ()
        parts: list[Part] = []
        for x in arg(user, 0):
            if x not in self.rows and not self._copyable(x, user):
                return ()
            parts += self.rows.get(x, (x,))
        return tuple(parts)

    def _stack(self, user: fx.Node) -> tuple[Part, ...]:
        """The parts of `[F, B, D]`, as `stack` makes it of `[B, D]`; () if it is none."""
        source = arg(user, 0)
        if user.target is aten.unsqueeze.default:
            alone = arg(user, 1) == 0 and len(self.rows.get(source, ())) == 1
            return self.rows[source] if alone and source.meta["val"].dim() == 2 else ()
        if user.target is not aten.cat.default or arg(user, 1, 0) != 0:
            return ()
        pieces = [self.stacks.get(x) for x in source]
        return tuple(part for piece in pieces for part in piece) if all(pieces) else ()  # type: ignore[union-attr]

    def _copyable(self, x: fx.Node, user: fx.Node) -> bool:
        """Whether the op can copy `x` into the concatenation: it does not depend on the op."""
        val = x.meta["val"]
        independent = self.depth[x] < self.depth[user] and not self.effects.is_written(x)
        plain = val.is_floating_point() and val.dim() == user.meta["val"].dim()
        return independent and plain and all(isinstance(s, int) for s in val.shape[1:])

    def _split(self, user: fx.Node) -> None:
        """Gives each run of rows in a concatenation that waits for other values a concatenation of its own."""
        if user in self.rows or not _joins_features(user):
            return
        done: list[fx.Node] = []
        run: list[fx.Node] = []
        for x in [*arg(user, 0), None]:
            if x in self.rows:
                run.append(x)
                continue
            done += [self._join(run, user)] if len(run) > 1 else run
            run = []
            done += [x] if x is not None else []
        user.update_arg(0, done)

    def _join(self, run: list[fx.Node], like: fx.Node) -> fx.Node:
        with like.graph.inserting_before(like):
            node = like.graph.call_function(aten.cat.default, (run, arg(like, 1)))
        vals = [x.meta["val"] for x in run]
        with vals[0].fake_mode:
            node.meta["val"] = aten.cat.default(vals, arg(like, 1))
        node.meta["stack_trace"] = like.meta.get("stack_trace")
        self.effects.adopt(node, like)
        self.effects.learn(node)
        self.depth[node] = self.depth[self.members[0].value]
        self.rows[node] = tuple(p for x in run for p in self.rows[x])
        return node

    def _sum(self, user: fx.Node, rows: fx.Node, parts: tuple[Part, ...]) -> None:
        kind, total = "sum", user
        if _is_square(user) and len(user.users) == 1:
            kind, total = "sum_of_squares", next(iter(user.users))
        dim = _summed_dim(total, rows, first=rows in self.stacks)
        if not self._moves(total) or dim is None:
            return
        shape = rows.meta["val"].shape
        width = math.prod(shape[dim + 1 if dim else 2 :])
        for part in parts:
            columns = (part if isinstance(part, fx.Node) else part.table).meta["val"].shape[1:]
            if math.prod(columns) % width:
                return
            if kind == "sum_of_squares" and isinstance(part, Found) and part.bag.pooling != "none":
                return
        self.sums[total] = Sum(kind, parts, width, int(shape[dim]) if total.target is aten.mean.dim else 1)

    def wanted(self) -> list[fx.Node]:
        """The rows that something outside the group reads."""
        inside = {*self.rows, *self.sums}
        squares = {
            s for total, x in self.sums.items() if x.kind == "sum_of_squares" for s in total.all_input_nodes
        }
        for node in (*squares, *reversed(self.stacks)):
            if all(user in inside for user in node.users):
                inside.add(node)
        return [rows for rows in self.rows if any(u not in inside for u in rows.users)]


def is_summed(value: fx.Node) -> bool:
    """Whether something sums `value`, or its squares, over the fields: Inductor would read each row once a column."""
    todo = [value]
    while todo:
        rows = todo.pop()
        for user in rows.users:
            squared = next(iter(user.users)) if _is_square(user) and len(user.users) == 1 else user
            if _summed_dim(squared, rows) is not None:
                return True
            if user.target in RESHAPES or _joins_features(user):
                todo.append(user)
    return False


def _joins_features(node: fx.Node) -> bool:
    """Whether `node` concatenates so that a sample's inputs stand side by side."""
    if node.target is not aten.cat.default:
        return False
    dim = arg(node, 1, 0)
    shape = node.meta["val"].shape
    dim = dim % len(shape)
    return dim > 0 and all(s == 1 for s in shape[1:dim])


def _is_square(node: fx.Node) -> bool:
    if node.target is aten.pow.Tensor_Scalar:
        return bool(arg(node, 1) == 2)
    return node.target is aten.mul.Tensor and arg(node, 0) is arg(node, 1)


def _summed_dim(node: fx.Node, rows: fx.Node, first: bool = False) -> int | None:
    """F, if `node` sums `[B, 1, ..., F, ...]` over it (`first`: `[F, B, D]`), or averages, in its input's dtype."""
    if node.target not in (aten.sum.dim_IntList, aten.mean.dim) or node.kwargs.get("dtype") is not None:
        return None
    val, new, dims = rows.meta["val"], node.meta["val"], arg(node, 1)
    if val.dim() < 2 or not isinstance(dims, list) or len(dims) != 1 or new.dtype != val.dtype:
        return None
    dim = int(dims[0] % val.dim())
    if first:
        return 0 if dim == 0 and new.dim() < val.dim() else None
    fixed = all(isinstance(s, int) for s in val.shape[1:])
    return dim if fixed and dim >= 1 and all(s == 1 for s in val.shape[1:dim]) else None


def _lays_out_anew(node: fx.Node) -> bool:
    """Whether nobody sees the strides of what `node` reads: it makes a contiguous tensor of any."""
    if _is_square(node):
        return all(map(_lays_out_anew, node.users))
    moves = (aten.reshape.default, aten.cat.default, aten.sum.dim_IntList, aten.mean.dim)
    return node.target in moves and bool(node.meta["val"].is_contiguous())
