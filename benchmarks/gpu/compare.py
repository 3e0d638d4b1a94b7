"""Two runs side by side: of the same version they show the noise, of two versions what changed."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from . import figures
from .record import Results
from .table import row
from .variants import INDUCTOR, OURS


def compare(first: Results, second: Results) -> str:
    """As Markdown: the best times of both runs, and the second over the first."""
    head = ("case", "side", "first ms", "second ms", "second / first")
    lines, ratios = [*row(head), *row(["---"] * len(head))], []
    for name, side, before, after in _pairs(first, second):
        ratios.append(after / before)
        lines += row((name, side, f"{before:.4g}", f"{after:.4g}", f"{ratios[-1]:.3f}"))
    if not ratios:
        return "The two runs have no case in common.\n"
    apart = [abs(ratio - 1) for ratio in ratios]
    differ = [key for key in first.facts if first.facts[key] != second.facts.get(key)]
    lines += ["", f"They differ in: {', '.join(differ) or 'nothing but time'}."]
    lines += [f"Difference: median {statistics.median(apart):.1%}, largest {max(apart):.1%}."]
    return "\n".join(lines) + "\n"


def _pairs(first: Results, second: Results) -> Iterator[tuple[str, str, float, float]]:
    for name in first.records.keys() & second.records.keys():
        for side, names in (("recompile", OURS), ("Inductor", INDUCTOR)):
            before, after = (figures.best(results.records[name], names) for results in (first, second))
            if before is not None and after is not None:
                yield name, side, before, after
