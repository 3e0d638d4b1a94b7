"""Histories of several lengths: nested tensors in the jagged layout, or values and offsets, padded for attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recompile.report import collect
from tests.capturing import without_inductor

LENGTH, WIDTH = 8, 32


class History(nn.Module):
    """Causal SiLU attention (HSTU) over padded histories."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def attend(self, padded: Tensor, lengths: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in padded.chunk(3, -1))
        j = torch.arange(LENGTH)
        weights = F.silu(q @ k.mT) / LENGTH * (j[:, None] >= j) * (j < lengths[:, None, None, None])
        return self.out((weights @ v).transpose(1, 2).flatten(-2))


class Nested(History):
    def forward(self, x: Tensor) -> Tensor:
        padded = self.qkv(x).to_padded_tensor(0.0, output_size=(x.shape[0], LENGTH, 3 * WIDTH))
        return self.attend(padded, x.offsets().diff())


class NestedInside(History):
    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        x = torch.nested.nested_tensor_from_jagged(self.qkv(values), offsets)
        padded = x.to_padded_tensor(0.0, output_size=(len(offsets) - 1, LENGTH, 3 * WIDTH))
        return self.attend(padded, offsets.diff())


class Offsets(History):
    def forward(self, values: Tensor, offsets: Tensor) -> Tensor:
        rows = torch.arange(len(values))
        sample = torch.bucketize(rows, offsets, right=True) - 1
        j, lengths = torch.arange(LENGTH), offsets.diff()
        taken = (offsets[:-1, None] + j).clamp(max=len(values) - 1)
        padded = self.qkv(values)[taken] * (j < lengths[:, None])[..., None]
        return self.attend(padded, lengths)[sample, rows - offsets[sample]]


def jagged(*lengths: int) -> tuple[Tensor, Tensor]:
    values = torch.randn(sum(lengths), WIDTH, dtype=torch.float64, requires_grad=True)
    return values, F.pad(torch.tensor(lengths).cumsum(0), (1, 0))


def nested(*lengths: int) -> tuple[Tensor]:
    values, offsets = jagged(*lengths)
    return (torch.nested.nested_tensor_from_jagged(values, offsets),)


CASES: dict[str, tuple[type[History], Callable[..., tuple[Any, ...]]]] = {
    "nested input": (Nested, nested),
    "made nested": (NestedInside, jagged),
    "values and offsets": (Offsets, jagged),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_over_histories_of_several_lengths(name: str) -> None:
    made, inputs = CASES[name]
    torch.manual_seed(0)
    model = made().double()
    torch._dynamo.reset()
    with without_inductor(), collect() as report:
        compiled = torch.compile(model, backend="recompile")
        for lengths in ((3, 7, 1, 5), (8, 1, 2), (4, 0, 8, 6, 3)):
            given = inputs(*lengths)
            torch.testing.assert_close(_run(compiled, model, given), _run(model, model, given))
    assert report.graphs and all(not graph.fallback for graph in report.graphs)
    assert all([region.name for region in graph.regions] == ["attention"] for graph in report.graphs)


def _run(call: Callable[..., Tensor], model: nn.Module, given: tuple[Tensor, ...]) -> list[Tensor]:
    model.zero_grad()
    found = call(*given)
    found.square().sum().backward()
    return [found.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_a_write_through_values_keeps_its_place() -> None:
    def f(x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        y.values().add_(1)
        return y.to_padded_tensor(0.0, output_size=(4, LENGTH, WIDTH)), y.values() + y.values().relu()

    (x,) = nested(3, 7, 1, 5)
    torch._dynamo.reset()
    with torch.no_grad(), without_inductor(), collect() as report:
        torch.testing.assert_close(torch.compile(f, backend="recompile")(x), f(x))
    assert not report.graphs[0].fallback


def test_compiled_by_inductor() -> None:
    (x,) = (t.float() for t in nested(3, 7, 1, 5))
    model = Nested()
    torch._dynamo.reset()
    with torch.no_grad(), collect() as report:
        found = torch.compile(model, backend="recompile")(x)
        torch.testing.assert_close(found, model(x))
    assert [region.name for region in report.graphs[0].regions] == ["attention"]
