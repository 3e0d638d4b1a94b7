"""A stage of a dump for other viewers: DOT for Graphviz, and the JSON of Model Explorer."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from .dump_read import Dump
from .errors import unknown

_REGION, _FILL = "recompile.", "lightgreen"


def export(dump: Dump, form: str, graph: int | None = None, name: str | None = None) -> str:
    """One graph after one pass, the last one unless said.

    Args:
        form: "dot" or "model-explorer".
        graph: its number; the one with the most nodes for None.
        name: the pass.

    Raises:
        RecompileError: the dump has no such graph, or no such pass ran.
    """
    index = dump.chosen(graph)
    found = dump.graphs[index]
    stages = {stage["pass"]: stage for stage in found["stages"]}
    if name is not None and name not in stages:
        raise unknown("pass", name, stages)
    stage = stages[name] if name is not None else found["stages"][-1]
    nodes = [found["nodes"][k] for k in stage["order"]]
    return FORMS[form](nodes, f"graph {index} after {stage['pass']}")


def dot(nodes: list[dict[str, Any]], title: str) -> str:
    """Boxes with the operator and its value; regions are filled."""
    lines = [f"digraph {_quoted(title)} {{", "  node [shape=box, fontname=monospace];"]
    for node in nodes:
        label = "\n".join(filter(None, (f"{node['name']}: {node['target']}", node["value"], node["line"])))
        look = f", style=filled, fillcolor={_FILL}" if node["target"].startswith(_REGION) else ""
        lines.append(f"  {_quoted(node['name'])} [label={_quoted(label)}{look}];")
    lines += [f"  {_quoted(a)} -> {_quoted(b)};" for a, b in _edges(nodes)]
    return "\n".join([*lines, "}", ""])


def model_explorer(nodes: list[dict[str, Any]], title: str) -> str:
    """Layers are module paths; source line, rule and text are attributes; regions are filled."""
    known = {node["name"] for node in nodes}
    shown = [
        {
            "id": node["name"],
            "label": node["target"],
            "namespace": node["module"].replace(".", "/"),
            "attrs": [
                {"key": key, "value": node[key]} for key in ("text", "line", "rule", "kernel") if node[key]
            ],
            "incomingEdges": [
                {"sourceNodeId": name, "sourceNodeOutputId": "0", "targetNodeInputId": str(k)}
                for k, name in enumerate(node["inputs"])
                if name in known
            ],
            "outputsMetadata": [{"id": "0", "attrs": [{"key": "tensor_shape", "value": node["value"]}]}],
            **({"style": {"backgroundColor": _FILL}} if node["target"].startswith(_REGION) else {}),
        }
        for node in nodes
    ]
    return json.dumps({"label": title, "graphs": [{"id": title, "nodes": shown}]}, indent=1)


FORMS: dict[str, Callable[[list[dict[str, Any]], str], str]] = {
    "dot": dot,
    "model-explorer": model_explorer,
}


def _edges(nodes: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    known = {node["name"] for node in nodes}
    return ((name, node["name"]) for node in nodes for name in node["inputs"] if name in known)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\l")
    return f'"{escaped}"'
