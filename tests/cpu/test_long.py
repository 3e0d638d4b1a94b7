"""Graphs that are long in one direction, through which a pass once recursed, or doubled its work with each node."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recompile.testing import assert_rewritten_same

B, L, D = 4, 5, 8


def remapped(ids: Tensor, table: Tensor) -> Tensor:
    for k in range(30):
        ids = torch.where(ids == k + 7, ids + 1, ids)
    return F.embedding(ids, table).sum(1)


def masked(ids: Tensor, table: Tensor, mask: Tensor) -> Tensor:
    for k in range(20):
        mask = (mask | (ids == k)) & (mask | (ids != k + 20))
    return (F.embedding(ids, table) * mask.unsqueeze(-1)).sum(1)


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    y = torch.softmax(q @ k.mT, -1) @ v
    for _ in range(1200):
        y = y.sin()
    return y


def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    apart = torch.arange(L)[:, None] - torch.arange(L)
    for step in range(20):
        apart = torch.where(apart == step, apart + 1, apart)
    return torch.softmax(q @ k.mT + bias[apart % L], -1) @ v


def written(x: Tensor) -> Tensor:
    y = x * 2
    for _ in range(1100):
        y += x
    return y


def ids() -> Tensor:
    return torch.randint(0, 50, (B, L))


def rows() -> Tensor:
    return torch.randn(B, L, D)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]], str]] = {
    "ids, remapped one by one": (remapped, lambda: (ids(), torch.randn(100, D)), "pool-sequences"),
    "a mask of many": (masked, lambda: (ids(), torch.randn(100, D), ids() > 5), "pool-sequences"),
    "much behind an attention": (attended, lambda: (rows(), rows(), rows()), "rewrite-attention"),
    "positions, remapped one by one": (
        biased,
        lambda: (rows(), rows(), rows(), torch.randn(L)),
        "rewrite-attention",
    ),
    "one tensor, written again and again": (written, lambda: (rows(),), "functionalize"),
}


class Model(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


@pytest.mark.parametrize("name", CASES)
def test_it_fires_in_seconds(name: str) -> None:
    function, inputs, rule = CASES[name]
    _, record = assert_rewritten_same(Model(function), inputs())
    (fired,) = [found.fired for step in record.passes for found in step.rules if found.name == rule]
    assert fired and sum(step.ms for step in record.passes) < 60_000
