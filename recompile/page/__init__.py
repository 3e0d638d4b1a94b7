"""The page of a dump: one HTML file with everything in it, which opens from disk without a network."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from typing import Any

from .compact import compact

__all__ = ["html"]

_SCRIPTS = (
    "text",
    "costs",
    "data",
    "arrange",
    "draw",
    "pane",
    "diff",
    "panel",
    "passes",
    "search",
    "app",
    "walk",
    "actions",
)
_HOLE = re.compile(r"/\*(style|script)\*/|\{(data)\}")


def html(report: dict[str, Any], graphs: list[dict[str, Any]], sources: list[dict[str, str]]) -> str:
    """The page as text; write it as UTF-8.

    Args:
        report: what `Report.to_json()` says; its `graphs` are in the order of `graphs`.
        graphs: the `graph.json` of each graph.
        sources: for each graph, the text of its generated files by path, such as "kernels/lookup.cpp".

    Raises:
        ValueError: not one `sources` for each of `graphs`.
    """
    content = compact(report, graphs, sources)
    # Inside a script element only `<` can end it or open a comment; JSON has it in strings alone.
    data = json.dumps(content, separators=(",", ":")).replace("<", "\\u003c")
    script = "\n".join(_static(f"{name}.js") for name in _SCRIPTS)
    parts = {"style": _static("page.css"), "script": script, "data": data}
    return _HOLE.sub(lambda hole: parts[hole[1] or hole[2]], _static("page.html"))


def _static(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")
