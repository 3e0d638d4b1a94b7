"""The device that is measured: its clock, its counters and its two ceilings."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


class Wall:
    """A CPU, by the wall clock: for tests of what does not depend on a GPU."""

    device = "cpu"
    l2_bytes = 0
    copied, side = MIB, 128  # bytes, rows: what the ceilings are measured with

    def name(self) -> str:
        """The device's."""
        return platform.machine()

    def seconds(self, call: Callable[[], object], times: int) -> float:
        """Of one call, where `times` of them follow each other."""
        start = time.perf_counter()
        for _ in range(times):
            call()
        return (time.perf_counter() - start) / times

    def launches(self, call: Callable[[], object]) -> int | None:
        """Kernels that a call starts; None where there are none to count."""
        return None

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        """The most memory that a call needs beyond what is held before it, its outputs included."""
        return None

    def is_well(self) -> bool:
        """Whether the device still answers: after a bad access no later kernel runs in this process."""
        return True

    def forget(self) -> None:
        """Gives back memory that nothing holds."""

    def ceilings(self) -> dict[str, float]:
        """Bytes a second of a large copy, read and written, and bfloat16 operations a second of a large product."""
        source = torch.ones(self.copied, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        matrix = torch.randn(self.side, self.side, device=self.device, dtype=torch.bfloat16)
        copied = self._median(lambda: target.copy_(source))
        multiplied = self._median(lambda: matrix @ matrix)
        return {"bytes_per_s": 2 * self.copied / copied, "flops_per_s": 2 * self.side**3 / multiplied}

    def _median(self, call: Callable[[], object]) -> float:
        self.seconds(call, 10)
        return statistics.median(self.seconds(call, 10) for _ in range(10))


class Cuda(Wall):
    """An NVIDIA GPU, by CUDA events."""

    device = "cuda"
    copied, side = 2**31, 8192

    def __init__(self) -> None:
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def name(self) -> str:
        return torch.cuda.get_device_name(0)

    def seconds(self, call: Callable[[], object], times: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(times):
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / times

    def launches(self, call: Callable[[], object]) -> int | None:
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            call()
            torch.cuda.synchronize()
        return sum(map(_is_kernel, profiled.events())) or None  # none where the profiler sees no GPU

    def peak_mib(self, call: Callable[[], object]) -> float | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB

    def is_well(self) -> bool:
        try:
            torch.zeros(1, device="cuda").item()
        except RuntimeError as error:
            return isinstance(error, torch.OutOfMemoryError)
        return True

    def forget(self) -> None:
        with suppress(RuntimeError):  # a device that does not answer is found by `is_well`
            torch.cuda.empty_cache()


def _is_kernel(event: Any) -> bool:
    """A kernel, not a copy, a fill, or a range that someone named."""
    other = event.name.startswith(("Memcpy", "Memset")) or event.is_user_annotation
    return event.device_type is DeviceType.CUDA and not other
