"""`recompile zoo`: every model equal to eager under recompile, with no more graphs than under Inductor."""

from __future__ import annotations

import logging
import multiprocessing
import warnings
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch._dynamo.utils import counters

from recompile import compare

from .registry import Built, build, names

BASE, OURS, PLAIN = "inductor", "recompile", "aot_eager"
# Relative to the largest magnitude. Tiny batches under a batch norm amplify rounding: then Inductor's own
# distance from eager is the yardstick.
TOLERANCE, SLACK = 1e-4, 4.0
_CAPTION = "ours / Inductor's, or Dynamo's and AOTAutograd's alone where these already settle it"


@dataclass(frozen=True)
class Found:
    """One backend: its error against eager at each batch size, and what Dynamo made of the model."""

    errors: tuple[float, ...]
    graphs: int
    breaks: int


@dataclass(frozen=True)
class Verdict:
    """One model in one mode. `why` says what is wrong, `skipped` why it was not compared; "" if not so.

    `base` is what the model was held against: see `check`.
    """

    model: str
    mode: str
    base: Found | None
    ours: Found | None
    why: str = ""
    skipped: str = ""


def check_all(only: Sequence[str], batches: Sequence[int], scale: float, jobs: int, console: Console) -> int:
    """Check the models whose name contains one of `only` (all if empty); 0 if none regresses, else 1.

    `jobs` processes share the checks: most of a check is Inductor's Python, on one core.
    """
    chosen = [name for name in names() if not only or any(part in name for part in only)]
    verdicts = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        checks = [
            pool.submit(check, name, mode, batches, scale) for name in chosen for mode in ("eval", "train")
        ]
        for done in as_completed(checks):
            verdicts.append(done.result())
            console.print(_line(verdicts[-1]), markup=False, highlight=False)
    console.print(table([done.result() for done in checks]))
    return int(not verdicts or any(verdict.why for verdict in verdicts))


def check(name: str, mode: str, batches: Sequence[int], scale: float) -> Verdict:
    """Compare recompile with eager and Inductor on one model, in "eval" or "train" mode, all batch sizes in a row.

    Inductor, which takes most of the time, compiles only what is not near eager, or has more graphs or breaks than
    Dynamo makes without a compiler behind it: one can only add to their number.
    """
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # models that break the graph say so at length
    built = build(name, scale)
    built.model.train(mode == "train")
    ours, why = _run_or_why(built, OURS, batches)
    if ours is not None and max(ours.errors) <= TOLERANCE:
        plain, _ = _run_or_why(built, PLAIN, batches)
        if plain is not None and not _regression(plain, ours):
            return Verdict(name, mode, plain, ours)
    base, failed = _run_or_why(built, BASE, batches)
    if base is None:  # whatever Inductor cannot compile is no business of ours
        return Verdict(name, mode, None, None, skipped=f"Inductor: {failed}")
    return Verdict(name, mode, base, ours, why=why if ours is None else _regression(base, ours))


def _run_or_why(built: Built, backend: str, batches: Sequence[int]) -> tuple[Found | None, str]:
    try:
        return _run(built, backend, batches), ""
    except Exception as error:
        return None, _short(error)


def table(verdicts: Sequence[Verdict]) -> Table:
    """The verdicts for the terminal."""
    shown = Table("model", "mode", "error", "graphs", "breaks", "verdict", title="zoo", caption=_CAPTION)
    for v in verdicts:
        pairs = [f"{ours} / {base}" for ours, base in zip(_cells(v.ours), _cells(v.base), strict=True)]
        style = "red" if v.why else "dim" if v.skipped else ""
        shown.add_row(v.model, v.mode, *pairs, v.why or v.skipped or "equal", style=style)
    return shown


def _run(built: Built, backend: str, batches: Sequence[int]) -> Found:
    """Compile once, run every batch size. Dropout draws eager's numbers (`fallback_random`)."""
    torch._dynamo.reset()
    counters.clear()
    model, errors = built.model, []
    grad = model.training
    compiled = torch.compile(model, backend=backend)
    with torch._inductor.config.patch(fallback_random=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for batch in batches:
            inputs = built.inputs(batch)
            expected = compare.run(model, model, inputs, grad=grad)
            errors.append(compare.error(compare.run(compiled, model, inputs, grad=grad), expected))
    return Found(tuple(errors), counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))


def _regression(base: Found, ours: Found) -> str:
    for error, theirs in zip(ours.errors, base.errors, strict=True):
        allowed = max(TOLERANCE, SLACK * theirs)
        if not error <= allowed:
            return f"error {error:.0e}, allowed {allowed:.0e}"
    if ours.breaks > base.breaks:
        return f"{ours.breaks - base.breaks} more graph breaks than Inductor"
    if ours.graphs > base.graphs:
        return f"{ours.graphs - base.graphs} more compilations than Inductor"
    return ""


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _cells(found: Found | None) -> list[str]:
    return ["-"] * 3 if found is None else [f"{max(found.errors):.0e}", str(found.graphs), str(found.breaks)]


def _line(verdict: Verdict) -> str:
    return f"{verdict.model} {verdict.mode}: {verdict.why or verdict.skipped or 'equal'}"
