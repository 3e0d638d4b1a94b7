"""`make bench`: every case with its target, PASS or SHORT; results in `out/bench.json`.

    python -m benchmarks.run --group ratio,memory --only "bags of 20"

Groups: ratio (speed of single patterns), memory, compile (cold caches), capture, attention, models
(those of the zoo).
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from rich.table import Table

from recompile.bench import terminal
from recompile.measure import THREADS

from . import groups
from .result import Result

GROUPS: dict[str, Callable[[str], Iterator[Result]]] = {
    "ratio": groups.ratios,
    "memory": groups.memory,
    "compile": groups.compile_time,
    "capture": groups.capture,
    "attention": groups.attention,
    "models": groups.models,
}


def main() -> int:
    """Runs the chosen groups; 0 also where a case falls short: the table says so."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--group", default=",".join(GROUPS), help="which groups: ratio,memory")
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--out", type=Path, default=Path("out/bench.json"))
    args = parser.parse_args()
    torch.set_num_threads(THREADS)
    console, results = terminal(), []
    for group in args.group.split(","):
        for result in GROUPS[group](args.only):
            results.append(result)
            console.print(result.line(), markup=False, highlight=False)
            _keep(args.out, results)  # at once: a later case may fail, or take too long
    console.print(_table(results))
    return 0


def _table(results: list[Result]) -> Table:
    table = Table(title=f"{THREADS} threads, torch {torch.__version__}")
    for column in ("case", "Inductor", "recompile", "unit", "figure", "target", "spread", ""):
        table.add_column(column)
    for result in results:
        table.add_row(*result.cells(), style="" if result.passed else "yellow")
    return table


def _keep(out: Path, results: list[Result]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    rows = [{**asdict(result), "passed": result.passed} for result in results]
    record = {"version": 1, "torch": torch.__version__, "threads": THREADS, "results": rows}
    out.write_text(json.dumps(record, indent=2))


if __name__ == "__main__":
    sys.exit(main())
