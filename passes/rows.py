"""Following looked-up values through reshapes, concatenations and sums: what their consumers want of a group.

*Rows* are a value whose sample b is certain parts side by side. A lookup is rows of one part; reshapes that keep
the samples apart keep the parts; a concatenation along the features joins them.
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
    """A sum over the fields of `rows`: kind "sum" or "sum_of_squares", of `width` columns a sample."""

    kind: str
    rows: fx.Node
    width: int


@dataclass
class Group:
    """Lookups that become one op, and what is wanted of them."""

    members: list[Found]
    effects: Effects
    depth: dict[fx.Node, int]  # lookups on the longest path to a node
    rows: dict[fx.Node, tuple[Part, ...]] = field(default_factory=dict)
    sums: dict[fx.Node, Sum] = field(default_factory=dict)

    def grow(self) -> None:
        """Finds the rows and sums that start from the members."""
        self.rows = {f.value: (f,) for f in self.members}
        todo = [f.value for f in self.members]
        while todo:
            for user in list(todo.pop().users):
                if user not in self.rows and self._moves(user) and (parts := self._parts(user)):
                    self.rows[user] = parts
                    todo.append(user)
        for user in {u: None for rows in self.rows for u in rows.users}:
            self._split(user)
        for rows in list(self.rows):
            for user in rows.users:
                self._sum(user, rows)

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
            return self.rows[source] if same else ()
        if not _joins_features(user):
            return ()
        parts: list[Part] = []
        for x in arg(user, 0):
            if x not in self.rows and not self._copyable(x, user):
                return ()
            parts += self.rows.get(x, (x,))
        return tuple(parts)

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

    def _sum(self, user: fx.Node, rows: fx.Node) -> None:
        kind, total = "sum", user
        if _is_square(user) and len(user.users) == 1:
            kind, total = "sum_of_squares", next(iter(user.users))
        if not self._moves(total) or not _sums_fields(total, rows):
            return
        val = rows.meta["val"]
        width = math.prod(val.shape[arg(total, 1)[0] % val.dim() + 1 :])
        for part in self.rows[rows]:
            columns = (part if isinstance(part, fx.Node) else part.table).meta["val"].shape[1:]
            if math.prod(columns) % width:
                return
            if kind == "sum_of_squares" and isinstance(part, Found) and part.bag.pooling != "none":
                return
        self.sums[total] = Sum(kind, rows, width)

    def wanted(self) -> list[fx.Node]:
        """The rows that something outside the group reads."""
        squares = {
            s for total, x in self.sums.items() if x.kind == "sum_of_squares" for s in total.all_input_nodes
        }
        inside = {*self.rows, *self.sums, *squares}
        return [rows for rows in self.rows if any(u not in inside for u in rows.users)]


def is_summed(value: fx.Node) -> bool:
    """Whether something sums `value`, or its squares, over the fields: Inductor would read each row once a column."""
    todo = [value]
    while todo:
        rows = todo.pop()
        for user in rows.users:
            squared = next(iter(user.users)) if _is_square(user) and len(user.users) == 1 else user
            if _sums_fields(squared, rows):
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


def _sums_fields(node: fx.Node, rows: fx.Node) -> bool:
    """Whether `node` sums dim F of `[B, 1, ..., F, ...]`, in the dtype of its input."""
    if node.target is not aten.sum.dim_IntList or node.kwargs.get("dtype") is not None:
        return False
    val, dims = rows.meta["val"], arg(node, 1)
    if val.dim() < 2 or len(dims or ()) != 1 or not all(isinstance(s, int) for s in val.shape[1:]):
        return False
    dim = dims[0] % val.dim()
    return bool(dim >= 1 and all(s == 1 for s in val.shape[1:dim]) and node.meta["val"].dtype == val.dtype)
