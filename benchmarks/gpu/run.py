"""Runs cases one after the other, until all are done or the time is up."""

from __future__ import annotations

import hashlib
import platform
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import attention, lookups, table, whole
from .case import Case
from .clock import Wall
from .limit import Overtime, TooSlow
from .measure import Settings, free, measure, sentence
from .record import Record, Results
from .variants import Make

ROOT = Path(__file__).resolve().parents[2]
DONE, RESTART = 0, 3  # exit statuses of a worker


def all_cases(quick: bool = False) -> list[Case]:
    """Every case, the kinds in turns so that a run which stops early has some of each."""
    kinds = [list(kind.cases()) for kind in (lookups, attention, whole)]
    longest = max(map(len, kinds))
    turns = [kind[k] for k in range(longest) for kind in kinds if k < len(kind)]
    return [case for case in turns if case.quick or not quick]


def run(
    cases: Sequence[Case],
    variants: Callable[[Case], Mapping[str, Make]],
    results: Results,
    clock: Wall,
    settings: Settings,
    deadline: float,
    only: str = "",
    say: Callable[[str], object] = print,
) -> int:
    """Measures what is not in the results yet, of the cases with `only` in their name.

    The results, and their table of all cases, are written after each.

    Where less is left than the longest case of its group took, a case is not begun. One that the deadline (of
    `time.monotonic`) cuts short is left for the next run, unless it had `settings.case`: then more would not help.

    Returns:
        DONE, or RESTART where a new process must go on: the device does not answer, or a compiler was interrupted.
    """
    longest = defaultdict[str, float](float)
    if results.running:
        _fail(results, _named(cases, results.running), "the process ended while it ran")
    results.ceilings = results.ceilings or clock.ceilings()
    for case in _left(cases, results, only):
        start = time.monotonic()
        if deadline - start < max(1.0, 1.2 * longest[case.group]):
            break
        results.begin(case.name)
        try:
            slow = results.slow.get(case.name, {})
            results.add(measure(case, variants(case), clock, settings, deadline, slow))
        except TooSlow as fault:
            results.slow.setdefault(case.name, {})[fault.variant] = fault.why
            results.begin("")
            return RESTART
        except KeyboardInterrupt:
            results.begin("")
            raise
        except Overtime:
            if time.monotonic() - start < settings.case:
                results.begin("")
                break
            _fail(results, case, f"not finished within {time.monotonic() - start:.0f} s")
        except Exception as fault:
            _fail(results, case, sentence(fault))
        longest[case.group] = max(longest[case.group], time.monotonic() - start)
        say(_line(results.records[case.name]))
        _write_table(results, cases)
        if not clock.is_well():
            return RESTART
        free(clock)
    _write_table(results, cases)
    left = _left(cases, results, only)
    say(f"{len(left)} cases left{f': run again to go on, next is {left[0].name}' if left else ''}")
    return DONE


def facts(clock: Wall, quick: bool, tuned: bool) -> dict[str, Any]:
    """What must be the same for results to belong together."""
    return {
        "device": clock.name(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "sources": _sources(),
        "quick": quick,
        "tuned": tuned,
    }


def _version(package: str) -> str:
    module = sys.modules.get(package) or __import__(package)
    return str(module.__version__)


def _sources() -> str:
    """Eight hexadecimal digits that change with what is measured, and with what measures it."""
    digest = hashlib.sha256()
    for folder in ("recompile", "passes", "lowering", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def _named(cases: Sequence[Case], name: str) -> Case:
    return next(case for case in cases if case.name == name)


def _left(cases: Sequence[Case], results: Results, only: str) -> list[Case]:
    return [case for case in cases if only in case.name and case.name not in results.records]


def _fail(results: Results, case: Case, why: str) -> None:
    results.add(Record(case.name, case.group, failed=why))


def _line(record: Record) -> str:
    times = ", ".join(f"{name} {ms:.4g} ms" for name, ms in record.ms.items())
    return f"{record.case}: {record.failed or times or 'nothing was measured'}"


def _write_table(results: Results, cases: Sequence[Case]) -> None:
    results.path.with_suffix(".md").write_text(table.markdown(results, cases))
