"""Measured results as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from . import figures
from .case import Case, Need
from .record import Record, Results
from .variants import INDUCTOR, OURS

FIGURE = ("figure", "", "target", "verdict")
TIMES = ("recompile ms", "Inductor ms", "eager ms")
HEAD = ("case", *FIGURE, *TIMES, "of the ceiling", "launches", "TFLOP/s", "error")


def markdown(results: Results, cases: Sequence[Case]) -> str:
    """The table: a line for each target, then figures of several cases, then what failed and what is left."""
    lines = [f"# {results.facts['device']}", "", *(f"- {key}: {fact}" for key, fact in results.facts.items())]
    lines += [f"- measured ceiling, {key}: {number:.4g}" for key, number in results.ceilings.items()]
    lines += ["", "How to read this: docs/gpu.md.", "", *row(HEAD), *row(["---"] * len(HEAD))]
    done = [case for case in cases if case.name in results.records]
    for case in done:
        lines += _lines(case, results.records[case.name], results)
    lines += ["", *row(("together", *FIGURE)), *row(["---"] * 5)]
    for joint in figures.joint(cases, results.records, results.ceilings):
        lines += row((joint.name, *_figure(joint.need, joint.value, right=True)))
    lines += [
        "",
        *_troubles(done, results),
        f"Left to measure: {len(cases) - len(done)} of {len(cases)} cases.",
    ]
    return "\n".join(lines) + "\n"


def row(cells: Sequence[str]) -> list[str]:
    """One line of a table."""
    return ["| " + " | ".join(cells) + " |"]


def _lines(case: Case, record: Record, results: Results) -> Iterator[str]:
    right = figures.is_right(record)
    for need in case.needs:
        figure = figures.value(need.what, record, results.ceilings)
        yield from row([case.name, *_figure(need, figure, right), *_shared(case, record, results)])


def _figure(need: Need, value: float | None, right: bool) -> list[str]:
    target = f"{'>=' if need.at_least else '<='} {need.target:g}"
    if value is None:
        return [figures.MEANING.get(need.what, need.what), "", target, "NO FIGURE"]
    verdict = ("PASS" if need.met(value) else "SHORT") if right else "WRONG"
    return [figures.MEANING.get(need.what, need.what), f"{value:.3g}", target, verdict]


def _shared(case: Case, record: Record, results: Results) -> list[str]:
    """What is said of a case beside its figures."""
    times = [figures.best(record, names) for names in (OURS, INDUCTOR, ("eager", "eager graphs"))]
    part = figures.fraction(record, results.ceilings)
    kernels = record.launches.get(OURS[0])
    flops = figures.value("tflops", record, results.ceilings) if case.group in ("hstu", "softmax") else None
    worst = max((record.errors[name] for name in OURS if name in record.errors), default=None)
    return [
        *("" if ms is None else f"{ms:.4g}" for ms in times),
        "" if part is None else f"{part:.0%}",
        "" if kernels is None else str(kernels),
        "" if flops is None else f"{flops:.0f}",
        "" if worst is None else f"{worst:.0e}, allowed {figures.allowed(record):.0e}",
    ]


def _troubles(done: Sequence[Case], results: Results) -> Iterator[str]:
    for case in done:
        record = results.records[case.name]
        if record.failed:
            yield f"- {case.name}: {record.failed}"
        yield from (f"- {case.name}, {name}: {why}" for name, why in record.skipped.items())
    yield ""
