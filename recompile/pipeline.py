"""Runs the passes over a graph, checks each, takes back what failed, and writes the record."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Iterable, Sequence
from typing import Any

from torch import fx

from .errors import StrictError
from .ledger import Ledger
from .numerics import LEVELS, Numerics
from .options import Options
from .pass_list import ordered, parse_passes, spelled
from .recording import Recording
from .report import GraphRecord, PassRecord
from .rewrite import Context, Pass
from .verify import Snapshot

__all__ = ["ordered", "parse_passes", "run_passes"]

log = logging.getLogger("recompile")


def run_passes(
    gm: fx.GraphModule,
    options: Options,
    record: GraphRecord,
    example_inputs: Sequence[Any] = (),
    passes: Iterable[Pass] | None = None,
    recording: Recording | None = None,
) -> Ledger:
    """Runs the passes over `gm.graph`, in place, and records each in `record.passes`; the costs of what they replaced.

    A pass that raises, or that breaks the graph, is undone and recorded; the others still run.

    Args:
        example_inputs: real inputs, for `verify="numerics"`.
        passes: what runs; by default what `options.passes` names.
        recording: takes down the graph after each pass, for a dump.

    Raises:
        OptionError: `options.passes` names something unknown.
        PassOrderError: the passes' order has a cycle.
        StrictError: a pass failed, under `strict`.
    """
    chosen = ordered(parse_passes(options.passes) if passes is None else passes)
    record.chosen = spelled(chosen)
    numerics = Numerics(gm, example_inputs) if options.verify == "numerics" else None
    snapshot, ledger = Snapshot(gm.graph), Ledger(gm.graph)
    for each in chosen:
        entry = PassRecord(each.name(), each.numerics, nodes_before=len(gm.graph.nodes))
        record.passes.append(entry)
        start = time.perf_counter()
        if LEVELS.index(each.numerics) > LEVELS.index(options.numerics):
            entry.skipped = f"its numerics are {each.numerics}, and {options.numerics} was asked for"
        else:
            ctx = Context(options, account=ledger.after)
            snapshot = _run(each, gm, ctx, entry, snapshot, numerics)
            ledger.after(gm.graph)
        entry.nodes_after = len(gm.graph.nodes)
        entry.ms = (time.perf_counter() - start) * 1e3
        if recording is not None and not entry.skipped:
            recording.after(gm, entry)
    gm.recompile()
    return ledger


def _run(
    each: Pass,
    gm: fx.GraphModule,
    ctx: Context,
    entry: PassRecord,
    snapshot: Snapshot,
    numerics: Numerics | None,
) -> Snapshot:
    """Runs one pass, or leaves the graph as it was; returns a snapshot of the result."""
    try:
        each.run(gm.graph, ctx)
        entry.rules = list(ctx.rules.values())
        if snapshot.is_current(gm.graph):
            return snapshot
        gm.graph.lint()
        if ctx.options.verify != "none":
            snapshot.check(gm.graph)
        if numerics is not None:
            numerics.check(gm, each.numerics, snapshot)
    except Exception as error:
        snapshot.restore(gm)
        _failed(entry, error, strict=ctx.options.strict)
    return Snapshot(gm.graph)


def _failed(entry: PassRecord, error: Exception, strict: bool) -> None:
    entry.error = f"{type(error).__name__}: {error}"
    entry.rules = []  # what it did was undone
    log.debug("%s", "".join(traceback.format_exception(error)))
    if strict:
        raise StrictError(f"pass {entry.name} failed", got=entry.error) from error
    log.warning("pass %s failed and was undone: %s", entry.name, entry.error)
