"""The project in one minute: an unmodified model, one line, the same numbers, and a report that says why."""

import pytest
import torch
from torch import nn

from recompile import last_report
from recompile.errors import IndexOutOfRange, OptionError
from recompile.report import reset


class DeepFM(nn.Module):
    """Six fields, their first-order weights, a factorization machine and a deep part."""

    def __init__(self, fields: int = 6, rows: int = 50, dim: int = 16) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, dim) for _ in range(fields))
        self.first = nn.ModuleList(nn.Embedding(rows, 1) for _ in range(fields))
        self.top = nn.Linear(fields * dim + 3, 1)

    def forward(self, ids, dense):
        e = torch.stack([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
        linear = torch.cat([table(ids[:, i]) for i, table in enumerate(self.first)], 1).sum(1, keepdim=True)
        fm = 0.5 * (e.sum(1).pow(2) - e.pow(2).sum(1)).sum(1, keepdim=True)
        return self.top(torch.cat([e.flatten(1), dense], 1)) + fm + linear


def test_one_line_and_the_same_numbers():
    reset()
    torch._dynamo.reset()
    model = DeepFM().double()
    compiled = torch.compile(model, backend="recompile")
    for batch in (5, 7, 64, 1):
        ids, dense = torch.randint(0, 50, (batch, 6)), torch.randn(batch, 3).double()
        expected = model(ids, dense)
        grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
        actual = compiled(ids, dense)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad(actual.sum(), list(model.parameters())), grads)
    graph = last_report().graphs[0]
    assert graph.fallback is None
    (region,) = graph.regions
    assert region.summary.startswith("12 lookups over 12 tables -> ")
    wanted = sorted(region.summary.split(" -> ")[1].split(", "))
    assert wanted == ["concat", "sum", "sum", "sum_of_squares"]


def test_an_id_outside_its_table_is_named():
    torch._dynamo.reset()
    model = DeepFM()
    compiled = torch.compile(model, backend="recompile")
    ids = torch.randint(0, 50, (5, 6))
    ids[2, 3] = 50
    with torch.no_grad(), pytest.raises(IndexOutOfRange, match=r"tables.3.weight' has 50 rows, got id 50"):
        compiled(ids, torch.randn(5, 3))
    ids[2, 3] = -1
    with torch.no_grad(), pytest.raises(IndexError, match="got id -1"):
        compiled(ids, torch.randn(5, 3))


def test_an_unknown_option_names_the_nearest():
    torch._dynamo.reset()
    with pytest.raises(Exception, match="did you mean 'strict'") as caught:
        torch.compile(nn.Linear(2, 2), backend="recompile", options={"strickt": True})(torch.randn(1, 2))
    assert isinstance(caught.value, OptionError) or "OptionError" in str(caught.value)
