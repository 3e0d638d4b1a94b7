"""Reads a dump back: the report, and for each graph what `graph.json` and `regions.json` say."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import RecompileError, unknown
from .report import GraphRecord, Report


@dataclass(frozen=True)
class Dump:
    """What a folder holds; `report.graphs[k]` and `graphs[k]` are of the same graph."""

    folder: Path
    report: Report
    graphs: list[dict[str, Any]]

    def main(self) -> int:
        """The graph that matters most: the one with the most nodes, the first of several."""
        return max(range(len(self.graphs)), key=lambda k: self.report.graphs[k].nodes_before)

    def chosen(self, graph: int | None) -> int:
        """`graph` if there is one of this number, the main one for None.

        Raises:
            RecompileError: there is none.
        """
        if not self.graphs:
            raise RecompileError(f"the dump in {self.folder} has no graph", try_="run the model again")
        if graph is not None and not 0 <= graph < len(self.graphs):
            raise RecompileError(
                f"the dump in {self.folder} has no graph {graph}", expected=f"0 to {len(self.graphs) - 1}"
            )
        return self.main() if graph is None else graph

    def record(self, graph: int) -> GraphRecord:
        """The report of one graph."""
        return self.report.graphs[graph]

    def regions(self, graph: int) -> list[dict[str, Any]]:
        """The region operators of one graph's last stage."""
        found: list[dict[str, Any]] = json.loads(
            (self.folder / f"graph-{graph}" / "regions.json").read_text(encoding="utf-8")
        )
        return found

    def region(self, name: str, graph: int | None) -> tuple[int, dict[str, Any]]:
        """(graph, region) of this name, or of `region-2`, the third; in all graphs unless one is given.

        Raises:
            RecompileError: there is none, or several graphs have one.
        """
        within = range(len(self.graphs)) if graph is None else [self.chosen(graph)]
        known = {(g, key): r for g in within for k, r in enumerate(self.regions(g)) for key in _keys(k, r)}
        found = [(g, r) for (g, key), r in known.items() if key == name]
        if not found:
            raise unknown("region", name, {key for _, key in known})
        if len(found) > 1:
            raise RecompileError(
                f"several graphs have a region {name!r}",
                got=f"graphs {', '.join(str(g) for g, _ in found)}",
                try_="--graph with one of them",
            )
        return found[0]


def _keys(k: int, region: dict[str, Any]) -> Iterable[str]:
    return region["name"], f"region-{k}"


def read(folder: Path) -> Dump:
    """The dump in `folder`.

    Raises:
        RecompileError: there is none, or another version of recompile wrote it.
    """
    path = folder / "report.json"
    if not path.is_file():
        raise RecompileError(
            f"{folder} holds no dump",
            expected="a folder with report.json",
            try_='options={"dump": ...}, or RECOMPILE_DUMP',
        )
    report = Report.from_json(path.read_text(encoding="utf-8"))
    files = (folder / f"graph-{k}" / "graph.json" for k in range(len(report.graphs)))
    return Dump(folder, report, [json.loads(file.read_text(encoding="utf-8")) for file in files])
