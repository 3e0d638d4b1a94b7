"""Fused lookups where groups are unusual: no samples, weights that are features too, ids that no table has."""

import pytest
import torch
from torch import nn

from recompile.passes.fuse_lookups import FuseLookups
from recompile.report import collect
from recompile.testing import assert_refuses, assert_rewritten_same


class Fields(nn.Module):
    """Two tables, a pooled history and dense features side by side."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Embedding(9, 4), nn.Embedding(7, 3)
        self.bag = nn.EmbeddingBag(9, 4, mode="sum")
        self.top = nn.Linear(4 + 3 + 4 + 4 + 2 * 3, 2)

    def forward(self, ids, history, dense):
        mask = (history != 0).to(dense.dtype).unsqueeze(-1)
        mean = (self.a(history) * mask).sum(1) / (mask.sum(1) + 1e-9)
        features = [self.a(ids[:, 0]), self.b(ids[:, 1]), mean, self.bag(history), dense.flatten(1)]
        return self.top(torch.cat(features, 1))


def batch(size, dtype=torch.float32):
    generator = torch.Generator().manual_seed(size)
    ids, history = (torch.randint(0, 7, (size, width), generator=generator) for width in (2, 5))
    return ids, history, torch.rand(size, 2, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("compiler", ["passes", "kernels"])
def test_a_batch_may_be_empty(compiler):
    model = Fields()
    if compiler == "passes":
        graph, _ = assert_rewritten_same(model.double(), batch(0, torch.float64))
        assert "recompile.lookup" in str(graph)
        return
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="recompile", options={"strict": True})
    for size in (3, 0, 4):
        expected, actual = model(*batch(size)), compiled(*batch(size))
        torch.testing.assert_close(actual, expected)
        parameters = list(model.parameters())
        found, wanted = (torch.autograd.grad(out.square().sum(), parameters) for out in (actual, expected))
        torch.testing.assert_close(found, wanted)


class Weighed(nn.Module):
    """Weights of the history's rows that are features as well: their gradient comes from both."""

    def __init__(self, how):
        super().__init__()
        self.table, self.bag, self.how = nn.Embedding(9, 4), nn.EmbeddingBag(9, 4, mode="sum"), how

    def forward(self, ids, weights):
        if self.how == "by hand":
            pooled = (self.table(ids) * weights.unsqueeze(-1)).sum(1)
        else:
            pooled = self.bag(ids, per_sample_weights=weights)
        return torch.cat([pooled, weights, self.table(ids[:, 0])], 1)


@pytest.mark.parametrize("how", ["by hand", "by a bag"])
def test_weights_that_are_features_learn_from_both(how):
    weights = torch.rand(6, 5, dtype=torch.float64, requires_grad=True)
    graph, _ = assert_rewritten_same(Weighed(how).double(), (torch.randint(0, 9, (6, 5)), weights))
    assert "recompile.lookup" in str(graph) and "per_sample" not in str(graph)


@pytest.mark.parametrize(("place", "table", "train"), [("ids", "b", True), ("history", "a", False)])
def test_an_id_that_no_table_has_is_an_index_error(place, table, train):
    torch._dynamo.reset()
    model = Fields().train(train)
    compiled = torch.compile(model, backend="recompile")
    ids, history, dense = batch(4)
    with collect() as report:
        torch.testing.assert_close(compiled(ids, history, dense), model(ids, history, dense))
    assert report.graphs[0].regions
    {"ids": ids, "history": history}[place][1, 1] = 9
    with pytest.raises(IndexError, match=rf"table '{table}\S*' has \d rows, got id 9"):
        compiled(ids, history, dense)
    with pytest.raises(IndexError):
        model(ids, history, dense)


class Weighted(nn.Module):
    """Hash embeddings with a learned importance; then rows of what another lookup is nearest to."""

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(9, 4) for _ in range(6))

    def forward(self, x):
        a, b, c, d, e, f = self.tables
        bag = (a(x[:, :2]) * b(x[:, 2])[:, :2].unsqueeze(-1)).sum(1)
        rows = torch.cat([bag, c(x[:, 0]), d(x[:, 1])], -1)
        nearest = (rows[:, :4] @ e.weight.t()).argmax(-1)
        return torch.cat([rows, e(nearest), f(nearest)], -1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_one_concatenation_may_have_groups_that_depend_on_each_other(dynamic):
    torch._dynamo.reset()
    graph, _ = assert_rewritten_same(Weighted().double(), (torch.randint(0, 9, (5, 3)),), dynamic=dynamic)
    assert sum("recompile.lookup" in str(node.target) for node in graph.nodes) == 3


@pytest.mark.parametrize("padding", [-1, -2, 0, None])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_a_padding_may_count_from_the_end(padding, mode):
    """Also as -1, which is none to the operators that `embedding_bag` is made of."""

    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.randn(5, d, dtype=torch.float64)) for d in (4, 3))

        def forward(self, x):
            pooled = [
                nn.functional.embedding_bag(x, t, padding_idx=padding, mode=mode) for t in (self.a, self.b)
            ]
            return torch.cat(pooled, 1)

    torch._dynamo.reset()
    graph, _ = assert_rewritten_same(Bags(), (torch.tensor([[0, 4, 4], [3, 2, 4], [4, 3, 0]]),))
    assert "recompile.lookup" in str(graph)


def test_a_refusal_calls_a_buffer_as_the_model_does():
    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Embedding(9, 4), nn.Embedding(9, 4)
            self.register_buffer("seen", torch.zeros(5, dtype=torch.int64))

        def forward(self, x):
            before = torch.cat([self.a(self.seen), self.b(x)], 1)
            self.seen.copy_(x)
            return before

    why = "self.seen, which the lookup reads, is written in place"
    assert_refuses(FuseLookups, Seen(), (torch.randint(0, 9, (5,)),), why=why)
