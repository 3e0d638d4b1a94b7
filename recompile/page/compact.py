"""What the page's script reads: the dump with every text once, its boxes laid out and its differences found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .box import Box
from .diff import blocks
from .tree import is_parameter, tree

LONGEST_SOURCE = 400_000  # characters of one generated file; what is cut off is in the dump's folder
_TEXTS = ("name", "op", "target", "text", "value", "line", "module", "rule", "kernel")


def compact(
    report: Mapping[str, Any], graphs: Sequence[Mapping[str, Any]], sources: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """The content of the page as JSON's types.

    Raises:
        ValueError: not one `sources` for each of `graphs`.
    """
    texts = _Texts()
    content = [_graph(graph, texts, files) for graph, files in zip(graphs, sources, strict=True)]
    return {"report": report, "graphs": content, "texts": list(texts.numbers)}


class _Texts:
    """Numbers for texts, the same for the same text."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def _graph(graph: Mapping[str, Any], texts: _Texts, files: Mapping[str, str]) -> dict[str, Any]:
    return {
        "title": graph["title"],
        "nodes": [_node(node, texts) for node in graph["nodes"]],
        "bytes": _amounts(graph["nodes"], "bytes"),
        "flops": _amounts(graph["nodes"], "flops"),
        "stages": _stages(graph),
        "rewrites": [
            [each["stage"], texts(each["rule"]), [*map(texts, each["old"])], [*map(texts, each["new"])]]
            for each in graph["rewrites"]
        ],
        "sources": {path: _cut(text, path) for path, text in files.items() if path.startswith("kernels/")},
    }


def _amounts(nodes: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """What nodes cost, by index; most cost nothing."""
    return {i: node[key] for i, node in enumerate(nodes) if node.get(key)}


def _node(node: Mapping[str, Any], texts: _Texts) -> list[Any]:
    """Its texts in the order of `_TEXTS`, whether it is a parameter, then what it reads."""
    return [*(texts(node[key]) for key in _TEXTS), int(is_parameter(node)), *map(texts, node["inputs"])]


def _stages(graph: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A stage that changed nothing has neither `order` nor `tree`: those before it hold."""
    found: list[dict[str, Any]] = []
    before: list[int] = []
    for k, stage in enumerate(graph["stages"]):
        entry: dict[str, Any] = {"pass": stage["pass"], "ms": stage["ms"]}
        order = stage["order"]
        if k == 0 or order != before:
            entry |= {"order": order, "tree": _box(tree(graph["nodes"], order))}
            entry["diff"] = blocks(before, order) if k else []
        found.append(entry)
        before = order
    return found


def _box(box: Box) -> Any:
    """A node is its index; a group has only the fields that it needs."""
    if box.node >= 0:
        return box.node
    found: dict[str, Any] = {"l": box.label, "k": box.kind, "c": [_box(child) for child in box.children]}
    if box.rows:
        flat = [number for edge in box.edges for number in edge]
        found |= {"r": box.rows, "e": flat, "i": box.entering, "o": box.leaving}
    return found


def _cut(text: str, path: str) -> str:
    if len(text) <= LONGEST_SOURCE:
        return text
    return f"{text[:LONGEST_SOURCE]}\n... cut after {LONGEST_SOURCE} characters; all of it is in {path} of the dump"
