"""Makes spellings meet, without changing a bit of any value, so that other passes look for one of them.

    stack([a, b], 1)        ->  cat([unsqueeze(a, 1), unsqueeze(b, 1)], 1)
    dropout(x, p, False)    ->  x
    unbind(x, 1)[i]         ->  select(x, 1, i)
    transpose(x, 1, 2)      ->  permute(x, [0, 2, 1])
    x * x                   ->  pow(x, 2)

`passes/spellings.py` has them all.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch._ops import OpOverload

from recompile.passes import spellings_of_writes  # noqa: F401  (it adds to SPELLINGS)
from recompile.passes.spellings import SPELLINGS, Spelling, spellings_of
from recompile.rewrite import (
    Builder,
    Context,
    Effects,
    Pass,
    Refuse,
    arguments,
    count_from_front,
    is_pure,
    register,
    replace,
)


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites to one spelling (see the module), from the graph's inputs to its outputs."""

    numerics = "exact"
    before = ("fuse-lookups", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        for spelling in dict.fromkeys(s for group in SPELLINGS.values() for s in group):
            ctx.rule(_name(spelling))
        effects = Effects(graph)
        for node in list(graph.nodes):
            count_from_front(node)
            todo = [node]
            while todo:
                todo += _respell(todo.pop(), effects, ctx)


def _respell(node: fx.Node, effects: Effects, ctx: Context) -> list[fx.Node]:
    """Replace `node` by the first spelling that is another one; the nodes that were made for it."""
    if not node.users or not spellings_of(node) or not is_pure(node):
        return []
    given = arguments(node) if isinstance(node.target, OpOverload) else {}
    for spelling in spellings_of(node):
        ctx.tried(_name(spelling))
        builder = Builder(effects, node, _name(spelling))
        try:
            new = spelling(node, given, builder)
            if new is None:
                continue
            ctx.begin(_name(spelling), node)
            replace((node,), new, builder)
        except Refuse as refusal:
            builder.discard()
            ctx.refuse(_name(spelling), refusal.why, refusal.at or node)
            continue
        ctx.fired(_name(spelling))
        node.graph.erase_node(node)
        return builder.made
    return []


def _name(spelling: Spelling) -> str:
    return spelling.__name__.replace("_", "-")
