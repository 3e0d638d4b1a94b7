"""Takes down what the passes make of one graph: its nodes, stage by stage, and what each rewrite replaced."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx

from .errors import StrictError
from .journal import Journal
from .node_entry import entry, example, input_entry
from .report import GraphRecord, PassRecord, frame_line
from .torch_private.triton_kernels import launched


@contextmanager
def tolerating(folder: object, strict: bool) -> Iterator[None]:
    """A dump that fails costs no compilation: its error is a warning that names the folder.

    Raises:
        StrictError: instead of the warning, under `strict`.
    """
    try:
        yield
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        if strict:
            raise StrictError(
                f"the dump to {folder} failed", got=got, try_="another folder, or no `dump` option"
            ) from error
        warnings.warn(f"recompile: the dump to {folder} failed: {got}", stacklevel=3)


class Recording:
    """One graph as a dump shows it. `nodes`, `stages` and `rewrites` are those of `graph.json`."""

    def __init__(self, record: GraphRecord, folder: object, strict: bool) -> None:
        self.record, self.folder, self.strict = record, folder, strict
        self.title = ""
        self.nodes: list[dict[str, Any]] = []
        self.stages: list[dict[str, Any]] = []
        self.rewrites: list[dict[str, Any]] = []
        self.inputs: list[dict[str, Any]] = []
        self.regions: list[dict[str, Any]] = []
        self.programs: list[str] = []  # of Inductor, for forward and backward
        self.launches: dict[
            str, tuple[str, str]
        ] = {}  # name and source of the user's Triton kernels, by node
        self._journal = Journal()
        self._numbers: dict[tuple[str, str], int] = {}  # (name, text) -> place in `nodes`
        self._seen: dict[fx.Node, tuple[Any, Any, Any, int]] = {}

    def begin(self, gm: fx.GraphModule, ms: float) -> None:
        """Takes down the captured graph, and follows what happens to it. `ms`: what capture took."""
        with tolerating(self.folder, self.strict):
            self._first(gm, ms)
            self._journal.follow(gm)

    def after(self, gm: fx.GraphModule, done: PassRecord) -> None:
        """Takes down the graph after a pass that ran."""
        with tolerating(self.folder, self.strict):
            before = self._by_name()
            self._stage(done.name, done.ms, gm.graph)
            after = self._by_name()
            for rule, old, new in self._journal.take(before.keys(), after.keys()):
                if done.error:
                    continue  # it was undone
                rule = rule or done.name
                self.rewrites.append({"stage": len(self.stages) - 1, "rule": rule, "old": old, "new": new})
                for name in new:
                    if name not in before:  # a pass may make nodes without a Builder, which notes the rule
                        after[name]["rule"] = after[name]["rule"] or rule

    def fallback(self, gm: fx.GraphModule) -> None:
        """Takes down Dynamo's own graph where it could not be captured."""
        with tolerating(self.folder, self.strict):
            if not self.stages:
                self._first(gm, 0.0)

    def end(self, gm: fx.GraphModule, regions: list[fx.Node]) -> None:
        """Takes down the regions of the final graph, and follows it no longer."""
        with tolerating(self.folder, self.strict):
            self._journal.leave(gm)
            self._launches(gm.graph)
            self.regions = [
                {"name": node.name, "op": str(node.target), "args": example(node.args)} for node in regions
            ]

    def _launches(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            if (kernel := launched(node)) is not None:
                self.launches[node.name] = kernel

    def _first(self, gm: fx.GraphModule, ms: float) -> None:
        self.title = next(filter(None, map(frame_line, gm.graph.nodes)), "")
        self.inputs = [input_entry(node) for node in gm.graph.nodes if node.op == "placeholder"]
        self._stage("captured", ms, gm.graph)

    def _stage(self, name: str, ms: float, graph: fx.Graph) -> None:
        order = [self._number(node) for node in graph.nodes]
        self.stages.append({"pass": name, "ms": round(ms, 3), "order": order})

    def _number(self, node: fx.Node) -> int:
        """The place of this node as it is now. Arguments are new objects where they have changed."""
        seen = self._seen.get(node)
        if seen and seen[0] is node.target and seen[1] is node.args and seen[2] is node.kwargs:
            return seen[3]
        made = entry(node)
        number = self._numbers.setdefault((made["name"], made["text"]), len(self.nodes))
        if number == len(self.nodes):
            self.nodes.append(made)
        self._seen[node] = (node.target, node.args, node.kwargs, number)
        return number

    def _by_name(self) -> dict[str, dict[str, Any]]:
        """The nodes of the last stage."""
        return {self.nodes[number]["name"]: self.nodes[number] for number in self.stages[-1]["order"]}
