"""How long each region's kernel takes inside the compiled program, and how near that is to what the machine can do."""

from __future__ import annotations

import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from functools import cache

import torch
from torch.profiler import ProfilerActivity

from .lowering.fingerprint import digest
from .report import Ceilings, Measured, RegionRecord, Report
from .torch_private.generated_code import kernels

RUNS = 10
_EVENT = re.compile(r"recompile::\w+ graph_\w+ cpp_\w+")
LAUNCH_S = 5e-6  # below this a kernel's time is that of starting it, on two threads


@cache
def ceilings() -> Ceilings:
    """Those of this machine's CPU, by a copy of 64 MB and a product of matrices of 1024 x 1024, float32, with
    torch's number of threads."""
    source, target = torch.ones(16 << 20), torch.empty(16 << 20)
    matrix = torch.ones(1024, 1024)
    copied = _best(lambda: target.copy_(source))
    multiplied = _best(lambda: torch.mm(matrix, matrix))
    return Ceilings(2 * 4 * source.numel() / copied, 2 * 1024**3 / multiplied)


def _best(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(report: Report, programs: list[str], run: Callable[[], object]) -> None:
    """Fills in `measured` of the regions whose kernels the profile shows, `unmeasured` of the others, and `ceilings`.

    Args:
        programs: Inductor's, compiled with `cpp.enable_kernel_profile`, in the order of the report's graphs.
        run: runs the model once.
    """
    times = _times(run)
    regions = [region for graph in report.graphs for region in graph.regions]
    waiting = defaultdict[tuple[str, str], list[RegionRecord]](list)
    for region in regions:
        waiting[region.op.split(".")[1], digest(region.spec)].append(region)
    for kernel in (kernel for program in programs for kernel in kernels(program)):
        name = _EVENT.search(kernel.source)
        alike = waiting[kernel.op, kernel.spec]
        if name is not None and alike and name[0] in times:
            region = alike.pop(0)
            region.measured = _measured(region, times[name[0]])
    for graph in report.graphs:
        if any(region.measured for region in graph.regions):
            graph.ceilings = ceilings()
    for region in regions:
        if region.measured is None:
            region.unmeasured = _why_not(region)


def _why_not(region: RegionRecord) -> str:
    if region.device != "cpu":
        return f"not measured on {region.device}: only kernels on CPUs are"
    return "not measured: the profile shows no kernel of it"


def _times(run: Callable[[], object]) -> dict[str, float]:
    """The median seconds of each of our kernels."""
    found = defaultdict[str, list[float]](list)
    run()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU]) as profile:
        for _ in range(RUNS):
            run()
    for event in profile.events():
        if _EVENT.fullmatch(event.name):
            found[event.name].append(event.cpu_time_total * 1e-6)
    return {name: statistics.median(times) for name, times in found.items()}


def _measured(region: RegionRecord, seconds: float) -> Measured:
    assert region.after is not None
    reached = ceilings()
    memory, compute = region.after.example_bytes / reached.bytes, region.after.example_flops / reached.flops
    if seconds < LAUNCH_S:
        return Measured(seconds * 1e3, "launch", 1.0)
    bound = "memory" if memory > compute else "compute"
    return Measured(seconds * 1e3, bound, max(memory, compute) / seconds)
