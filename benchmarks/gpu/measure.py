"""Measures one case: compiles each variant, checks it, counts its kernels, then times all of them in turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from types import MappingProxyType

import torch
from torch import Tensor

from recompile.measure import Timing

from .case import Case, Inputs, Problem, tensors, total_bytes
from .check import error, step
from .clock import Wall
from .limit import Overtime, TooSlow, at_most
from .record import Record
from .variants import INDUCTOR, OURS, Make
from .work import work

MOST_SETS = 64  # of inputs; small ones would need thousands to exceed a cache
SAMPLE_S = 2e-3
COUNTED = (OURS[0], INDUCTOR[0])  # whose kernels and memory are counted


@dataclass(frozen=True)
class Settings:
    """`limit` seconds to compile and check a variant, which must begin within `case` seconds of its case's start;
    `seconds` to time all variants. `scale` is for tests."""

    limit: float
    case: float
    seconds: float = 2.0
    rounds: int = 7
    scale: float = 1.0

    @classmethod
    def within(cls, budget: float) -> Settings:
        """Such that a case which is the first of a run is finished in it."""
        return cls(limit=0.2 * budget, case=0.65 * budget)


@dataclass
class _Running:
    """A case being measured."""

    case: Case
    problem: Problem
    clock: Wall
    seeds: list[Tensor]
    record: Record
    steps: dict[str, Callable[[], object]] = field(default_factory=dict)


# One model is compiled many times. Beyond its limit, 8, Dynamo would run it as it is and not say so.
@torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True)
def measure(
    case: Case,
    makers: Mapping[str, Make],
    clock: Wall,
    settings: Settings,
    deadline: float,
    slow: Mapping[str, str] = MappingProxyType({}),
) -> Record:
    """The case's record; a variant that fails is left out, and the record says why.

    Args:
        slow: variants to leave out, and why: those that were too slow before.

    Raises:
        Overtime: the deadline (of `time.monotonic`) passed.
        TooSlow: a variant took too long, and only a new process can be trusted to go on.
    """
    began = time.monotonic()
    torch._dynamo.reset()
    with at_most(deadline - began):
        running = _begin(case, clock, settings.scale)
        sets = _input_sets(running.problem, clock)
    record = running.record
    record.skipped |= slow
    for name, make in makers.items():
        if name in slow:
            continue
        if time.monotonic() - began > settings.case:
            record.skipped[name] = f"no time for it: the others took over {settings.case:.0f} s"
            continue
        prepare = partial(_prepare, name, make, running, sets)
        _try(name, record, prepare, settings.limit, deadline)
        clock.forget()
    _time(running, settings, deadline)
    record.seconds = time.monotonic() - began
    return record


def free(clock: Wall) -> None:
    """Gives back what a case held; to be called when nothing of it is referred to."""
    torch._dynamo.reset()
    gc.collect()
    clock.forget()


def sentence(fault: BaseException) -> str:
    """An exception as one line."""
    lines = [line.strip() for line in str(fault).splitlines() if line.strip()]
    if lines and lines[0].endswith(":"):  # as in "backend='inductor' raised:"
        lines[0] = " ".join(lines[:2])
    return f"{type(fault).__name__}: {lines[0][:300]}" if lines else type(fault).__name__


def _begin(case: Case, clock: Wall, scale: float) -> _Running:
    needed = work(case, scale)
    record = Record(case.name, case.group, case.tolerance, needed.bytes, needed.asked, needed.flops)
    torch.manual_seed(0)
    problem = case.make(clock.device, scale)
    shapes = needed.outputs if case.train else ()
    seeds = [torch.randn(shape, dtype=case.dtype, device=clock.device) for shape in shapes]
    return _Running(case, problem, clock, seeds, record)


def _try(name: str, record: Record, act: Callable[[], None], limit: float, deadline: float) -> None:
    """Notes why `act` failed, if it did.

    Raises:
        Overtime: it is the deadline that passed.
        TooSlow: it took longer than the limit.
    """
    try:
        with at_most(min(limit, deadline - time.monotonic())):
            act()
    except Overtime:
        if time.monotonic() >= deadline:
            raise
        raise TooSlow(name, f"not compiled and checked within {limit:.0f} s") from None
    except Exception as fault:
        record.skipped[name] = sentence(fault)


def _prepare(name: str, make: Make, running: _Running, sets: list[Inputs]) -> None:
    case, problem, clock, record = running.case, running.problem, running.clock, running.record
    variant = make(problem.model)
    run = partial(step, variant.call, problem.model, seeds=running.seeds, train=case.train)
    start = time.monotonic()
    run(inputs=variant.prepare(sets[0]))
    clock.seconds(lambda: None, 1)  # waits for the device
    record.compile_s[name] = time.monotonic() - start
    record.errors[name] = error(problem, variant.call, variant.prepare, running.seeds, case.train)
    turns = cycle([partial(run, inputs=variant.prepare(inputs)) for inputs in sets])
    for _ in range(3):  # CUDA graphs are recorded in the second or third run
        next(turns)()
    if name in COUNTED:
        record.launches[name] = clock.launches(next(turns))
        problem.model.zero_grad(set_to_none=True)
        record.peak_mib[name] = clock.peak_mib(next(turns))
    running.steps[name] = lambda: next(turns)()


def _input_sets(problem: Problem, clock: Wall) -> list[Inputs]:
    """Inputs to take turns with, together twice as large as the L2 cache."""
    first = problem.inputs()
    size = total_bytes(tensors(first))
    more = min(MOST_SETS, math.ceil(2 * clock.l2_bytes / size)) - 1 if size else 0
    return [first, *(problem.inputs() for _ in range(more))]


def _time(running: _Running, settings: Settings, deadline: float) -> None:
    """Medians over rounds; in each every variant runs once, in an order that rotates."""
    clock, record, steps = running.clock, running.record, running.steps
    times: dict[str, int] = {}
    samples: dict[str, list[float]] = {}

    def sample(name: str, into: dict[str, list[float]]) -> None:
        into.setdefault(name, []).append(clock.seconds(steps[name], times.setdefault(name, 1)))

    def calibrate(name: str) -> None:
        once = min(clock.seconds(steps[name], 1) for _ in range(3))
        times[name] = min(1000, math.ceil(SAMPLE_S / max(once, 1e-7)))

    def attempt(name: str, act: Callable[[], None]) -> None:
        _try(name, record, act, settings.limit, deadline)
        if name in record.skipped:
            samples.pop(name, None)
            del steps[name]

    for name in list(steps):
        attempt(name, lambda name=name: calibrate(name))
    end, done = time.monotonic() + settings.seconds, 0
    while steps and (done < settings.rounds or time.monotonic() < end):
        names = list(steps)
        for name in names[done % len(names) :] + names[: done % len(names)]:
            attempt(name, lambda name=name: sample(name, samples))
        done += 1
    for name, seconds in samples.items():
        timing = Timing(name, tuple(seconds))
        record.ms[name], record.spread[name] = timing.median_ms, timing.spread
