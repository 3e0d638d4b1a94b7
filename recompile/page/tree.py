"""The groups of a stage: modules inside modules; where a group stays long, the lines of the user's source."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .box import Box, Wires, depths
from .folding import Nodes, fold
from .layout import rows
from .parts import Named, divided

LONG = 24  # boxes in a group, above which it is split by source line
LONGEST = 60  # and above which it is cut into parts
_PARAMETER = re.compile(r"_(parameters|buffers)_")
_SELF = re.compile(r"^(L\['\w+'\]|self)\.?")

Path = tuple[str, ...]
Key = Callable[[int], Named]


def tree(nodes: Nodes, order: Sequence[int]) -> Box:
    """The boxes of one stage, in one group that is always open.

    Parameters and buffers have no box: they would double the picture and say what their readers say.

    Args:
        nodes: all nodes of the graph, as in graph.json.
        order: the stage's nodes, by index.
    """
    shown = [i for i in order if not is_parameter(nodes[i])]
    index = {nodes[i]["name"]: i for i in shown}
    reads = {i: [index[name] for name in nodes[i]["inputs"] if name in index] for i in shown}
    builder = _Tree(nodes, Wires(reads))
    root = Box("", "module", children=builder.children(shown, 0))
    builder.arrange(root)
    return root


def is_parameter(node: Mapping[str, Any]) -> bool:
    """Whether a node is a weight or a buffer of the model, and no input of it."""
    held = node["op"] == "placeholder" and bool(_PARAMETER.search(node["name"] + "_" + str(node["target"])))
    return held or node["op"] == "get_attr"


class _Tree:
    def __init__(self, nodes: Nodes, wires: Wires) -> None:
        self.nodes, self.wires = nodes, wires
        self.paths: dict[int, Path] = {i: self._path(nodes[i]) for i in wires.reads}

    @staticmethod
    def _path(node: Mapping[str, Any]) -> Path:
        if node["op"] in ("placeholder", "output"):
            return ()
        return tuple(filter(None, _SELF.sub("", node["module"]).split(".")))

    def children(self, members: Sequence[int], depth: int) -> list[Box]:
        """The boxes of a group whose nodes share the first `depth` names of their module path."""

        def module(i: int) -> Named:
            path = self.paths[i]
            return ("module", path[depth]) if len(path) > depth else ("node", str(i))

        def module_or_line(i: int) -> Named:
            kind, name = module(i)
            line = self.nodes[i]["line"]
            return (
                ("line", line)
                if kind == "node" and line and self.nodes[i]["op"] == "call_function"
                else (kind, name)
            )

        boxes = self._grouped(members, module, depth)
        if len(boxes) > LONG:
            boxes = self._grouped(members, module_or_line, depth)
        while len(boxes) > LONGEST:
            boxes = self._cut(boxes)
        return boxes

    def _grouped(self, members: Sequence[int], key: Key, depth: int) -> list[Box]:
        names = {i: key(i) for i in members}
        parts = divided(names, self.wires.reads, lambda i, name: self._element(i, name, depth))
        boxes = [self._box(*name, part, depth) for name, part in parts]
        return fold(boxes, self.wires, self.nodes)

    def _box(self, kind: str, label: str, members: list[int], depth: int) -> Box:
        if len(members) == 1:
            return Box(node=members[0])
        if kind == "line":
            return Box(label, kind, children=self._lined(members))
        inner = self.children(members, depth + 1 + label.count("."))
        if len(inner) == 1 and inner[0].kind == "line":  # the whole module is one line: its name says more
            inner = inner[0].children
        if len(inner) > 1:
            return Box(label, kind, children=inner)
        named = inner[0].kind == "module" or (inner[0].kind == "fold" and inner[0].children[0].node < 0)
        if named:
            inner[0].label = f"{label}.{inner[0].label}"
        return inner[0]

    def _lined(self, members: list[int]) -> list[Box]:
        boxes = fold([Box(node=i) for i in members], self.wires, self.nodes)
        while len(boxes) > LONGEST:
            boxes = self._cut(boxes)
        return boxes

    def _cut(self, boxes: list[Box]) -> list[Box]:
        """A long group in parts, from top to bottom."""
        depth = depths(len(boxes), self.wires.between(boxes))
        by_depth = [boxes[k] for k in sorted(range(len(boxes)), key=lambda k: depth[k])]
        size = LONGEST // 2
        parts = [by_depth[k : k + size] for k in range(0, len(boxes), size)]
        return [self._part(part) if len(part) > 1 else part[0] for part in parts]

    def _part(self, boxes: list[Box]) -> Box:
        ends = (boxes[0].leaves[0], boxes[-1].leaves[-1])
        first, last = (
            box.label.split(" … ")[side] if " … " in box.label else box.label or self.nodes[end]["name"]
            for side, box, end in zip((0, -1), (boxes[0], boxes[-1]), ends, strict=True)
        )
        return Box(f"{first} … {last}", "part", children=boxes)

    def _element(self, i: int, name: Named, depth: int) -> Named:
        """`blocks.3` for a node of the module list `blocks`; the name itself for others."""
        kind, label = name
        element = self.paths[i][depth + 1 : depth + 2] if kind == "module" else ()
        return (kind, f"{label}.{element[0]}") if element and element[0].isdigit() else name

    def arrange(self, box: Box) -> None:
        """Fills in edges and rows of a group and of those inside it."""
        for child in box.children:
            self.arrange(child)
        if box.kind in ("node", "fold"):
            return
        box.edges = self.wires.between(box.children)
        box.rows = rows(len(box.children), box.edges)
        box.entering, box.leaving = self.wires.crossing(box.children)
