"""Fair timing of several callables, and peak memory of a child process.

Machines drift (other jobs, clock speed, caches), so the callables are interleaved: each round runs every one
of them once, in an order that rotates. Two ratios come out: of the medians, and the median of the per-round
ratios; where they disagree the machine was not quiet.
"""

from __future__ import annotations

import gc
import math
import platform
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

THREADS = 2
# A sample shorter than this is repeated: the clock and the loop cost about 0.1 us, 0.02% of it.
SAMPLE_S = 5e-4


@dataclass(frozen=True)
class Timing:
    """One callable's times: seconds per call, one entry a round."""

    name: str
    seconds: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """Median over the rounds, milliseconds."""
        return 1e3 * statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range divided by the median (0.05 = 5%); 0 for a single round."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (high - low) / statistics.median(self.seconds)


@dataclass(frozen=True)
class Comparison:
    """The timings of one interleaved run, by name."""

    timings: Mapping[str, Timing]

    def ratio(self, base: str, new: str) -> float:
        """How many times faster `new` is than `base`: the ratio of their medians."""
        return self.timings[base].median_ms / self.timings[new].median_ms

    def round_ratio(self, base: str, new: str) -> float:
        """The same as the median of the per-round ratios, which a slow drift of the machine does not move."""
        pairs = zip(self.timings[base].seconds, self.timings[new].seconds, strict=True)
        return statistics.median(b / n for b, n in pairs)


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 2.0,
    min_rounds: int = 5,
    warmup: int = 3,
    threads: int = THREADS,
    sync: Callable[[], object] | None = None,
) -> Comparison:
    """Time `calls` against each other for about `seconds`, and for at least `min_rounds` rounds.

    `sync` (such as `torch.cuda.synchronize`) is called before the clock is read.

    Raises:
        ValueError: there is nothing to time.
    """
    if not calls:
        raise ValueError("interleave: expected at least one callable, got none")
    wait = sync or _nothing
    with _quiet(threads):
        inner = {name: _calibrate(call, warmup, wait) for name, call in calls.items()}
        samples = _rounds(calls, inner, seconds, min_rounds, wait)
    return Comparison({name: Timing(name, tuple(times)) for name, times in samples.items()})


def peak_memory_mib(*argv: str, env: Mapping[str, str] | None = None) -> float:
    """Peak resident memory, in MiB, of a fresh `python argv...` that prints `own_peak_mib()` last.

    Compiler processes that the child starts are not counted.

    Raises:
        RuntimeError: the child failed; the text is its error output.
    """
    child = subprocess.run([sys.executable, *argv], env=env, capture_output=True, text=True, check=False)
    if child.returncode:
        raise RuntimeError(f"python {' '.join(argv)} failed:\n{child.stderr}")
    return float(child.stdout.splitlines()[-1])


def own_peak_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    if sys.platform == "linux":
        # ru_maxrss survives exec: a child would report at least its parent's size. VmHWM starts anew.
        status = Path("/proc/self/status").read_text()
        return float(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**10  # type: ignore[index]
    unit = 2**20 if sys.platform == "darwin" else 2**10  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak() -> None:
    """Starts `own_peak_mib` anew from what is held now; Linux only.

    Raises:
        OSError: the system has no such file, or does not let us write to it.
    """
    Path("/proc/self/clear_refs").write_text("5")


def processor() -> str:
    """The processor's name, for a table of results."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


@contextmanager
def _quiet(threads: int) -> Iterator[None]:
    """A fixed number of threads, and no garbage collection inside a sample."""
    before, collecting = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads)
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if collecting:
            gc.enable()


def _calibrate(call: Callable[[], object], warmup: int, wait: Callable[[], object]) -> int:
    """Warm up, then say how many calls fill one sample."""
    for _ in range(max(warmup, 1)):
        call()
    return min(1000, math.ceil(SAMPLE_S / max(_sample(call, 1, wait), 1e-7)))


def _rounds(
    calls: Mapping[str, Callable[[], object]],
    inner: Mapping[str, int],
    seconds: float,
    min_rounds: int,
    wait: Callable[[], object],
) -> dict[str, list[float]]:
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    deadline = time.perf_counter() + seconds
    done = 0
    while done < min_rounds or time.perf_counter() < deadline:
        for name in names:
            samples[name].append(_sample(calls[name], inner[name], wait))
        names = names[1:] + names[:1]
        done += 1
    return samples


def _sample(call: Callable[[], object], inner: int, wait: Callable[[], object]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(inner):
        call()
    wait()
    return (time.perf_counter() - start) / inner


def _nothing() -> None: ...
