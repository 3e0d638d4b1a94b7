"""Order and dependence in an FX graph."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import fx

from .walls import is_random, is_wall


def segments(graph: fx.Graph) -> dict[fx.Node, int]:
    """For each node the number of walls before it: what stands in one segment may be moved within it."""
    found, walls = {}, 0
    for node in graph.nodes:
        walls += is_wall(node)
        found[node] = walls
        walls += is_wall(node)
    return found


def depths(graph: fx.Graph, of: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How many of the nodes `of` lie on the longest path to each node, itself included.

    Two of them with the same depth do not depend on each other, so nodes of one depth can become one node
    without a cycle.
    """
    counted, found = set(of), dict[fx.Node, int]()
    for node in graph.nodes:
        found[node] = max((found[i] for i in node.all_input_nodes), default=0) + (node in counted)
    return found


def sort(graph: fx.Graph, segment: dict[fx.Node, int]) -> None:
    """Puts the nodes in a dependence order, each as near to its old place as it can be, within its segment.

    Random operators keep their order: eager draws their numbers in it.
    """
    nodes = list(graph.nodes)
    place = {node: k for k, node in enumerate(nodes)}
    waits: dict[fx.Node, int] = {}
    followers: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    last_random: fx.Node | None = None
    for node in nodes:
        needs = list(node.all_input_nodes)
        if is_random(node):
            needs += [last_random] if last_random is not None else []
            last_random = node
        waits[node] = len(needs)
        for other in needs:
            followers[other].append(node)
    ready = [(segment[n], place[n]) for n in nodes if not waits[n]]
    heapq.heapify(ready)
    end = graph._root
    while ready:
        node = nodes[heapq.heappop(ready)[1]]
        if end.next is not node:
            end.append(node)
        end = node
        for follower in followers[node]:
            waits[follower] -= 1
            if not waits[follower]:
                heapq.heappush(ready, (segment[follower], place[follower]))


def erase(node: fx.Node) -> None:
    """Erases `node`, and what fed only it, if nobody uses it; walls, random operators and inputs stay."""
    todo = [node]
    while todo:
        dead = todo.pop()
        if (
            dead.users
            or dead._erased
            or dead.op in ("placeholder", "output")
            or is_wall(dead)
            or is_random(dead)
        ):
            continue
        todo += dead.all_input_nodes
        dead.graph.erase_node(dead)
