"""What looks like something that is rewritten, and means something else: equal to eager, forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from recompile.testing import assert_rewritten_same

B, L, D = 4, 6, 6


class Model(nn.Module):
    """A table of 50 rows, a square weight, and a function of both."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.table = nn.Embedding(50, D)
        self.weight = nn.Parameter(torch.randn(192, 192, dtype=torch.float64) / 14)
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


def ids() -> Tensor:
    drawn = torch.randint(1, 50, (B, L))
    drawn[0, :3] = 0
    return drawn


def kept() -> Tensor:
    """Booleans [B, L]; the third sample keeps nothing."""
    mask = torch.rand(B, L) < 0.7
    mask[2] = False
    return mask


def rows() -> Tensor:
    return torch.randn(2, L, 8, dtype=torch.float64, requires_grad=True)


def pooled(divided: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The sum of masked rows, divided by what `divided` makes of the mask."""
    return lambda m, x, mask: (m.table(x) * mask.unsqueeze(-1)).sum(1) / divided(mask)


def nonzero_of_samples(m: Any, x: Tensor) -> Tensor:
    e = m.table(x)
    return e.sum(1) / (e.sum(-1) != 0).sum(0).clamp(min=1)


def pairs(m: Any, user: Tensor, items: Tensor) -> Tensor:
    """[q, k, q - k] of a user and its items, [B, N, 192]."""
    q = user.unsqueeze(1).expand(-1, items.shape[1], -1)
    return torch.cat([q, items, q - items], 2)


def twice(m: Any, q: Tensor, k: Tensor, q2: Tensor, k2: Tensor) -> Tensor:
    w = torch.softmax(q @ k.mT, -1) - torch.softmax(q2 @ k2.mT, -1)
    return w @ w


def scattered(m: Any, x: Tensor, ones: Tensor) -> Tensor:
    x = torch.slice_scatter(x, ones, 1, 0, 2)
    return torch.slice_scatter(x, ones, 1, 2, 4)


def positions(m: Any, x: Tensor) -> Tensor:
    a = torch.softmax(m.table(x[:, :1]) @ m.table(x).mT, -1)
    return a @ m.table(torch.arange(L)[None])


def key_masked(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """As SASRec's key mask: rows that are all zeros. It has no gradient, and a table that only it reads has none."""
    scores = mask @ mask.mT
    blank = torch.sign(torch.abs(m.table(x).sum(-1))).unsqueeze(1).repeat(1, L, 1)
    return torch.softmax(torch.where(blank == 0, torch.full_like(scores, -1e9), scores), -1) @ mask


def users() -> tuple[Tensor, Tensor]:
    return torch.randn(16, 64, dtype=torch.float64), torch.randn(16, 100, 64, dtype=torch.float64)


def causal_and_near() -> tuple[Tensor, Tensor]:
    i = torch.arange(L)
    return i[None] <= i[:, None], (i[:, None] - i[None]).abs() < 2


def small(values: list[int], dtype: torch.dtype) -> Tensor:
    return torch.tensor([values] * B, dtype=dtype)


CASES: dict[str, tuple[Callable[..., Tensor], Callable[[], tuple[Tensor, ...]]]] = {
    "a mask of one value a sample is counted once": (
        pooled(lambda mask: mask.sum(1, keepdim=True).clamp(min=1)),
        lambda: (ids(), torch.tensor([[True], [True], [False], [True]])),
    ),
    "a count that is cut to integers": (
        pooled(lambda mask: (mask.sum(1, keepdim=True) + 0.5).long()),
        lambda: (ids(), torch.ones(B, L, dtype=torch.bool)),
    ),
    "a root of a count, cut to integers": (
        pooled(lambda mask: mask.sum(1, keepdim=True).sqrt().long()),
        lambda: (ids(), torch.ones(B, L, dtype=torch.bool)),
    ),
    "a count as a truth": (
        pooled(lambda mask: mask.sum(1, keepdim=True, dtype=torch.bool)),
        lambda: (ids(), torch.ones(B, L, dtype=torch.bool)),
    ),
    "a number that the mask's dtype does not hold": (
        lambda m, x, kind: (m.table(x) * (kind != -1).unsqueeze(-1)).sum(1),
        lambda: (ids(), small([255, 0, 1, 255, 2, 3], torch.uint8)),
    ),
    "a number that wraps around": (
        lambda m, x, kind: (m.table(x) * (kind < 300).unsqueeze(-1)).sum(1),
        lambda: (ids(), small([43, 44, 45, 1, 2, -3], torch.int8)),
    ),
    "a count over the samples": (nonzero_of_samples, lambda: (ids(),)),
    "the maximum of lowered rows learns where all are masked": (
        lambda m, x, mask: (m.table(x) - (1 - mask.double()).unsqueeze(-1) * 1e9).max(1)[0],
        lambda: (ids(), kept()),
    ),
    "the maximum of lowered rows learns where padding learns": (
        lambda m, x: (m.table(x) - (1 - (x != 0).double()).unsqueeze(-1) * 1e9).max(1)[0],
        lambda: (torch.tensor([[3, 4, 0], [0, 0, 0]]),),
    ),
    "rows that are only compared": (
        key_masked,
        lambda: (ids(), torch.randn(B, L, 8, dtype=torch.float64, requires_grad=True)),
    ),
    "no positions": (lambda m, x: m.table(x).mean(1), lambda: (torch.zeros(B, 0, dtype=torch.int64),)),
    "weights of samples, rows of all": (positions, lambda: (ids(),)),
    "two hops of a difference": (twice, lambda: (rows(), rows(), rows(), rows())),
    "a sum of truths": (
        lambda m, q, k, v, one, other: (silu(q @ k.mT) * (one + other)) @ v,
        lambda: (rows(), rows(), rows(), *causal_and_near()),
    ),
    "a permute in order": (lambda m, *x: pairs(m, *x) @ m.weight.permute(0, 1), users),
    "a residual in the place of a bias": (
        lambda m, r, *x: torch.addmm(r, pairs(m, *x).reshape(-1, 192), m.weight),
        lambda: (torch.randn(1600, 192, dtype=torch.float64), *users()),
    ),
    "written with a cast": (
        scattered,
        lambda: (torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 2, dtype=torch.int64)),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_equal_to_eager(name: str) -> None:
    torch.manual_seed(0)
    function, inputs = CASES[name]
    assert_rewritten_same(Model(function).double(), inputs())
