"""The offline table: one row a kernel and target, as JSON to compare and as Markdown to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton

from . import attentions, lookups
from .compiling import TARGETS, measured

FOLDER = Path(__file__).parents[1] / "results"
CASES = [f"lookup: {name}" for name in lookups.GROUPS] + [f"attention: {name}" for name in attentions.CALLS]
_HEAD = """# GPU kernels, compiled and not run

Written by `python -m benchmarks.offline` with Triton {triton}; no GPU was involved. Registers are a thread's, shared
memory a program's in bytes, `spilled` the bytes that a thread keeps in memory for want of registers. `occupancy` is
the percentage of the warps that a multiprocessor can hold, by registers, shared memory and warps alone. The rest counts
instructions as they stand in the binary, not as they are executed: those of the matrix unit, loads of 16 bytes and
narrower ones (also asynchronous), asynchronous copies to shared memory, atomics, barriers, special functions (exp,
reciprocal), and all.
"""


def launches(case: str) -> dict[str, Any]:
    """The kernels of a case, by name."""
    kind, name = case.split(": ", 1)
    made = (
        lookups.launches(*lookups.GROUPS[name])
        if kind == "lookup"
        else attentions.launches(*attentions.CALLS[name])
    )
    found: dict[str, Any] = {}
    for launch in made:
        name = launch.name.removeprefix("attention_").removeprefix("lookup_").replace("_", " ")
        name = name if name.startswith("backward") else "forward"
        count = sum(known.startswith(name) for known in found)
        found[f"{case}, {name}" + (f" {count + 1}" if count else "")] = launch
    return found


def digest(launch: Any) -> str:
    """Of a kernel's text, its schedule included."""
    return hashlib.sha256(launch.source.encode()).hexdigest()[:16]


def rows() -> Iterator[dict[str, Any]]:
    """The whole table."""
    for case in CASES:
        for kernel, launch in launches(case).items():
            for target in TARGETS:
                yield row(kernel, launch, target)


def row(kernel: str, launch: Any, target: str) -> dict[str, Any]:
    """One line of the table."""
    return {"kernel": kernel, "target": target, "text": digest(launch), **measured(launch, target)}


def read(folder: Path = FOLDER) -> tuple[str, dict[tuple[str, str], dict[str, Any]]]:
    """(the version of Triton, the rows by kernel and target) of the table that is kept."""
    record = json.loads((folder / "offline.json").read_text())
    return record["triton"], {(r["kernel"], r["target"]): r for r in record["rows"]}


def write(folder: Path = FOLDER) -> None:
    """Compiles everything, which takes minutes, and writes both files."""
    found = list(rows())
    lines = ",\n".join(json.dumps(r) for r in found)
    version = json.dumps(triton.__version__)
    folder.mkdir(exist_ok=True)
    (folder / "offline.json").write_text(f'{{"version": 1, "triton": {version}, "rows": [\n{lines}\n]}}\n')
    (folder / "offline.md").write_text(_markdown(found))


def _markdown(found: list[dict[str, Any]]) -> str:
    columns = [c for c in found[0] if c not in ("kernel", "target", "text")]
    parts = [_HEAD.format(triton=triton.__version__)]
    for target in TARGETS:
        head = ["kernel", *(c.replace("_", " ") for c in columns)]
        lines = [_line(head), _line(["---", *["---:"] * len(columns)])]
        lines += [_line([r["kernel"], *(r[c] for c in columns)]) for r in found if r["target"] == target]
        parts.append("\n".join([f"## {target}", "", *lines, ""]))
    return "\n".join(parts)


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
