"""What a case must at least move and compute, from its model run on torch's meta device: shapes, and no memory."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .case import Case, tensors, total_bytes

# Passes over the products of a forward that a training step makes: a backward has two products for each; attention
# that does not hold its scores computes them once more, so 7 for 2.
TRAINING, TRAINING_ATTENTION = 3.0, 3.5


@dataclass(frozen=True)
class Work:
    """`bytes` must move between memory and chip: what repeats, a row or an input, counts once.

    `asked` counts the row of every id anew, as FBGEMM's benchmark does. `outputs` are their shapes.
    """

    bytes: float
    asked: float
    flops: float
    outputs: tuple[torch.Size, ...]


def work(case: Case, scale: float = 1.0) -> Work:
    """Forward: tables' rows, all other parameters, inputs and outputs, each once; products, also of masked pairs
    counted by `kept`. Training: the same read again, the outputs' gradients, and every gradient written in full."""
    problem = case.make("meta", scale)
    inputs, tables = problem.inputs(), _tables(problem.model)
    ids: Counter[nn.Module] = Counter()
    hooks = [
        t.register_forward_hook(lambda table, given, _: ids.update({table: given[0].numel()})) for t in tables
    ]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = tensors(problem.model(*inputs))
    for hook in hooks:
        hook.remove()
    weights = {table.weight for table in tables}
    dense = total_bytes(p for p in problem.model.parameters() if p not in weights)
    once = sum(distinct(len(t.weight), n) * _row(t.weight) for t, n in ids.items())
    each = sum(n * _row(t.weight) for t, n in ids.items())
    rest, flops = dense + total_bytes(tensors(inputs)), _flops(counter, case.kept)
    given = total_bytes(outputs)
    if not case.train:
        return Work(once + rest + given, each + rest + given, flops, tuple(out.shape for out in outputs))
    gradients = 2 * given + total_bytes(problem.model.parameters())
    factor = TRAINING_ATTENTION if case.group in ("hstu", "softmax") else TRAINING
    moved = [2 * (rows + rest) + gradients for rows in (once, each)]
    return Work(*moved, flops * factor, tuple(out.shape for out in outputs))


@lru_cache(maxsize=4096)
def distinct(rows: int, draws: int) -> float:
    """How many different rows `draws` ids of `skewed` are expected to name.

    Row k of V has the probability ((k + 1) / V)^(1/3) - (k / V)^(1/3): a bounded power law, Zipf's with exponent 2/3.
    """
    edges = torch.linspace(0, 1, rows + 1, dtype=torch.float64, device="cpu") ** (1 / 3)
    chance = edges.diff().clamp(max=1 - 1e-15)
    return float(-torch.expm1(draws * torch.log1p(-chance)).sum())


def _tables(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]


def _row(table: Tensor) -> int:
    return table.shape[1] * table.element_size()


def _flops(counter: FlopCounterMode, kept: float) -> float:
    """Of all products; batched ones are those of attention."""
    counts = counter.get_flop_counts().get("Global", {})
    batched = counts.get(torch.ops.aten.bmm, 0)
    return counter.get_total_flops() - batched * (1 - kept)
