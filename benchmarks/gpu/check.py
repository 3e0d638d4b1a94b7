"""Is an output right: against float64, on fresh inputs, where memory held NaN before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from recompile.compare import NOISE

from .case import Inputs, Problem, tensors, total_bytes

SAMPLES = 8  # outputs are compared for at least so many: one alone may happen to be near 0
SMALL, LARGE = 1 << 18, 1 << 26  # elements: torch keeps blocks up to 1 MiB apart from larger ones

Pair = tuple[float, float]  # how large the difference of two tensors is, and how large the expected one


def step(
    call: Callable[..., Any], model: nn.Module, inputs: Inputs, seeds: Sequence[Tensor], train: bool
) -> list[Tensor]:
    """What is timed: a forward, or a forward and a backward from `seeds` into fresh gradients."""
    torch.compiler.cudagraph_mark_step_begin()  # what earlier steps returned may be overwritten
    if not train:
        with torch.no_grad():
            return tensors(call(*inputs))
    model.zero_grad(set_to_none=True)
    outputs = tensors(call(*inputs))
    torch.autograd.backward(outputs, list(seeds))
    return outputs


def error(
    problem: Problem,
    call: Callable[..., Any],
    prepare: Callable[[Inputs], Inputs],
    seeds: Sequence[Tensor],
    train: bool,
) -> float:
    """The largest difference to float64, relative to the size of its tensor; inf where it is not finite.

    Outputs, and in training the parameters' gradients.
    """
    model, reference = problem.model, copy.deepcopy(problem.model).double()
    outputs = step(call, model, prepare(problem.inputs()), seeds, train)
    batch, pairs = len(outputs[0]), [(0.0, 0.0)] * len(outputs)
    _poison(model, outputs)
    for _ in range(1 if train else math.ceil(SAMPLES / batch)):
        inputs = problem.inputs()
        outputs = step(call, model, prepare(inputs), seeds, train)
        for part in _parts(problem, batch):
            expected = _expected(problem, reference, inputs, part, seeds if train else ())
            new = [_pair(f.detach()[part], e, _largest) for f, e in zip(outputs, expected, strict=True)]
            pairs = [(max(a, c), max(b, d)) for (a, b), (c, d) in zip(pairs, new, strict=True)]
    worst = _worst(pairs)
    if train:
        size = torch.linalg.vector_norm if problem.by_norm else _largest
        gradients = zip(_gradients(model), _gradients(reference), strict=True)
        worst = max(worst, _worst([_pair(found, expected, size) for found, expected in gradients]))
        model.zero_grad(set_to_none=True)
    return worst


def _expected(
    problem: Problem, reference: nn.Module, inputs: Inputs, part: slice, seeds: Sequence[Tensor]
) -> list[Tensor]:
    """The reference's outputs for a part of the samples; with `seeds`, its gradients add up."""
    own = {name: reference.get_parameter(name)[part] for name in problem.split}
    given = tree_map_only(Tensor, lambda x: _wide(x[part]), inputs)
    with torch.set_grad_enabled(bool(seeds)):
        outputs = tensors(functional_call(reference, own, given))
    if seeds:
        torch.autograd.backward(outputs, [_wide(seed[part]) for seed in seeds])
    return [output.detach() for output in outputs]


def _parts(problem: Problem, batch: int) -> Iterator[slice]:
    rows = problem.rows or batch
    return (slice(start, start + rows) for start in range(0, batch, rows))


def _pair(found: Tensor, expected: Tensor, size: Callable[[Tensor], Tensor]) -> Pair:
    wanted = float(size(expected))
    if found.shape != expected.shape or not math.isfinite(wanted):
        return math.inf, 0.0
    return float(size(found.double() - expected).nan_to_num(math.inf)), wanted


def _largest(x: Tensor) -> Tensor:
    return x.abs().max() if x.numel() else x.new_zeros(())


def _worst(pairs: Sequence[Pair]) -> float:
    floor = NOISE * max((magnitude for _, magnitude in pairs), default=0.0)
    return max((d / max(m, floor, 1e-300) for d, m in pairs if d), default=0.0)


def _gradients(model: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


def _poison(model: nn.Module, outputs: list[Tensor]) -> None:
    """What a run wrote, and then memory that is free and so the next to be handed out, is filled with NaN.

    A CUDA graph's replay writes where it wrote before.
    """
    for written in (*outputs, *(p.grad for p in model.parameters() if p.grad is not None)):
        written.detach().fill_(torch.nan)
    del written
    outputs.clear()
    model.zero_grad(set_to_none=True)
    device = next(model.parameters()).device
    blocks = [torch.full((SMALL,), torch.nan, device=device) for _ in range(16)]
    blocks.append(
        torch.full((min(LARGE, total_bytes(model.parameters()) // 4 + SMALL),), torch.nan, device=device)
    )
    del blocks
