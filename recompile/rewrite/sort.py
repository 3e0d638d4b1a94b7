"""What must come before what in a graph, and putting its nodes back in order after a rewrite."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

from torch import fx

from recompile.rewrite.effects import Effects, is_pure, storages


def dependences(graph: fx.Graph, effects: Effects) -> dict[fx.Node, set[fx.Node]]:
    """For each node, in the graph's order, what must come before it.

    Beside its arguments these are: what touched memory that it writes, and who wrote memory that it
    touches; the effect before it, if it has one (eager draws random numbers in that order); and
    the walls of unknown effect.

    Args:
        effects: of the graph before a rewrite; nodes made since were adopted, and read nothing that is written.
    """
    nodes = list(graph.nodes)
    needs: dict[fx.Node, set[fx.Node]] = {node: set(node.all_input_nodes) for node in nodes}
    for before, after in (*_memory(nodes, effects), *_walls(nodes, effects), *_effects(nodes)):
        needs[after].add(before)
    needs[graph.output_node()] |= set(nodes[:-1])
    return needs


def sort(graph: fx.Graph, effects: Effects) -> None:
    """Puts the nodes in an order that `dependences` allow, each as near to its old place as it can be.

    Raises:
        RuntimeError: they form a cycle.
    """
    needs = dependences(graph, effects)
    followers: dict[fx.Node, list[fx.Node]] = defaultdict(list)
    for node, before in needs.items():
        for other in before:
            followers[other].append(node)
    nodes = list(needs)
    place = {node: k for k, node in enumerate(nodes)}
    waits = {node: len(before) for node, before in needs.items()}
    ready = [place[n] for n in nodes if not waits[n]]
    end, placed = graph._root, 0
    while ready:
        node = nodes[heapq.heappop(ready)]
        if end.next is not node:
            end.append(node)
        end, placed = node, placed + 1
        for follower in followers[node]:
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(ready, place[follower])
    if placed < len(nodes):
        raise RuntimeError(f"{len(nodes) - placed} nodes wait for each other")


Edges = Iterator[tuple[fx.Node, fx.Node]]


def _memory(nodes: list[fx.Node], effects: Effects) -> Edges:
    """A write comes after what touched the memory before it, and before what touches it next."""
    touched: dict[int, list[fx.Node]] = defaultdict(list)
    written: dict[int, fx.Node] = {}
    for node in nodes:
        for storage in {*storages([*node.all_input_nodes, node])}:
            if not effects.writers(storage):
                continue
            if storage in written:
                yield written[storage], node
            if node in effects.writers(storage):
                yield from ((other, node) for other in touched[storage] if other is not node)
                written[storage], touched[storage] = node, []
            touched[storage].append(node)


def _walls(nodes: list[fx.Node], effects: Effects) -> Edges:
    """A node stays between the walls of unknown effect that it stood between."""
    for node in nodes:
        region = effects.region[node]
        if region:
            yield effects.walls[region - 1], node
        if region < len(effects.walls) and node is not effects.walls[region]:
            yield node, effects.walls[region]


def _effects(nodes: list[fx.Node]) -> Edges:
    """Effects keep their order."""
    yield from pairwise(node for node in nodes if node.op == "call_function" and not is_pure(node))
