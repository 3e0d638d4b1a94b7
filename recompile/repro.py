"""What a script that `recompile repro` wrote runs: random tensors, and one region fused against plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from .compare import Outcome, error
from .lowering import reference
from .measure import THREADS, interleave

# The largest difference allowed, relative to the largest value: another order of additions.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
_HALF = 2e-2


def real(dtype: torch.dtype, shape: Sequence[int], stride: Sequence[int], device: str = "cpu") -> Tensor:
    """Normally distributed values."""
    return _laid_out(torch.randn(tuple(shape)), dtype, stride, device)


def whole(
    dtype: torch.dtype,
    shape: Sequence[int],
    stride: Sequence[int],
    low: int,
    high: int,
    device: str = "cpu",
) -> Tensor:
    """Whole numbers from `low` to below `high`, or truths."""
    return _laid_out(torch.randint(low, high, tuple(shape)), dtype, stride, device)


def offsets(dtype: torch.dtype, shape: Sequence[int], ids: int, last: bool, device: str = "cpu") -> Tensor:
    """Where bags start among `ids` ids, `[B]`, from 0 on; with `last` the final one is where the last bag ends."""
    starts = torch.randint(0, ids + 1, tuple(shape)).sort().values
    starts[0] = 0
    if last:
        starts[-1] = ids
    return starts.to(device, dtype)


def _laid_out(values: Tensor, dtype: torch.dtype, stride: Sequence[int], device: str) -> Tensor:
    """`values` with these strides, in elements; what lies in one place (stride 0) has one value."""
    kept = values[tuple(slice(None) if step else slice(1) for step in stride)]
    memory = torch.empty_strided(kept.shape, tuple(stride), dtype=dtype, device=device)
    return memory.copy_(kept).expand(values.shape)


def compare(op: Callable[..., Any], *args: Any, seconds: float = 2.0) -> None:
    """Runs a region fused and unfused, both compiled by Inductor, without gradients; prints error and times.

    Args:
        op: a region operator, such as `torch.ops.recompile.lookup`.
        args: its arguments.
        seconds: of measuring.

    Raises:
        AssertionError: the results differ by more than another order of additions explains.
    """
    with torch.no_grad():
        plain = make_fx(lambda *tensors: reference(str(op), *tensors, args[-1]))(*args[:-1])
        fused = torch.compile(lambda *tensors: op(*tensors, args[-1]), backend="inductor", fullgraph=True)
        unfused = torch.compile(plain, backend="inductor")
        expected = _tensors(unfused(*args[:-1]))
        found = _tensors(fused(*args[:-1]))[: len(expected)]
        off = error(Outcome(found), Outcome(expected))
        calls = {"fused": lambda: fused(*args[:-1]), "unfused": lambda: unfused(*args[:-1])}
        times = interleave(calls, seconds=seconds, sync=_waiting(expected))
    _print(off, times)
    allowed = _TOLERANCE.get(expected[0].dtype, _HALF)
    assert off <= allowed, (
        f"fused and unfused differ by {off:.1e} of the largest value, {allowed:.0e} is allowed"
    )


def _tensors(found: Any) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else list(found)


def _waiting(outputs: list[Tensor]) -> Callable[[], object] | None:
    return torch.cuda.synchronize if outputs[0].is_cuda else None


def _print(off: float, times: Any) -> None:
    print(f"largest difference: {off:.1e} of the largest value; times with {THREADS} threads:")
    for name, timing in times.timings.items():
        print(f"{name:>8}: {timing.median_ms:.3f} ms (spread {timing.spread:.0%})")
    print(f"fused is {times.ratio('unfused', 'fused'):.2f} times as fast")
