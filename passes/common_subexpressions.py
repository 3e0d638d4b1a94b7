"""Computes the same thing once.

    m = ne(ids, 0); n = ne(ids, 0)   ->   m = ne(ids, 0); n = m

Two nodes are the same if they call the same operator with the same arguments, have no effect, draw no random
numbers, and no wall stands between them: no write to what they read, no switch of grad mode or autocast. The
gradient of the shared node is the sum of the gradients of both, another order of the same additions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch._ops import OpOverload

from recompile.rewrite import Context, Effects, Pass, Refuse, arguments, is_pure, register


@register
@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merges equal nodes (see the module), from the graph's inputs to its outputs."""

    numerics = "reassociate"
    after = ("canonicalize",)
    before = ("fuse-lookups", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        effects = Effects(graph)
        known: dict[Any, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op != "call_function" or not node.users or not is_pure(node):
                continue
            key = _key(node)
            first = known.setdefault(key, node)
            if first is node:
                continue
            ctx.tried(self.name())
            try:
                if (wall := effects.between(first, node)) is not None:
                    known[key] = node
                    raise Refuse(f"{wall.name} stands between {first.name} and {node.name}", wall)
                if why := effects.why_not_alias(node, first):
                    raise Refuse(why, node)
                ctx.begin(self.name(), node)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or node)
                continue
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            ctx.fired(self.name())


def _key(node: fx.Node) -> Any:
    given = arguments(node) if isinstance(node.target, OpOverload) else (node.args, node.kwargs)
    return node.target, _hashable(given)


def _hashable(value: Any) -> Any:
    """Arguments as a key that tells 1 from 1.0 and from True, and 0.0 from -0.0."""
    if isinstance(value, fx.Node):
        return value
    if isinstance(value, dict):
        return tuple((key, _hashable(part)) for key, part in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_hashable, value))
    return type(value), repr(value)
