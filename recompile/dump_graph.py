"""The files of one graph in a dump: its stages as text and as diffs, its kernels, and all of it as JSON."""

from __future__ import annotations

import difflib
import json
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

from .lowering.fingerprint import digest
from .recording import Recording
from .report import RegionRecord
from .torch_private.generated_code import Kernel, is_backward, kernels, language
from .wording import counted, plural

VERSION = 1  # of graph.json; raised when a field changes its meaning or goes away
OWN_FILES = ("graph.json", "inputs.json", "regions.json", "[0-9]*-*.py", "[0-9]*-*.diff", "kernels/*")
_COMMENT = {"py": "#", "cpp": "//"}


def files(recording: Recording, index: int) -> dict[str, str]:
    """Text by path inside the graph's folder. The last stage and the report are told the regions' kernels."""
    made = dict(_stages(recording, index))
    sources = _kernels(recording, index)
    kernels_of = {recording.nodes[n]["name"]: recording.nodes[n]["kernel"] for n in _last(recording)}
    for region in recording.record.regions:
        if file := kernels_of.get(region.name):
            region.kernel = f"graph-{index}/{file}"
    graph = {
        "version": VERSION,
        "index": index,
        "title": recording.title,
        "nodes": recording.nodes,
        "stages": recording.stages,
        "rewrites": recording.rewrites,
    }
    made["graph.json"] = json.dumps(graph, separators=(",", ":"))
    made["inputs.json"] = _lines_of(recording.inputs)
    made["regions.json"] = _lines_of(recording.regions)
    return made | sources


def readable(nodes: Iterable[dict[str, Any]]) -> list[str]:
    """A stage as lines of Python: inputs as parameters, one line a node, and the user's line above its nodes."""
    nodes = list(nodes)
    inputs = [f"    {_declared(n)},  # {n['text']}" for n in nodes if n["op"] == "placeholder"]
    lines, last = ["def forward(", *inputs, "):"], ""
    for node in nodes:
        if node["op"] == "placeholder":
            continue
        if node["line"] and node["line"] != last:
            last = node["line"]
            lines.append(f"    # {last}")
        call = node["text"] if node["op"] == "output" else f"{_declared(node)} = {node['text']}"
        lines.append(f"    {call}" + (f"  # {node['rule']}" if node["rule"] else ""))
    return lines


def _declared(node: dict[str, Any]) -> str:
    return f"{node['name']}: {node['value']}" if node["value"] else str(node["name"])


def _lines_of(entries: list[dict[str, Any]]) -> str:
    """A JSON list with one entry a line."""
    return "[" + ",\n ".join(map(json.dumps, entries)) + "]\n"


def _stages(recording: Recording, index: int) -> Iterator[tuple[str, str]]:
    """The text of each stage that differs from the one before, and the difference."""
    before: list[str] = []
    last = ""
    for k, stage in enumerate(recording.stages):
        if k and stage["order"] == recording.stages[k - 1]["order"]:
            continue
        name = f"{k:02}-{stage['pass']}"
        lines = readable(recording.nodes[n] for n in stage["order"])
        head = f"graph {index}, {stage['pass']}: {plural(len(stage['order']), 'node')}, {stage['ms']:.1f} ms"
        yield f"{name}.py", "\n".join([f"# {head}", f"# {recording.title or 'frame unknown'}", *lines, ""])
        if k:
            difference = difflib.unified_diff(before, lines, last, name, lineterm="")
            yield f"{name}.diff", "\n".join([*difference, ""])
        before, last = lines, name


def _kernels(recording: Recording, index: int) -> dict[str, str]:
    """Inductor's programs, and the kernels of our regions in them."""
    made: dict[str, str] = {}
    for program in recording.programs:
        way = "backward" if is_backward(program) else "forward"
        suffix = language(program)
        name = _free("kernels/inductor" + "-backward" * (way == "backward"), suffix, made)
        made[name] = f"{_COMMENT[suffix]} Inductor's program of graph {index}, {way}\n{program}"
    last = {recording.nodes[n]["name"]: recording.nodes[n] for n in _last(recording)}
    for kernel, region in _assigned(recording):
        stem = region["name"] + "-backward" * kernel.is_backward if region else kernel.name
        name = _free(f"kernels/{stem}", kernel.suffix, made)
        node = last.get(region["name"]) if region else None
        made[name] = _headed(kernel, node, recording, last)
        if node and not kernel.is_backward:
            node["kernel"] = node["kernel"] or name
    made |= _launched(recording, last)
    return made


def _launched(recording: Recording, last: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The user's own Triton kernels, each once. Nodes of the last stage are told theirs."""
    users: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for name, kernel in recording.launches.items():
        if name in last:
            users[kernel].append(last[name])
    made: dict[str, str] = {}
    for (kernel_name, source), nodes in users.items():
        name = _free(f"kernels/your-{kernel_name}", "py", made)
        lines = [f"your Triton kernel {kernel_name}, launched by {', '.join(n['name'] for n in nodes)}"]
        lines += dict.fromkeys(n["line"] for n in nodes if n["line"])
        made[name] = "\n".join([*(f"# {line}" for line in lines), "", source])
        for node in nodes:
            node["kernel"] = name
    return made


def _last(recording: Recording) -> list[int]:
    return recording.stages[-1]["order"] if recording.stages else []


def _free(stem: str, suffix: str, taken: dict[str, str]) -> str:
    names = (f"{stem}{f'-{n}' if n else ''}.{suffix}" for n in range(len(taken) + 1))
    return next(name for name in names if name not in taken)


def _assigned(recording: Recording) -> Iterator[tuple[Kernel, dict[str, Any] | None]]:
    """Each kernel with its region: the next of those with its spec, None where that is not known.

    Regions with the same spec come in the graph's order, as Inductor keeps it, and their gradients in reverse.
    A Triton kernel does not tell its spec; it belongs to the only region there is.
    """
    served: Counter[tuple[str, str]] = Counter()
    for program in recording.programs:
        for kernel in kernels(program):
            fitting = [region for region in recording.regions if _fits(kernel, region)]
            fitting = fitting[::-1] if kernel.is_backward else fitting
            key = kernel.op, kernel.spec
            sure = fitting and (kernel.spec or len(fitting) == 1)
            yield kernel, fitting[served[key] % len(fitting)] if sure else None
            served[key] += 1


def _fits(kernel: Kernel, region: dict[str, Any]) -> bool:
    family = region["op"].split(".")[1].removesuffix("_triton")
    same = kernel.op.removesuffix("_backward") == family
    return same and kernel.spec in ("", digest(str(region["args"][-1])))


def _headed(
    kernel: Kernel, node: dict[str, Any] | None, recording: Recording, nodes: dict[str, dict[str, Any]]
) -> str:
    """A kernel's source under a comment: region, rule, shapes, the user's lines."""
    lines = [f"recompile::{kernel.op}, called {kernel.name} in Inductor's program"]
    if node:
        record = next((r for r in recording.record.regions if r.name == node["name"]), RegionRecord("", ""))
        lines.append(f"{'gradients of ' * kernel.is_backward}region {node['name']}, made by {node['rule']}")
        lines += textwrap.wrap(record.summary, 100, initial_indent="  ", subsequent_indent="    ")
        reads = counted(nodes[name]["value"] for name in node["inputs"])
        lines += textwrap.wrap(
            f"{reads} -> {node['value']}", 100, initial_indent="  ", subsequent_indent="    "
        )
        lines += record.lines
    comment = _COMMENT[kernel.suffix]
    head = "\n".join(f"{comment} {line}" for line in lines)
    return f"{head}\n\n{kernel.source}"
