"""Writes into tensors that the graph makes itself become new tensors, so that every pass sees values only.

    scores = matmul(q, k)                        scores = matmul(q, k)
    scores.mul_(0.125)                    ->     scaled = mul(scores, 0.125)
    scores[:, :, 3:] = bias                      masked = slice_scatter(scaled, expand(bias, ...), 2, 3)
    p = softmax(scores, -1)                      p = softmax(masked, -1)

A tensor is rewritten with all its views or not at all: a read between two writes gets the value of its time. Writes
into the graph's inputs stay where they are, and so do those into memory that two outputs share.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from recompile.graph.order import erase
from recompile.graph.walls import is_random, is_wall
from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, arguments, register, same, same_strides
from recompile.rewrite.effects import storages
from recompile.rewrite.schema import op_name, out_of_place

from .axes import shape

aten = torch.ops.aten
_PRODUCTS = ("addmm_", "addmv_", "addr_", "baddbmm_", "addbmm_")
_PARTS = ("slice", "select", "diagonal")
_RESHAPES = (aten.view, aten.reshape, aten.flatten, aten.unflatten, aten.unsqueeze, aten.squeeze, aten.alias)


@register
@dataclass(frozen=True)
class Functionalize(Pass):
    """Replaces writes by values (see the module)."""

    numerics = "exact"
    before = ("canonicalize",)

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        effects = Effects(graph)
        for owner in effects.written():
            if owner.op in ("placeholder", "get_attr"):
                continue
            ctx.tried(self.name())
            try:
                ctx.begin(self.name(), owner)
                family = _Family(owner, effects, self.name())
                family.plan()
                family.apply()
                ctx.fired(self.name())
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or owner)


class _Family:
    """The nodes of one memory: the owner, which made it, its views, and the writes into any of them."""

    def __init__(self, owner: fx.Node, effects: Effects, rule: str) -> None:
        self.owner, self.effects, self.rule = owner, effects, rule
        self.writes = {n for memory in storages(owner) for n in effects.writers(memory)}
        self.members = effects.sharing(owner) - self.writes - {owner.graph.output_node()}
        self.now: dict[Any, fx.Node] = {owner: owner}  # a view that a write has made stale is not in it
        self.builders: list[Builder] = []
        self.reads: list[tuple[fx.Node, fx.Node, fx.Node]] = []  # who reads what, and what instead

    def plan(self) -> None:
        """Adds the new nodes; nothing reads them yet.

        Raises:
            Refuse: the writes must stay; the graph is as it was.
        """
        self._check()
        kin = self.members | self.writes
        try:
            for node in sorted(kin | {user for n in kin for user in n.users}):
                if node in self.writes:
                    self._write(node)
                    continue
                if node in self.members:
                    self.now[node] = node
                for read in node.all_input_nodes:
                    if read in kin:
                        self.reads.append((node, read, self._value(read)))
        except Refuse:
            for builder in reversed(self.builders):
                builder.discard()
            raise

    def apply(self) -> None:
        """Hands the new nodes to those that read the old ones, and drops the writes."""
        for user, old, new in self.reads:
            if old is not new:
                old.meta["recompile_replaced_by"] = self.rule
                user.replace_input_with(old, new)
        for node in sorted(self.members - {self.owner}):  # a view of what is new has other memory
            self.builders[0].refresh(node)
        for node in sorted(self.members | self.writes, reverse=True):
            if node in self.writes:
                node.graph.erase_node(node)
            else:
                erase(node)

    def _check(self) -> None:
        for node in sorted(self.writes):
            self._check_write(node)
        for node in sorted(self.members):
            if is_wall(node) or not (node.target is operator.getitem or isinstance(node.target, OpOverload)):
                raise Refuse(f"{node.name} shares the written memory, and may have other effects", node)
            if node is not self.owner and not self._is_kin(_parent(node)):
                raise Refuse(f"{node.name} shares the written memory, and is no view of it", node)
        returned = [n for n in self.owner.graph.output_node().all_input_nodes if self._is_kin(n)]
        if len(returned) > 1:
            raise Refuse(f"{returned[0].name} and {returned[1].name} are outputs that share memory", node)

    def _check_write(self, node: fx.Node) -> None:
        name = op_name(node.target)
        if not isinstance(node.target, OpOverload) or not self._is_kin(_parent(node)):
            raise Refuse(f"{name} may write into this memory", node)
        if is_random(node):
            raise Refuse(f"{name} draws random numbers in place", node)
        if out_of_place(node.target) is None:
            raise Refuse(f"there is no {name} that makes a new tensor", node)
        if name in _PRODUCTS and self.effects.autocasts[node]:
            raise Refuse(f"autocast lets {name[:-1]} compute in another dtype than {name}", node)
        switches = [n for n in self.effects.grad_switches if self.owner < n < node]
        if switches and not switches[-1].args[0]:
            raise Refuse(f"{name} writes without gradients to what may have some", node)

    def _is_kin(self, node: Any) -> bool:
        return isinstance(node, fx.Node) and (node in self.members or node in self.writes)

    def _write(self, node: fx.Node) -> None:
        """Makes the value that the owner has after the write `node`."""
        build = Builder(self.effects, node, self.rule)
        self.builders.append(build)
        place = target = self._target(node)
        new = value = self._filled(node, target, build) or self._computed(node, target, build)
        while place is not self.owner:
            parent = self._target(_parent(place))
            value = _put_back(place, value, self._value(parent), shape(parent), build)
            place = parent
        if not _lie_alike(value, self.owner):
            raise Refuse(f"{value.name} would not have the shape and strides of {self.owner.name}", node)
        self.now = {self.owner: value}
        if target is not self.owner and new.target is not aten.expand.default and _lie_alike(new, target):
            self.now[target] = new

    def _filled(self, node: fx.Node, target: fx.Node, build: Builder) -> fx.Node | None:
        """What `copy_`, `fill_` or `zero_` writes, whatever stood there; None for another operator.

        `aten.copy` has no derivative, and takes the old values for read.
        """
        name, was = op_name(node.target), target.meta["val"]
        value: Any = {"copy_": node.args[1:2], "fill_": node.args[1:2], "zero_": (0,)}.get(name, (None,))[0]
        if value is None:
            return None
        if not isinstance(value, fx.Node):
            value = build.call(aten.full.default, [], value, dtype=was.dtype, device=was.device)
        elif self._is_kin(value):
            value = self._value(value)
        if value.meta["val"].device != was.device:
            raise Refuse(f"{name} copies from another device", node)
        if value.meta["val"].dtype is not was.dtype:
            value = build.call(aten.to.dtype, value, was.dtype)
        spread = build.call(aten.expand.default, value, list(was.shape))
        if op_name(target.target) in _PARTS:
            return spread
        return build.call(aten.clone.default, spread, memory_format=torch.contiguous_format)

    def _computed(self, node: fx.Node, target: fx.Node, build: Builder) -> fx.Node:
        """What `node` writes, by the operator that does not write it."""
        args, kwargs = fx.node.map_arg(
            (node.args, node.kwargs), lambda n: self._value(n) if self._is_kin(n) else n
        )
        new = build.call(out_of_place(node.target), *args, **kwargs)
        dtype = target.meta["val"].dtype
        return new if new.meta["val"].dtype is dtype else build.call(aten.to.dtype, new, dtype)

    def _target(self, node: fx.Node) -> fx.Node:
        """The member that `node` is: of a write's result what was written into."""
        while node in self.writes:
            node = _parent(node)
        return node

    def _value(self, node: fx.Node) -> fx.Node:
        """The value that a member or a write's result has now: a stale view is made anew."""
        node = self._target(node)
        if node not in self.now:
            args = (self._value(_parent(node)), *node.args[1:])
            self.now[node] = self.builders[-1].call(node.target, *args, **node.kwargs)
        return self.now[node]


def _parent(node: fx.Node) -> Any:
    """What `node` is a view of, or writes into."""
    return node.args[0] if node.args else None


def _lie_alike(a: fx.Node, b: fx.Node) -> bool:
    x, y = a.meta["val"], b.meta["val"]
    return same(x.shape, y.shape) and same_strides(x, y)


def _put_back(view: fx.Node, value: fx.Node, into: fx.Node, sizes: Any, build: Builder) -> fx.Node:
    """`into`, of which `view` is a view, with `value` where the view lies.

    Raises:
        Refuse: the view is of another kind.
    """
    if not isinstance(view.target, OpOverload):
        raise Refuse(f"a write into {view.name}, one of several parts, stays", view)
    given, packet = arguments(view), view.target.overloadpacket
    if packet is aten.slice:
        ends = [given[name] for name in ("dim", "start", "end", "step")]
        return build.call(aten.slice_scatter.default, into, value, *ends)
    if packet is aten.select:
        return build.call(aten.select_scatter.default, into, value, given["dim"], given["index"])
    if packet is aten.diagonal:
        ends = [given[name] for name in ("offset", "dim1", "dim2")]
        return build.call(aten.diagonal_scatter.default, into, value, *ends)
    if packet is aten.permute:
        order = [d % len(sizes) for d in given["dims"]]
        return build.call(aten.permute.default, value, [order.index(k) for k in range(len(sizes))])
    if packet in (aten.transpose, aten.t, aten.mT):
        return build.call(view.target, value, *view.args[1:])
    if packet in _RESHAPES:
        return build.call(aten.reshape.default, value, list(sizes))
    raise Refuse(
        f"a write through {op_name(view.target)} stays in place: no operator gives its result as a new tensor",
        view,
    )
