"""The lookup cases: tables of one kind on a grid of sizes, and tables of many kinds."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace

from benchmarks.models.lookups import Mixed
from recompile.zoo.data import Data, skewed

from .case import Case, Inputs, Need, Problem, scaled
from .rivals import fbgemm

Field = tuple[int, int, int]  # rows, width, ids a sample
ROWS_OF_MANY = 20_000  # of each of 500 tables: 5 GB at width 128, so that float64 gradients fit beside them
WIDTHS = (4, 8, 16, 32, 64, 128)


def _problem(fields: Sequence[Field], batch: int) -> Problem:
    def inputs() -> Inputs:
        shapes = [(batch,) if ids == 1 else (batch, ids) for _, _, ids in fields]
        return ([skewed(rows, shape, None) for (rows, *_), shape in zip(fields, shapes, strict=True)],)

    # Outputs are the largest thing: their reference is made a part at a time.
    elements = batch * sum(width for _, width, _ in fields)
    rows = max(1, batch // max(1, elements >> 28))
    return Problem(Mixed(fields), inputs, rows)


def _alike(tables: int, width: int, ids: int, batch: int) -> Case:
    """Tables of one width: 26 of the zoo's rows, or more of `ROWS_OF_MANY` each."""

    def build(scale: float) -> Problem:
        rows = (
            Data(scale).tables
            if tables == 26
            else (scaled(ROWS_OF_MANY, scale, 20),) * scaled(tables, scale, 3)
        )
        return _problem([(r, width, ids) for r in rows], scaled(batch, scale, 2))

    needs = [Need("inductor", 3.0), Need("fbgemm", 1.0), Need("launches", 1, at_least=False)]
    if ids > 1 and width >= 64:
        needs.insert(0, Need("copy", 0.75))
    name = f"lookup, {tables} tables of width {width}, {ids} id{'s' * (ids > 1)}, batch {batch}"
    quick = (tables, width, batch) == (26, 64, 65536)
    return Case(name, "lookups", build, tuple(needs), rivals={"fbgemm": fbgemm}, quick=quick)


def mixed(tables: int) -> list[Field]:
    """Fields of a large model: widths 4 to 128, 100 to 20,000 rows, three in ten with 2 to 20 ids; always the same."""
    draw = random.Random(tables)
    fields = []
    for _ in range(tables):
        rows = int(100 * math.exp(draw.random() * math.log(200)))
        width = WIDTHS[int(draw.random() * len(WIDTHS))]
        many, ids = draw.random() < 0.3, 2 + int(draw.random() * 19)
        fields.append((rows, width, ids if many else 1))
    return fields


def _mixed(tables: int, train: bool) -> Case:
    def build(scale: float) -> Problem:
        return _problem(mixed(scaled(tables, scale, 3)), scaled(2048, scale, 2))

    name = f"lookup, {tables} tables of widths 4 to 128, batch 2048" + ", training" * train
    return Case(name, "mixed tables", build, (Need("inductor", 5.0),), train)


def _training(case: Case) -> Case:
    """Forward and backward; the gradients of the tables are dense, as eager's."""
    quick = case.quick and "20 ids" in case.name
    needs, name = (Need("inductor", 2.0),), f"{case.name}, training"
    return replace(
        case, name=name, group="lookups, training", needs=needs, train=True, rivals={}, quick=quick
    )


def cases() -> Iterator[Case]:
    """Forward on the whole grid, tables of many kinds, then training."""
    sizes = [(t, w, i, b) for b in (65536, 2048) for t in (26, 500) for i in (20, 1) for w in (64, 16, 128)]
    grid = [_alike(*size) for size in sizes]
    yield from grid
    yield from (_mixed(tables, train) for tables in (800, 10_000) for train in (False, True))
    yield from map(_training, grid)
