"""Attention, however it is written, becomes one region op that never holds the scores of all pairs.

    s = matmul(q, k.transpose(-2, -1)) / sqrt(d)
    p = softmax(masked_fill(s, ~tril, -1e9), -1)
    y = matmul(p, v)
->
    y, _ = recompile.attention(q, k, v, [], "Attention(score='where(j <= i, s/8, -1e9)', softmax=True, ...)")

The region grows from the second contraction backwards to the first (`attention_region.py`): everything between is one
expression of the score, positions, tables and loads (`attention_reading.py`). What only masks pairs is told apart
(`score_masks.py`), so that kernels skip them. q, k, v and the loads are taken from as far up as views and copies of
them reach, with one dim for each of samples, heads, queries and keys (`attention_writing.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, register

from .attention_cone import cone, has_softmax, is_layer, products
from .attention_ends import Second, Turn, seconds
from .attention_products import Respelled, is_plain, plain, respelled_einsum
from .attention_reading import Reading
from .attention_region import is_dead
from .attention_row_sums import RowSums, row_sums
from .attention_sums import join_products, join_values, split_sum
from .attention_writing import write
from .axes import Split
from .contractions import contraction
from .library_attention import ENCODER, LIBRARY, spell_out, take_back

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class RewriteAttention(Pass):
    """Replaces attention by the region op (see the module)."""

    after = ("canonicalize", "common-subexpressions", "dead-code")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        spelled = self._spelled_out(graph, ctx)
        candidates, tried = self._respelled(graph, ctx)
        regions = {node for second in candidates for node in (*cone(second.weights), *second.nodes())}
        as_eager = ctx.options.inductor_setting("fallback_random")
        # Anew for each: what was replaced meanwhile may have been its weights, or its product.
        for second in (second for stale in candidates for second in _candidates([stale.found.node])):
            ctx.tried(self.name())
            try:
                ctx.begin(self.name(), second.found.node)
                _rewrite(second, Effects(graph), self.name(), regions, bool(as_eager))
                ctx.fired(self.name())
                ctx.account(graph)
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or second.found.node)
        for made in reversed(tried):
            made.settle()
        for call, build in spelled.items():
            take_back(call, build)

    def _respelled(self, graph: fx.Graph, ctx: Context) -> tuple[list[Second], list[Respelled]]:
        """The second contractions, and all contractions that are written plainer for the while."""
        effects = Effects(graph)
        einsums = list(graph.find_nodes(op="call_function", target=aten.einsum.default))
        tried = [
            made for node in einsums if (made := respelled_einsum(node, effects, self.name())) is not None
        ]
        candidates = list(_candidates(graph.nodes))
        for second in [*candidates]:
            if (parts := split_sum(second, effects, self.name())) is not None:
                candidates.remove(second)
                candidates += _candidates(parts)
        for second in [x for x in candidates if not is_plain(x)]:
            candidates.remove(second)
            try:
                tried.append(plain(second, effects, self.name()))
                candidates += _candidates(tried[-1].build.made)
            except Refuse as refusal:
                ctx.tried(self.name())
                ctx.refuse(self.name(), refusal.why, refusal.at or second.found.node)
        joined = join_values(candidates, effects, self.name())
        candidates = [x for x in candidates if not is_dead(x.found.node)]
        candidates += _candidates(node for made in joined for node in made.build.made)
        tried += joined
        for second in candidates:
            tried += join_products(second, Effects(graph), self.name())
        return candidates, tried

    def _spelled_out(self, graph: fx.Graph, ctx: Context) -> dict[fx.Node, Builder]:
        """The calls of the library's attention, and what stands in their place for the while."""
        spelled = {}
        calls = [graph.find_nodes(op="call_function", target=target) for target in (LIBRARY, ENCODER)]
        for node in (node for found in calls for node in found):
            try:
                spelled[node] = spell_out(node, Effects(graph), self.name())
            except Refuse as refusal:
                ctx.tried(self.name())
                ctx.refuse(self.name(), refusal.why, node)
        return spelled


def _candidates(nodes: Iterable[fx.Node]) -> Iterator[Second]:
    for node in nodes:
        found = contraction(node) if node.users and not node._erased else None
        ways = seconds(found) if found is not None else ()
        chosen = next((way for way in ways if _may_be(way)), None)
        if chosen is not None:
            yield chosen


def _may_be(second: Second) -> bool:
    nodes = cone(second.weights)
    return bool(products(nodes)) and (has_softmax(nodes) or not is_layer(second.found))


def _rewrite(second: Second, effects: Effects, rule: str, regions: set[fx.Node], as_eager: bool) -> None:
    """Replaces the attention that ends in `second`.

    Raises:
        Refuse: it is none, or must be left alone.
    """
    sums: RowSums | None = None
    while True:
        try:
            return write(Reading(second, effects, regions, as_eager, sums), rule)
        except Split as split:
            second.split(split.atom, split.sizes)
        except Turn as turn:
            second.turn(turn.atom)
        except Refuse:
            if sums is not None or (sums := row_sums(second)) is None:
                raise
            second = dataclasses.replace(second, weights=sums.weights)
