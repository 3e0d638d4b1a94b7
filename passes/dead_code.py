"""Drops what nobody uses.

    y = relu(x); return x   ->   return x

Nodes with an effect stay, and so do random ones: eager draws their numbers, which moves those after them.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from recompile.rewrite import Context, Pass, is_pure, register


@register
@dataclass(frozen=True)
class DeadCode(Pass):
    """Erases pure nodes without users, from the graph's outputs to its inputs."""

    numerics = "exact"
    after = ("canonicalize", "common-subexpressions")
    before = ("fuse-lookups", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        for node in reversed(graph.nodes):
            if node.users or node.op in ("placeholder", "output"):
                continue
            if not is_pure(node) or "unbacked_bindings" in node.meta:
                continue  # the latter names a size that others use without an edge
            ctx.tried(self.name())
            graph.erase_node(node)
            ctx.fired(self.name())
