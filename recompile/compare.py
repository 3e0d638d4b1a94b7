"""Do two ways of running a model agree: outputs, gradients of every parameter, and buffers it updates?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

# A tensor much smaller than the largest of its kind is compared on that one's scale: where the true gradient
# is 0 (a bias before a batch norm) every backend has other rounding noise.
NOISE = 1e-3


@dataclass
class Outcome:
    """What one run produced, detached."""

    outputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)
    buffers: list[Tensor] = field(default_factory=list)


def run(
    call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...], *, grad: bool, seed: int = 0
) -> Outcome:
    """Run `call` (the model, or a compiled form of it) once and put the model's buffers back afterwards.

    Args:
        call: what to run; it uses `model`'s parameters and buffers.
        inputs: its arguments.
        grad: also run the backward, from random output gradients; `model`'s own `.grad` are cleared.
        seed: of dropout; the output gradients are always the same.
    """
    saved = [buffer.clone() for buffer in model.buffers()]
    torch.manual_seed(seed)
    with torch.set_grad_enabled(grad):
        outputs = [leaf for leaf in tree_leaves(call(*inputs)) if isinstance(leaf, Tensor)]
    found = Outcome([output.detach().clone() for output in outputs])
    if grad:
        found.gradients = _gradients(model, outputs)
    for buffer, before in zip(model.buffers(), saved, strict=True):
        found.buffers.append(buffer.clone())
        buffer.copy_(before)
    return found


def error(found: Outcome, expected: Outcome) -> float:
    """The largest difference, relative to the largest magnitude in the same tensor (see `NOISE`).

    NaN, and inf, where only one side has them count as inf.
    """
    parts = ((found.outputs, expected.outputs), (found.gradients, expected.gradients))
    return max(_error(*part) for part in (*parts, (found.buffers, expected.buffers)))


def _gradients(model: nn.Module, outputs: list[Tensor]) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    wanted = [output for output in outputs if output.requires_grad]
    draw = torch.Generator().manual_seed(0)
    torch.autograd.backward(wanted, [torch.randn(o.shape, generator=draw).to(o) for o in wanted])
    return [torch.zeros(()) if p.grad is None else p.grad.detach().clone() for p in model.parameters()]


def _error(found: list[Tensor], expected: list[Tensor]) -> float:
    pairs = [
        (f.double(), e.double())
        for f, e in zip(found, expected, strict=True)
        if e.numel() or f.shape != e.shape
    ]
    floor = NOISE * max((_magnitude(e) for _, e in pairs), default=0.0)
    return max((_difference(f, e, floor) for f, e in pairs), default=0.0)


def _magnitude(tensor: Tensor) -> float:
    return float(tensor.nan_to_num(0.0, 0.0, 0.0).abs().max())


def _difference(found: Tensor, expected: Tensor, floor: float) -> float:
    if found.shape != expected.shape or not torch.equal(found.isfinite(), expected.isfinite()):
        return float("inf")
    both = found.isfinite()
    largest = float((found - expected)[both].abs().max()) if both.any() else 0.0
    return largest / max(_magnitude(expected), floor, torch.finfo(torch.float64).tiny)
