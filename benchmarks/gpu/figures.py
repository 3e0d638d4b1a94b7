"""The figures that targets are set for: of one case, and of several together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from .case import Case, Need
from .record import Record
from .variants import INDUCTOR, OURS

Ceilings = Mapping[str, float]
MEANING = {
    "inductor": "x Inductor",
    "graphs": "x Inductor, both with CUDA graphs",
    "copy": "of a copy's bandwidth",
    "launches": "launches",
    "fbgemm": "x FBGEMM",
    "flash": "x flash",
    "tflops": "TFLOP/s",
}


def best(record: Record, names: Iterable[str]) -> float | None:
    """The least time of these variants in milliseconds; None where none was measured."""
    return min((record.ms[name] for name in names if name in record.ms), default=None)


def value(what: str, record: Record, ceilings: Ceilings) -> float | None:
    """A figure of `Need.what`; None where a measurement is missing.

    A ratio takes the fastest variant of each side; "copy" counts a row for each id (`Work.asked`).
    """
    ours = best(record, OURS)
    if what == "launches":
        return record.launches.get(OURS[0])
    if ours is None:
        return None
    if what == "copy":
        return record.asked / (ours * 1e-3) / ceilings["bytes_per_s"]
    if what == "tflops":
        return record.flops / (ours * 1e-3) / 1e12
    if what == "graphs":
        ours = best(record, (name for name in OURS if "graphs" in name))
        base = best(record, (name for name in INDUCTOR if "graphs" in name))
    else:
        base = best(record, INDUCTOR if what == "inductor" else (what,))
    return base / ours if base and ours else None


def fraction(record: Record, ceilings: Ceilings) -> float | None:
    """How much of the nearer ceiling is reached: least time by bytes and products, over the time measured."""
    ours = best(record, OURS)
    if ours is None:
        return None
    return max(record.bytes / ceilings["bytes_per_s"], record.flops / ceilings["flops_per_s"]) / (ours * 1e-3)


def is_right(record: Record) -> bool:
    """Ours is within what is allowed, however it was compiled."""
    return all(record.errors[name] <= allowed(record) for name in OURS if name in record.errors)


def allowed(record: Record) -> float:
    """The largest error: the case's tolerance, or four times Inductor's own error where that is finite and more."""
    own = record.errors.get(INDUCTOR[0], 0.0)
    return max(record.tolerance, 4 * own if math.isfinite(own) else 0.0)


@dataclass(frozen=True)
class Joint:
    """A figure of several cases together; None where one of them is missing."""

    name: str
    need: Need
    value: float | None


def joint(cases: Iterable[Case], records: Mapping[str, Record], ceilings: Ceilings) -> Iterator[Joint]:
    """The models' mean, HSTU's memory, and compile time by number of tables."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(case.group, []).append(case)
    ratios = [
        value("graphs", records[c.name], ceilings) for c in groups.get("models", ()) if c.name in records
    ]
    known = [ratio for ratio in ratios if ratio is not None]
    mean = math.exp(sum(map(math.log, known)) / len(known)) if known else None
    yield Joint(f"geometric mean of {len(known)} models and batch sizes", Need("graphs", 1.4), mean)

    def over(first: str, last: str, of: Callable[[Record], float | None]) -> float | None:
        found = [of(records[name]) if name in records else None for name in (first, last)]
        return found[1] / found[0] if found[0] and found[1] else None

    for case in (case for case in groups.get("hstu", ()) if "N 8192" in case.name):
        short = case.name.replace("batch 8, N 8192", "batch 64, N 1024")
        memory = over(short, case.name, lambda record: record.peak_mib.get(OURS[0]))
        yield Joint(
            f"{case.name}: memory over that of as many items at N 1024", Need("x", 1.1, False), memory
        )
    few, many = (f"lookup, {n} tables of widths 4 to 128, batch 2048" for n in (800, 10_000))
    compiling = over(few, many, lambda record: record.compile_s.get(OURS[0]))
    yield Joint("compile time of 10,000 tables over that of 800", Need("x", 1.5, False), compiling)
