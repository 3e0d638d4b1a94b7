"""What happened to every graph: one record, of which terminal text, JSON and tests are views."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .errors import RecompileError

if TYPE_CHECKING:
    from rich.console import RenderableType

VERSION = 1  # of the record; raised when a field changes its meaning or goes away


@dataclass(frozen=True)
class Refusal:
    """Why something did not happen: a sentence, the node, and the user's line ("" where unknown)."""

    why: str
    node: str = ""
    line: str = ""


@dataclass
class RuleRecord:
    """One rule in one pass: how many candidates it looked at, how many it rewrote, and why not the others."""

    name: str
    tried: int = 0
    fired: int = 0
    refused: list[Refusal] = field(default_factory=list)


@dataclass
class PassRecord:
    """One pass over one graph. `ms` includes its checks.

    `error` says why it was undone and `skipped` why it did not run; "" if neither happened.
    """

    name: str
    numerics: str
    nodes_before: int = 0
    nodes_after: int = 0
    ms: float = 0.0
    rules: list[RuleRecord] = field(default_factory=list)
    error: str = ""
    skipped: str = ""


@dataclass(frozen=True)
class CostRecord:
    """Bytes moved and operations, as expressions in the dynamic sizes, and as numbers for the example inputs."""

    bytes: str
    flops: str
    example_bytes: int
    example_flops: int


@dataclass(frozen=True)
class Measured:
    """The median time of a region's kernel, the bound that it sits under ("memory", "compute" or "launch"), and how
    much of it is reached: 1 is as fast as a large copy, or a large product, on this machine."""

    ms: float
    bound: str
    reached: float


@dataclass(frozen=True)
class Ceilings:
    """What a machine reaches: bytes a second in a large copy, operations a second in a large product."""

    bytes: float
    flops: float


@dataclass
class RegionRecord:
    """A region operator in the final graph, and the user's lines that it computes.

    `spec` is the operator's, as text (see `recompile/lowering/*/spec.py`).
    `reads` has dtype and shape of the nodes it reads, `writes` of the results that the graph reads.
    `before` is what the nodes cost that it replaced, each by itself (see `cost.py`), `after` what it costs, and `bound`
    what limits that on any CPU: "launch", "memory", "compute", or "" where it depends on the CPU.
    `kernel` is its file, seen from the dump's folder, where one was written. After `explain(profile=True)` there is
    `measured`, or a reason in `unmeasured`.
    """

    name: str
    op: str
    tables: int = 0
    summary: str = ""
    lines: list[str] = field(default_factory=list)
    spec: str = ""
    device: str = ""
    reads: dict[str, str] = field(default_factory=dict)
    writes: list[str] = field(default_factory=list)
    before: CostRecord | None = None
    after: CostRecord | None = None
    bound: str = ""
    kernel: str = ""
    measured: Measured | None = None
    unmeasured: str = ""


@dataclass
class GraphRecord:
    """One graph from Dynamo. `fallback` says why plain Inductor compiled it, None if it did not.

    `chosen` is the option `passes` that gives the passes that ran, settings and all.
    `ceilings` are there where a region was measured; they give a time for the bytes and operations of any node.
    """

    index: int = 0
    nodes_before: int = 0
    nodes_after: int = 0
    capture_ms: float = 0.0
    chosen: str = ""
    passes: list[PassRecord] = field(default_factory=list)
    regions: list[RegionRecord] = field(default_factory=list)
    fallback: Refusal | None = None
    ceilings: Ceilings | None = None


@dataclass
class Report:
    """All graphs of a compilation, or of a process."""

    version: int = VERSION
    graphs: list[GraphRecord] = field(default_factory=list)

    def to_json(self) -> str:
        """The whole record as JSON; `version` tells which fields to expect."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The record that `to_json` wrote.

        Raises:
            RecompileError: the text is of another version.
        """
        found = json.loads(text)
        if found["version"] != VERSION:
            raise RecompileError(
                "the report is of another version of recompile",
                expected=str(VERSION),
                got=str(found["version"]),
            )
        return cls(graphs=[_graph_record(graph) for graph in found["graphs"]])

    def text(self, width: int = 110) -> str:
        """The report as plain text, `width` characters wide."""
        from .report_text import plain

        return plain(self, width)

    def __rich__(self) -> RenderableType:
        from .report_text import render

        return render(self)


def _graph_record(found: dict[str, Any]) -> GraphRecord:
    parts: dict[str, Any] = {
        "fallback": found["fallback"] and Refusal(**found["fallback"]),
        "ceilings": found.get("ceilings") and Ceilings(**found["ceilings"]),
        "regions": list(map(_region_record, found["regions"])),
        "passes": [
            PassRecord(**{**p, "rules": list(map(_rule_record, p["rules"]))}) for p in found["passes"]
        ],
    }
    return GraphRecord(**{**found, **parts})


def _region_record(found: dict[str, Any]) -> RegionRecord:
    parts = {"before": CostRecord, "after": CostRecord, "measured": Measured}
    return RegionRecord(
        **{**found, **{key: found[key] and kind(**found[key]) for key, kind in parts.items()}}
    )


def _rule_record(found: dict[str, Any]) -> RuleRecord:
    return RuleRecord(**{**found, "refused": [Refusal(**refusal) for refusal in found["refused"]]})


_lock = threading.Lock()
_graphs: list[GraphRecord] = []
_collector: ContextVar[list[GraphRecord] | None] = ContextVar("recompile_collector", default=None)


def new_graph() -> GraphRecord:
    """A fresh record, already part of `last_report()` and of the collectors of this thread."""
    collected = _collector.get()
    with _lock:
        record = GraphRecord(index=len(_graphs))
        _graphs.append(record)
    if collected is not None:
        collected.append(record)
    return record


def forget(record: GraphRecord) -> None:
    """Takes back a record of this thread: Dynamo will trace its graph again."""
    for records in (_graphs, _collector.get() or []):
        with _lock:
            records[:] = [r for r in records if r is not record]


def last_report() -> Report:
    """The graphs compiled in this process, oldest first, since it started or since `reset()`."""
    with _lock:
        return Report(graphs=list(_graphs))


def reset() -> None:
    """Forget the graphs compiled so far."""
    with _lock:
        _graphs.clear()


@contextmanager
def collect() -> Iterator[Report]:
    """A report of just the graphs that this thread compiles inside the `with` block."""
    report = Report()
    token = _collector.set(report.graphs)
    try:
        yield report
    finally:
        _collector.reset(token)


_FRAME = re.compile(r'File "([^"]+)", line (\d+), in (.+)\n\s*(.*)')
_TORCH = os.path.dirname(os.path.realpath(torch.__file__)) + os.sep
_OURS = os.path.dirname(os.path.realpath(__file__)) + os.sep
_ZOO = os.path.join(_OURS, "zoo", "")  # models, as a user writes them


def user_line(node: fx.Node) -> str:
    """The line of the user's model that made `node`, such as `model.py:41 in forward: x = self.e(x)`.

    It is the innermost frame of the node's stack trace that is neither torch's nor ours, or "". A line of a notebook's
    cell is `In[3]:41`.
    """
    frames = _user_frames(node.meta.get("stack_trace") or "")
    if not frames:
        return ""
    path, number, function, code = frames[-1]
    return f"{_place(path)}:{number} in {function}: {code.strip()}"


def frame_line(node: fx.Node) -> str:
    """The same for the function whose frame Dynamo compiled, such as `forward model.py:41`: the outermost frame."""
    frames = _user_frames(node.meta.get("stack_trace") or "")
    return f"{frames[0][2]} {_place(frames[0][0])}:{frames[0][1]}" if frames else ""


def _place(path: str) -> str:
    """A file's name. IPython compiles a cell under a made-up one, and knows its number."""
    ipython = sys.modules.get("IPython")  # who runs in it has imported it
    shell = ipython and ipython.get_ipython()
    cell = shell and shell.compile.format_code_name(path)
    return cell[1] if cell else os.path.basename(path)


@lru_cache(maxsize=4096)  # many nodes come from one line
def _user_frames(trace: str) -> list[tuple[str, str, str, str]]:
    """(path, line number, function, code) of the frames that are neither torch's nor ours, outermost first."""
    frames: list[tuple[str, str, str, str]] = _FRAME.findall(trace)
    return [frame for frame in frames if _is_users(os.path.realpath(frame[0]))]


def _is_users(path: str) -> bool:
    return path.startswith(_ZOO) or not path.startswith((_TORCH, _OURS))
