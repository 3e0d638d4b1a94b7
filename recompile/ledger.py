"""What the nodes cost that each region stands for: one graph's costs, followed through its passes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import networkx as nx
from torch import fx
from torch.utils._pytree import tree_leaves

from .cost import Cost, cost, is_region


class Ledger:
    """Follows one graph through its passes: what the nodes cost that each new node stands for."""

    def __init__(self, graph: fx.Graph) -> None:
        self._held = _arguments(graph)
        self._replaced: dict[fx.Node, Cost] = {}

    def after(self, graph: fx.Graph) -> None:
        """Takes down what a pass has replaced by what."""
        before, now = self._held, _arguments(graph)
        self._held = now
        links = nx.Graph()
        links.add_nodes_from(node for node in before if node not in now)
        links.add_nodes_from(node for node in now if node not in before)
        for nodes, others in ((before, now), (now, before)):
            links.add_edges_from(
                (node, read)
                for node in nodes
                if node not in others
                for read in _reads(nodes[node])
                if read not in others
            )
        for node, given in now.items():
            if node in before and given[0] is not before[node][0]:
                links.add_edges_from(_handed_over(before, now, node))
        place = {node: k for k, node in enumerate(now)}
        for group in nx.connected_components(links):
            new = sorted((node for node in group if node not in before), key=place.__getitem__)
            self._account(new, [node for node in group if node in before], before)

    def before(self, node: fx.Node) -> Cost:
        """The cost of all that `node` stands for; of itself if it was there from the start."""
        return self._replaced.get(node) or cost(node)

    def _account(self, new: list[fx.Node], gone: list[fx.Node], before: dict[fx.Node, Any]) -> None:
        heirs = [node for node in new if is_region(node)] or [node for node in new if any(cost(node))] or new
        if not heirs or not gone:
            return
        total = Cost()
        for node in gone:
            total += self._replaced.get(node) or cost(node, *before[node])
        # Of nodes that are no regions the last that costs anything stands for all: others may stay when it is replaced,
        # as a view that a stack made of an operand does.
        shares = len(heirs) if is_region(heirs[0]) else 1
        for node in reversed(heirs):
            self._replaced[node] = Cost(_share(total.bytes, shares), _share(total.flops, shares))
            total = total if shares > 1 else Cost()


def _arguments(graph: fx.Graph) -> dict[fx.Node, tuple[Any, Any]]:
    return {node: (node.args, node.kwargs) for node in graph.nodes}


def _reads(given: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in tree_leaves(given) if isinstance(leaf, fx.Node))


def _handed_over(before: Any, now: Any, node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(old, new) for each argument of a node that a pass has exchanged; all are linked where a list grew or shrank."""
    old, new = tree_leaves(before[node]), tree_leaves(now[node])
    if len(old) == len(new):
        pairs = list(zip(old, new, strict=True))
    else:
        gone, made = [a for a in old if _lacks(now, a)], [b for b in new if _lacks(before, b)]
        pairs = [(a, b) for a in gone for b in made[:1]] + [(a, b) for a in gone[:1] for b in made]
    yield from ((a, b) for a, b in pairs if _lacks(now, a) and _lacks(before, b))


def _lacks(nodes: Any, value: Any) -> bool:
    return isinstance(value, fx.Node) and value not in nodes


def _share(amount: Any, parts: int) -> Any:
    return amount // parts if isinstance(amount, int) else amount / parts
