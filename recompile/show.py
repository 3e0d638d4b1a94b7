"""A dump in the terminal: which graph matters, what each pass did to it, and the differences in colour."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .dump_read import Dump
from .errors import RecompileError, unknown
from .report import GraphRecord

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def summary(dump: Dump) -> list[dict[str, Any]]:
    """One entry a graph: title, nodes, milliseconds of capture and passes, stages and regions."""
    return [_graph(dump, k) for k in range(len(dump.graphs))]


def _graph(dump: Dump, index: int) -> dict[str, Any]:
    record, graph = dump.record(index), dump.graphs[index]
    rewrites = Counter((r["stage"], r["rule"]) for r in graph["rewrites"])
    kernels = {n["name"]: n["kernel"] for n in graph["nodes"] if n["kernel"]}
    return {
        "graph": index,
        "title": graph["title"],
        "nodes_before": record.nodes_before,
        "nodes_after": record.nodes_after,
        "ms": round(_ms(record), 1),
        "fallback": record.fallback.why if record.fallback else "",
        "stages": [
            {
                "pass": stage["pass"],
                "ms": stage["ms"],
                "nodes": len(stage["order"]),
                "rewrites": {rule: n for (at, rule), n in rewrites.items() if at == k},
            }
            for k, stage in enumerate(graph["stages"])
        ],
        "regions": [
            {"name": region.name, "summary": region.summary, "kernel": kernels.get(region.name, "")}
            for region in record.regions
        ],
    }


def _ms(record: GraphRecord) -> float:
    return record.capture_ms + sum(entry.ms for entry in record.passes)


def show(dump: Dump, graph: int | None = None) -> RenderableType:
    """All graphs, and the stages and regions of one: the main one unless said."""
    if not dump.graphs:
        return Text(
            "No graph was compiled while this dump was written: what Dynamo had compiled before stayed as it was."
        )
    index, graphs = dump.chosen(graph), summary(dump)
    return Group(_overview(graphs, dump.main()), Text(), *_details(graphs[index]))


def _overview(graphs: list[dict[str, Any]], main: int) -> Table:
    nodes, ms = (sum(g[key] for g in graphs) or 1 for key in ("nodes_before", "ms"))
    table = Table("graph", "frame", "nodes", "", "ms", "", "regions", "", box=None, padding=(0, 2))
    for column in (2, 3, 4, 5, 6):
        table.columns[column].justify = "right"
    for g in graphs:
        table.add_row(
            str(g["graph"]),
            escape(g["title"]),
            f"{g['nodes_before']} -> {g['nodes_after']}",
            f"{g['nodes_before'] / nodes:.0%}",
            f"{g['ms']:.1f}",
            f"{g['ms'] / ms:.0%}",
            str(len(g["regions"])),
            "plain Inductor" if g["fallback"] else "",
            style="bold" if g["graph"] == main and len(graphs) > 1 else None,
        )
    return table


def _details(graph: dict[str, Any]) -> Iterator[RenderableType]:
    yield Text(f"graph {graph['graph']}: {graph['title']}", style="bold")
    if graph["fallback"]:
        yield Text(f"  compiled by plain Inductor: {graph['fallback']}", style="yellow")
    table = Table("stage", "nodes", "ms", "rewrites", box=None, padding=(0, 2))
    for stage in graph["stages"]:
        done = ", ".join(f"{n} x {rule}" for rule, n in stage["rewrites"].items())
        table.add_row(stage["pass"], str(stage["nodes"]), f"{stage['ms']:.1f}", escape(done))
    yield table
    alike: dict[str, list[dict[str, str]]] = defaultdict(list)
    for region in graph["regions"]:
        alike[region["summary"]].append(region)
    for what, regions in alike.items():
        yield Text(f"  {', '.join(region['name'] for region in regions)}: {what}", style="green")
        for region in filter(lambda region: region["kernel"], regions):
            yield Text(f"      graph-{graph['graph']}/{region['kernel']}")


def diffs(dump: Dump, name: str | None = None, graph: int | None = None) -> list[tuple[str, list[str]]]:
    """(pass, lines of a unified diff) for each pass that changed a graph, or for the pass `name` alone.

    Raises:
        RecompileError: no such graph, no such pass, or the pass left the graph as it was.
    """
    index = dump.chosen(graph)
    passes = [stage["pass"] for stage in dump.graphs[index]["stages"]][1:]
    if name is not None and name not in passes:
        raise unknown("pass", name, passes)
    files = sorted((dump.folder / f"graph-{index}").glob("*.diff"))
    found = [(f.stem.partition("-")[2], f.read_text(encoding="utf-8").splitlines()) for f in files]
    wanted = [(each, lines) for each, lines in found if name in (None, each)]
    if name is not None and not wanted:
        changed = ", ".join(each for each, _ in found) or "none"
        raise RecompileError(f"pass {name} left graph {index} as it was", expected=f"one of {changed}")
    return wanted


def coloured(lines: list[str]) -> Iterator[Text]:
    """A diff's lines; its two header lines in bold."""
    for line in lines:
        heading = line.startswith(("--- ", "+++ "))
        yield Text(line, style="bold" if heading else _STYLES.get(line[:1], ""))
