"""Equal siblings are one box: 26 lookups of 26 tables are drawn as `26 x embedding`.

Boxes are equal if they look alike and their neighbours do, their neighbours' neighbours, and once more: three
rounds of colour refinement. Which parameters they read does not count: every table has its own rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .box import Box, Edge, Wires, depths

ROUNDS = 3
FEWEST = 3  # two boxes are as quickly read as one with a count

Nodes = Sequence[Mapping[str, Any]]


def fold(boxes: list[Box], wires: Wires, nodes: Nodes) -> list[Box]:
    """The boxes, each set of at least `FEWEST` equal ones of the same depth as one of kind "fold".

    Same depth, because then no one of them can be between two others.
    """
    if len(boxes) < FEWEST:
        return boxes
    edges = wires.between(boxes)
    colours = _refined([_look(box, nodes) for box in boxes], edges)
    depth = depths(len(boxes), edges)
    classes: dict[Hashable, list[Box]] = defaultdict(list)
    for k, box in enumerate(boxes):
        classes[colours[k], depth[k]].append(box)
    folded: list[Box] = []
    for same in classes.values():
        folded += [_folded(same, nodes)] if len(same) >= FEWEST else same
    return folded


def _folded(same: list[Box], nodes: Nodes) -> Box:
    return Box(_name(same, nodes), "fold", children=same)


def _name(same: list[Box], nodes: Nodes) -> str:
    if same[0].node < 0:
        return _common([box.label for box in same])
    first = nodes[same[0].node]
    if first["op"] != "placeholder":
        return short(first)
    names = [str(nodes[box.node]["name"]) for box in same]
    return names[0][: _alike(names)].removeprefix("l_") + "*"


def short(node: Mapping[str, Any]) -> str:
    """The operator's name without namespace and overload."""
    parts = str(node["target"]).split(".")
    overload = len(parts) > 2 and parts[0] != "torch"  # torch._C._set_grad_enabled has none
    return parts[-2] if overload else parts[-1]


def _common(labels: list[str]) -> str:
    """`experts.0.mlp` and `experts.1.mlp` are `experts.*.mlp`."""
    if len(set(labels)) == 1:
        return labels[0]
    rows = [label.split(".") for label in labels]
    head = _alike(rows)
    tail = _alike([row[head:][::-1] for row in rows])
    return ".".join([*rows[0][:head], "*", *rows[0][len(rows[0]) - tail :]])


def _alike(rows: Sequence[Sequence[str]]) -> int:
    """How many first elements all rows share."""
    columns = enumerate(zip(*rows, strict=False))
    return next((k for k, column in columns if len(set(column)) > 1), min(map(len, rows)))


def _look(box: Box, nodes: Nodes) -> Hashable:
    """What a box looks like by itself; its place in the model is its source line, not its module."""
    looks = Counter(
        (node["op"], "" if node["op"] == "placeholder" else node["target"], node["value"], node["line"])
        for node in (nodes[leaf] for leaf in box.leaves)
    )
    return box.kind, frozenset(looks.items())


def _refined(looks: Sequence[Hashable], edges: Sequence[Edge]) -> list[int]:
    """A number for each box, the same for boxes that are equal."""
    colours = _numbered(looks)
    for _ in range(ROUNDS):
        reads: list[list[int]] = [[] for _ in colours]
        read_by: list[list[int]] = [[] for _ in colours]
        for a, b, _ in edges:
            reads[b].append(colours[a])
            read_by[a].append(colours[b])
        colours = _numbered(
            [
                (own, tuple(sorted(up)), tuple(sorted(down)))
                for own, up, down in zip(colours, reads, read_by, strict=True)
            ]
        )
    return colours


def _numbered(looks: Sequence[Hashable]) -> list[int]:
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(look, len(numbers)) for look in looks]
