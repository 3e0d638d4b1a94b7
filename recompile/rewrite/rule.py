"""A rewrite as a pattern, a check and a replacement."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from recompile.errors import RecompileError
from recompile.rewrite.base import Context, Pass, Refuse
from recompile.rewrite.build import Builder
from recompile.rewrite.effects import Effects, is_pure
from recompile.rewrite.match import Found, Matcher
from recompile.rewrite.pattern import Ops, Pattern, aten_packet
from recompile.rewrite.replace import replace
from recompile.rewrite.schema import is_size


@dataclass(frozen=True)
class Match:
    """A place where a rule's pattern fits, and the means to build what replaces it."""

    found: Found
    builder: Builder
    op: Calls = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "op", Calls(self.builder))

    def __getitem__(self, name: str) -> Any:
        """What the pattern calls `name`: a node, a constant, an `any_of`'s choice, or a list (`each`).

        None if the alternative that fits has no such part.
        """
        if name not in self.found.names:
            raise KeyError(f"the pattern has no {name!r}, only {sorted(self.found.names)}")
        return self.found.names[name]

    def node(self, name: str) -> fx.Node:
        """`m[name]`, which must be a node.

        Raises:
            TypeError: it is something else.
        """
        if not isinstance(self[name], fx.Node):
            raise TypeError(f"{name} is {self[name]!r}, not a node")
        return self.found.names[name]  # type: ignore[no-any-return]

    def val(self, name: str) -> torch.Tensor:
        """The fake tensor of the node `m[name]`: its shape, dtype and device."""
        return self.node(name).meta["val"]  # type: ignore[no-any-return]

    def size(self, name: str) -> Any:
        """The constant `m[name]`, where it is one number: an int or a float, or of a dynamic size the SymInt.

        Raises:
            TypeError: it is something else.
        """
        value = self[name]
        if not is_size(value):
            raise TypeError(f"{name} is {value!r}, not a number")
        return value.meta["val"] if isinstance(value, fx.Node) else value

    @property
    def dims(self) -> dict[str, Any]:
        """The sizes behind the pattern's dimension names: ints or SymInts; inside an `each`, lists."""
        return self.found.dims

    @property
    def root(self) -> fx.Node:
        """The node of the pattern's (first) output."""
        return self.found.roots[0]

    @property
    def graph(self) -> fx.Graph:
        """The graph that is rewritten."""
        return self.root.graph


class Calls:
    """`m.op.sum(x, dim=[1])` adds a node, right after the root of the match."""

    def __init__(self, builder: Builder) -> None:
        self.call = builder.call

    def __getattr__(self, name: str) -> Any:
        packet = aten_packet(name)
        return lambda *args, **kwargs: self.call(packet, *args, **kwargs)


@dataclass(frozen=True)
class Rule(Pass):
    """A pass that replaces what fits a pattern.

    One sweep from the graph's inputs to its outputs: every node that calls the operator of the pattern's
    (first) output is tried once, and finds what earlier rewrites left. New nodes are not tried again.
    Nothing that the pattern covers may write to a tensor, draw random numbers, or stand across a wall, such
    as a grad-mode switch or a write to a tensor it reads; its variables may stand anywhere.
    """

    def pattern(self, op: Ops) -> Pattern | tuple[Pattern, ...]:
        """What to look for. A tuple looks for several values at once, which share parts."""
        raise NotImplementedError(f"{type(self).__name__} has no pattern()")

    def check(self, m: Match) -> None:
        """Raises Refuse if the match must be left alone."""

    def rewrite(self, m: Match) -> fx.Node | tuple[fx.Node, ...]:
        """Builds the replacement and returns it: one node an output of the pattern. May raise Refuse."""
        raise NotImplementedError(f"{type(self).__name__} has no rewrite()")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """The sweep."""
        effects = Effects(graph)
        matcher = Matcher(self.pattern(Ops()), effects)
        ctx.rule(self.name())
        gone: set[fx.Node] = set()
        for node in [node for node in graph.nodes if matcher.can_start(node)]:
            if node not in gone and node.users:
                ctx.tried(self.name())
                gone.update(self._attempt(node, matcher, ctx))

    def _attempt(self, root: fx.Node, matcher: Matcher, ctx: Context) -> list[fx.Node]:
        """Rewrite at `root` if the rule applies; the nodes that are gone."""
        found = matcher.find(root)
        if found is None:
            if matcher.nearest is not None:
                ctx.refuse(self.name(), *matcher.nearest)
            return []
        builder = None
        try:
            builder = Builder(matcher.effects, place(found, matcher.effects), self.name(), root)
            match = Match(found, builder)
            said: object = self.check(match)  # type: ignore[func-returns-value]
            if said is not None:
                raise RecompileError(
                    f"{self.name()}'s check gives {said!r}, which means nothing", try_='raise Refuse("why")'
                )
            ctx.begin(self.name(), root)
            replace(found.roots, self.rewrite(match), builder)
        except Refuse as refusal:
            if builder is not None:
                builder.discard()
            ctx.refuse(self.name(), refusal.why, refusal.at or root)
            return []
        ctx.fired(self.name())
        builder.discard()
        return _sweep_up(found)


def place(found: Found, effects: Effects) -> fx.Node:
    """The node that the replacement follows: after all that it may read, before all that read it.

    Raises:
        Refuse: there is no such place.
    """
    if len(found.roots) == 1:
        return found.roots[0]
    order = effects.order.__getitem__
    leaves = {leaf for node in found.inner for leaf in node.all_input_nodes} - set(found.inner)
    readers = {user for root in found.roots for user in root.users} - set(found.inner)
    first = min(readers, key=order)
    for last in (max(found.roots, key=order), max([*leaves, min(found.roots, key=order)], key=order)):
        walls = (effects.between(node, last) for node in found.inner)
        if order(last) < order(first) and not any(walls):
            return last
    raise Refuse(f"{first.name} reads one of the results before the others can be computed", first)


def _sweep_up(found: Found) -> list[fx.Node]:
    """Erase what the match covered and nobody uses any more."""
    parts = [user for root in found.roots for user in root.users if user.target is operator.getitem]
    left, gone = dict.fromkeys([*parts, *found.inner]), list[fx.Node]()
    while dead := [node for node in left if not node.users and is_pure(node)]:
        for node in dead:
            node.graph.erase_node(node)
            del left[node]
        gone += dead
    return gone
