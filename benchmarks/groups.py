"""The groups of benchmarks; each yields its results one by one, filtered by part of a name."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator

import torch

from recompile.bench import OURS, Row, bench
from recompile.explain import explain
from recompile.measure import interleave, peak_memory_mib
from recompile.zoo import build, names

from . import attention as attention_cases
from .case import Case
from .cases import CASES
from .models.lookups import OneHot
from .result import Result

BASE = "inductor"
COMPILE_TABLES = 1000
_COLD = {**os.environ, "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1"}


def ratios(only: str) -> Iterator[Result]:
    """How many times faster than Inductor each case is."""
    for case in CASES:
        if only in _name(case):
            yield _speed(next(_bench(case)), case.target)


def memory(only: str) -> Iterator[Result]:
    """Peak memory of compiling (without caches) and running each case, over Inductor's; 2% is noise."""
    for index, case in enumerate(CASES):
        name = f"peak memory, {_name(case)}"
        if only in name:
            base, ours = (_child("memory", backend, str(index)) for backend in (BASE, OURS))
            yield Result(name, ours / base, 1.02, False, base, ours, "MiB")


def compile_time(only: str) -> Iterator[Result]:
    """Compile time of many tables in fresh processes without caches, over Inductor's."""
    name = f"compile time, {COMPILE_TABLES} tables"
    if only in name:
        base, ours = (_cold_compile(backend, COMPILE_TABLES) for backend in (BASE, OURS))
        yield Result(name, ours / base, 0.2, False, base, ours, "s")


def capture(only: str) -> Iterator[Result]:
    """Milliseconds of capture and passes a node, at three sizes: the same at each if they are linear."""
    for dynamic in (False, True):
        for tables in (50, 200, 800):
            name = f"capture + passes per node, {tables} tables, {'dynamic batch' if dynamic else 'static'}"
            if only in name:
                ms, nodes = _capture_ms(tables, dynamic)
                yield Result(name, ms / nodes, 1.0, False, recompile=ms)


def models(only: str) -> Iterator[Result]:
    """Whole models of the zoo, one result per batch size, then the geometric means."""
    small: list[float] = []
    large: list[float] = []
    for name in names():
        if only and only not in f"models {name}":
            continue
        built = build(name)
        for row in bench(name, built.model, built.inputs, built.batches, against=[BASE], seconds=1.0):
            (small if row.batch in (1, 64) else large).append(row.ratio[BASE])
            yield _speed(row, 0.97)
    if small:
        yield Result(f"geometric mean of {len(small)}, batch 1 and 64", _mean(small), 1.1)
        yield Result(f"geometric mean of {len(large)}, larger batches", _mean(large), 1.03)


def attention(only: str) -> Iterator[Result]:
    """How many times faster than Inductor each attention is; then padding, memory, and whole sequence models."""
    for case in attention_cases.CASES:
        if only in _name(case):
            yield _speed(next(_bench(case)), case.target)
    yield from _padding(only)
    yield from _attention_memory(only)
    ratios: list[float] = []
    for name, batches in attention_cases.SEQUENCE_MODELS.items():
        if only in f"models {name}":
            built = build(name)
            for row in bench(name, built.model, built.inputs, batches, against=[BASE], seconds=1.0):
                ratios.append(row.ratio[BASE])
                yield _speed(row, 0.97)
    if ratios:
        yield Result(f"geometric mean of {len(ratios)}, sequence models", _mean(ratios), 1.3)


def _padding(only: str) -> Iterator[Result]:
    """Histories of a quarter of the longest on average, against full ones, both with recompile."""
    name = "causal softmax 200x2x32, padded to 25%, against full, batch 64"
    if only in name:
        model, short = attention_cases.padded(64, (200, 2, 32), attention_cases.PADDED)
        _, full = attention_cases.padded(64, (200, 2, 32), 1)
        compiled = torch.compile(model, backend=OURS)
        with torch.no_grad():
            found = interleave({"full": lambda: compiled(*full), "short": lambda: compiled(*short)})
        base, ours = (found.timings[key].median_ms for key in ("full", "short"))
        spread = max(t.spread for t in found.timings.values())
        yield Result(name, found.ratio("full", "short"), 1.8, True, base, ours, spread=spread)


def _attention_memory(only: str) -> Iterator[Result]:
    """What a forward of HSTU needs beyond its inputs, over what it needs with Inductor; then N = 8192 alone."""
    for length, backends, target in ((2048, (BASE, OURS), 1 / 8), (8192, (OURS,), 2048)):
        name = f"memory of HSTU {length}x4x64, batch 1"
        if only in name:
            *base, ours = (_child("attention", backend, str(length)) for backend in backends)
            figure = ours / base[0] if base else ours
            yield Result(name, figure, target, False, *(base or [math.nan]), ours, "MiB")


def _child(*args: str) -> float:
    return peak_memory_mib("-m", "benchmarks.child", *args, env=_COLD)


def _bench(case: Case) -> Iterator[Row]:
    model, inputs = case.build(case.batch)
    return bench(_name(case), model, lambda _: inputs, [case.batch], against=[BASE], train=case.train)


def _name(case: Case) -> str:
    return f"{case.name}, batch {case.batch}"


def _speed(row: Row, target: float) -> Result:
    """A row against Inductor. A wrong answer is no result: it fails whatever its speed.

    Where a gradient is 0 but for rounding, as that of a bias under a softmax, Inductor's error is the yardstick.
    """
    error, allowed = row.error[OURS], max(1e-3, 4 * (row.error[BASE] or 0.0))
    figure = row.ratio[BASE] if error is None or error < allowed else 0.0
    name = row.model if "batch" in row.model else f"{row.model}, batch {row.batch}"
    return Result(name, figure, target, True, row.ms[BASE], row.ms[OURS], spread=max(row.spread.values()))


def _mean(ratios: list[float]) -> float:
    return math.exp(sum(map(math.log, ratios)) / len(ratios))


def _cold_compile(backend: str, tables: int) -> float:
    argv = [sys.executable, "-m", "benchmarks.child", "compile", backend, str(tables)]
    child = subprocess.run(argv, env=_COLD, stdout=subprocess.PIPE, text=True, check=True)
    return float(child.stdout.splitlines()[-1])


def _capture_ms(tables: int, dynamic: bool) -> tuple[float, int]:
    """Milliseconds and Dynamo nodes of one graph, from the report."""
    torch._dynamo.reset()  # otherwise a second number of tables would be a dynamic size
    ids = torch.zeros(64, tables, dtype=torch.int64)
    if dynamic:
        torch._dynamo.mark_dynamic(ids, 0)
    with torch.no_grad():
        graph = explain(OneHot(100, tables, out=8), ids).graphs[0]
    return graph.capture_ms + sum(record.ms for record in graph.passes), graph.nodes_before
