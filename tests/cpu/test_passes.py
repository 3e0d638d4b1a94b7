"""Each rule: fires, refuses with its sentence, equals eager forward and backward at several batch sizes."""

import pytest
import torch
from torch import nn

from recompile.report import collect
from tests.capturing import without_inductor


def run(model, inputs, batches=(5, 8, 1), options=None, generated=True):
    """Compiles, compares with eager at each batch size, and returns the first graph's record.

    The passes see a fixed batch, any batch, and one sample; the kernels, where they are `generated` at all, any batch:
    each takes a C++ compiler seconds, and spellings of one kernel need not be compiled each.
    """
    with without_inductor():
        graph = _run(model, inputs, batches, options)
    if generated:
        _run(model, inputs, batches[:2], options, dynamic=True)
    return graph


def _run(model, inputs, batches, options, dynamic=None):
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="recompile", options=options or {}, dynamic=dynamic)
    parameters = list(model.parameters())
    with collect() as report:
        for batch in batches:
            args = inputs(batch)
            expected, actual = model(*args), compiled(*args)
            torch.testing.assert_close(actual, expected, equal_nan=True)
            seed = torch.randn_like(expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, parameters, seed, allow_unused=True),
                torch.autograd.grad(expected, parameters, seed, allow_unused=True),
                equal_nan=True,
            )
            with torch.no_grad():
                torch.testing.assert_close(compiled(*args), model(*args), equal_nan=True)
    graph = report.graphs[0]
    assert graph.fallback is None and not [p.error for p in graph.passes if p.error]
    return graph


def rule(graph, name):
    return next(r for p in graph.passes for r in p.rules if r.name == name)


class Pool(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.table, self.how = nn.Embedding(50, 4, padding_idx=0).double(), how

    def forward(self, x, n):
        return self.how(self.table, x, n)


def sequences(batch):
    x = torch.randint(0, 50, (batch, 7)) * (torch.rand(batch, 7) > 0.4)
    x[:, 0] = 3
    return x, (x != 0).sum(1)


def bmm_mean(e, x, n):
    m = (x != 0).unsqueeze(1).double()
    return torch.bmm(m, e(x)).squeeze(1) / (m.sum(-1) + 1e-16)


def mul_mean(e, x, n):
    m = (x != 0).unsqueeze(-1).double()
    return (e(x) * m).sum(1) / m.sum(1)


def swapped(e, x, n):
    m = (x != 0).double()
    return (m[:, :, None] * e(x)).sum(dim=1) / m.sum(1, keepdim=True).clamp(min=1)


def lengths(e, x, n):
    m = torch.arange(x.shape[1])[None, :] < n[:, None]
    return (e(x) * m.unsqueeze(-1)).sum(1) / n[:, None]


def filled(e, x, n):
    return e(x).masked_fill((x == 0).unsqueeze(-1), 0).mean(1)


def where(e, x, n):
    return torch.where((x > 0).unsqueeze(-1), e(x), 0).sum(1)


def plain(e, x, n):
    return e(x).sum(1)


def weighted(e, x, n):
    return (torch.softmax(x.double(), 1).unsqueeze(-1) * e(x)).sum(1)


SPELLINGS = [bmm_mean, mul_mean, swapped, lengths, filled, where, plain, weighted]


@pytest.mark.parametrize("how", SPELLINGS, ids=lambda f: f.__name__)
def test_pooling_spellings(how):
    graph = run(Pool(how), sequences, generated=how in (bmm_mean, weighted))
    assert rule(graph, "pool-sequences").fired == 1


def test_pooling_refuses_when_rows_are_needed():
    graph = run(Pool(lambda e, x, n: (r := e(x)).sum(1) + r[:, 0]), sequences, generated=False)
    refusal = rule(graph, "pool-sequences").refused[0]
    assert "the looked-up rows are also used by" in refusal.why
    assert "test_passes.py" in refusal.line


class Ids(nn.Module):
    """One table a field, ids by a function of a column."""

    def __init__(self, ids, fields=3):
        super().__init__()
        self.tables, self.ids = nn.ModuleList(nn.Embedding(20, 4) for _ in range(fields)).double(), ids

    def forward(self, x):
        return torch.cat([t(self.ids(x, i)) for i, t in enumerate(self.tables)], -1)


IDS = {
    "column": lambda x, i: x[:, i],
    "float column": lambda x, i: x.double()[:, i : i + 1].long(),
    "hash": lambda x, i: (x[:, i] + 7) % 20,
    "clamp": lambda x, i: x[:, i].clamp(1, 3),
    "quotient": lambda x, i: (x[:, i] - 10) // 3 + 4,
    "unknown ids": lambda x, i: x[:, i].masked_fill(x[:, i] > 15, 0),
    "unbind": lambda x, i: x.unbind(1)[i],
    "int32": lambda x, i: x[:, i].int(),
    "transposed": lambda x, i: x.t().contiguous().t()[:, i],
}


@pytest.mark.parametrize("name", IDS)
def test_spellings_of_ids(name):
    graph = run(
        Ids(IDS[name]), lambda b: (torch.randint(0, 20, (b, 3)),), generated=name in ("column", "int32")
    )
    assert rule(graph, "fuse-lookups").fired == 3
    assert graph.regions[0].summary == "3 lookups over 3 tables -> concat"


class Bags(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, d, **kwargs) for d in (3, 16, 25)).double()

    def forward(self, ids, offsets=None):
        return torch.cat([t(ids, offsets) for t in self.tables], 1)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 0])
def test_embedding_bags_with_empty_bags(mode, padding):
    def jagged(batch):
        lengths = torch.arange(batch) % 3
        return torch.randint(0, 20, (int(lengths.sum()) + 1,)), lengths.cumsum(0) - lengths

    graph = run(Bags(mode=mode, padding_idx=padding), jagged, generated=padding == 0)
    assert rule(graph, "fuse-lookups").fired == 3
    graph = run(
        Bags(mode=mode, padding_idx=padding), lambda b: (torch.randint(0, 20, (b, 4)),), generated=False
    )
    assert rule(graph, "fuse-lookups").fired == 3


def test_include_last_offset():
    def jagged(batch):
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (torch.arange(batch) % 3).cumsum(0)])
        return torch.randint(0, 20, (int(offsets[-1]),)), offsets

    graph = run(Bags(mode="sum", include_last_offset=True), jagged, batches=(5, 8))
    assert rule(graph, "fuse-lookups").fired == 3


def test_sparse_gradients_are_left_to_eager():
    model = nn.ModuleList(nn.Embedding(20, 4, sparse=True) for _ in range(2))
    torch._dynamo.reset()
    with collect() as report:
        torch.compile(lambda x: torch.cat([t(x) for t in model], 1), backend="recompile")(torch.arange(3))
    refusals = [r.why for g in report.graphs for p in g.passes for u in p.rules for r in u.refused]
    assert any("sparse=True" in why for why in refusals)


@pytest.mark.parametrize(("written", "regions"), [(lambda x: x, 1), (lambda x: x.detach(), 0)])
def test_a_value_written_in_place_stays_apart_unless_it_becomes_another(written, regions):
    class InPlace(Ids):
        def forward(self, x):
            first = self.tables[0](x[:, 0])
            kept = torch.cat([first, self.tables[1](x[:, 1])], 1)
            written(first).mul_(2)
            return torch.cat([first, first], 1) + kept

    graph = run(InPlace(None), lambda b: (torch.randint(0, 20, (b, 3)),), generated=False)
    assert len(graph.regions) == regions


def test_a_lookup_that_depends_on_another_is_a_group_of_its_own():
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(4)).double()

        def forward(self, x):
            a = torch.cat([self.tables[0](x[:, 0]), self.tables[1](x[:, 1])], 1)
            ids = a.argmax(1)
            b = torch.cat([self.tables[2](ids), self.tables[3](ids)], 1)
            return a + b

    graph = run(Chain(), lambda b: (torch.randint(0, 20, (b, 2)),), generated=False)
    assert len(graph.regions) == 2


def test_passes_can_be_switched_off():
    graph = run(
        Ids(IDS["column"]),
        lambda b: (torch.randint(0, 20, (b, 3)),),
        options={"passes": "default,-fuse-lookups"},
        generated=False,
    )
    assert not graph.regions


def test_reads_of_memory_that_a_lookup_was_written_to_come_later():
    class Through(nn.Module):
        """The second lookup's ids depend on the first only through memory."""

        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(4)).double()

        def forward(self, x):
            box = torch.zeros(x.shape[0], 8, dtype=torch.float64)
            a = torch.cat([self.tables[0](x[:, 0]), self.tables[1](x[:, 1])], 1)
            box.add_(a)
            ids = box.argmax(1)
            return a + torch.cat([self.tables[2](ids), self.tables[3](ids)], 1)

    graph = run(Through(), lambda b: (torch.randint(0, 20, (b, 2)),), generated=False)
    assert len(graph.regions) == 2


def test_writes_elsewhere_do_not_split_a_group():
    class Logit(nn.Module):
        """A sum kept by `+=`, as deepctr's linear part writes it, between the lookups and their concatenation."""

        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(20, d) for d in (4, 4, 1, 1)).double()

        def forward(self, x):
            e = [t(x[:, i]) for i, t in enumerate(self.tables)]
            logit = torch.zeros(x.shape[0], 1, dtype=torch.float64)
            logit += torch.cat(e[2:], 1).sum(1, keepdim=True)
            return torch.cat(e[:2], 1) * logit

    graph = run(Logit(), lambda b: (torch.randint(0, 20, (b, 4)),), generated=False)
    assert [r.summary for r in graph.regions] == ["4 lookups over 4 tables -> concat, sum"]


def test_a_concatenation_that_waits_for_other_values_is_split():
    class Waits(nn.Module):
        def __init__(self):
            super().__init__()
            self.tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3)).double()
            self.top = nn.Linear(4, 4).double()

        def forward(self, x):
            e = [t(x[:, i]) for i, t in enumerate(self.tables)]
            return torch.cat([e[0], e[1], self.top(e[2])], 1)

    graph = run(Waits(), lambda b: (torch.randint(0, 20, (b, 3)),), generated=False)
    assert [r.summary for r in graph.regions] == ["2 lookups over 2 tables -> concat"]


def test_a_factorization_machine_on_one_big_table():
    class OneBigTable(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(60, 4).double()

        def forward(self, x):
            rows = self.table(x + x.new_tensor((0, 20, 40)))
            return torch.cat([rows.flatten(1), rows.sum(1) ** 2 - (rows**2).sum(1)], 1)

    graph = run(OneBigTable(), lambda b: (torch.randint(0, 20, (b, 3)),))
    assert [r.summary for r in graph.regions] == ["1 lookup over 1 table -> concat, sum_of_squares, sum"]


def test_strided_offsets():
    def inputs(batch):
        lengths = torch.arange(batch) % 3
        offsets = torch.stack([lengths.cumsum(0) - lengths, torch.full((batch,), 99)], 1)[:, 0]
        return torch.randint(0, 20, (int(lengths.sum()) + 1,)), offsets

    graph = run(Bags(mode="sum"), inputs)
    assert rule(graph, "fuse-lookups").fired == 3
