"""The boxes that the page draws: a node, or a group of boxes that opens in place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Edge = tuple[int, int, int]


@dataclass
class Box:
    """A node or a group.

    Args:
        label: what the group is: a module path, a source line; "" for a node.
        kind: "node", "module", "line", "part" (a stretch of a long group), or "fold" (equal siblings).
        node: index of the node; -1 for a group.
        children: of a group; edges and rows name them by position.
        edges: `(from, to, n)`: n nodes of one child read nodes of the other.
        rows: children from top to bottom; -1 - k is a bend of edge k on its way past the row.
        entering, leaving: children that read from outside, or are read from there.
        leaves: indices of the nodes inside.
    """

    label: str = ""
    kind: str = "node"
    node: int = -1
    children: list[Box] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    rows: list[list[int]] = field(default_factory=list)
    entering: list[int] = field(default_factory=list)
    leaving: list[int] = field(default_factory=list)
    leaves: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.leaves = [leaf for child in self.children for leaf in child.leaves]
        if self.node >= 0:
            self.leaves = [self.node]


class Wires:
    """Who reads whom in one stage of a graph.

    Args:
        reads: for each node, by index, the nodes that it reads.
    """

    def __init__(self, reads: Mapping[int, Sequence[int]]) -> None:
        self.reads = reads
        self.read_by: dict[int, list[int]] = {node: [] for node in reads}
        for node, others in reads.items():
            for other in others:
                self.read_by[other].append(node)

    def between(self, boxes: Sequence[Box]) -> list[Edge]:
        """The edges between boxes, by their positions."""
        owner = {leaf: k for k, box in enumerate(boxes) for leaf in box.leaves}
        found: Counter[tuple[int, int]] = Counter()
        for reader, k in owner.items():
            for read in self.reads[reader]:
                if owner.get(read, k) != k:
                    found[owner[read], k] += 1
        return [(a, b, n) for (a, b), n in sorted(found.items())]

    def crossing(self, boxes: Sequence[Box]) -> tuple[list[int], list[int]]:
        """Positions of the boxes that read from elsewhere, and of those that are read from elsewhere."""
        inside = {leaf for box in boxes for leaf in box.leaves}
        return self._beyond(boxes, self.reads, inside), self._beyond(boxes, self.read_by, inside)

    @staticmethod
    def _beyond(boxes: Sequence[Box], links: Mapping[int, Sequence[int]], inside: set[int]) -> list[int]:
        return [k for k, box in enumerate(boxes) if any(not inside.issuperset(links[n]) for n in box.leaves)]


def depths(count: int, edges: Iterable[Edge]) -> list[int]:
    """The length of the longest way from a box without readings to each of `count` boxes.

    Raises:
        ValueError: the edges form a cycle.
    """
    after: list[list[int]] = [[] for _ in range(count)]
    waiting = [0] * count
    for a, b, _ in edges:
        after[a].append(b)
        waiting[b] += 1
    depth = [0] * count
    ready = [k for k in range(count) if not waiting[k]]
    for k in ready:  # grows while it is read
        for b in after[k]:
            depth[b] = max(depth[b], depth[k] + 1)
            waiting[b] -= 1
            if not waiting[b]:
                ready.append(b)
    if len(ready) < count:
        raise ValueError("the boxes read each other in a cycle")
    return depth
