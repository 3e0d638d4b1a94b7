"""What nodes and regions cost, in bytes and operations, as numbers and as expressions."""

import pytest
import sympy
import torch
from torch import nn

import recompile
from recompile.cost import Cost, cost, is_region
from recompile.ledger import Ledger
from recompile.options import Options
from recompile.pipeline import run_passes
from recompile.regions import region_record
from recompile.report import CostRecord, GraphRecord
from recompile.testing import capture
from tests.capturing import without_inductor

aten = torch.ops.aten

F4 = 4  # bytes of a float


def costs(function, *inputs):
    """The costs of the operators that are not free."""
    found = {node.name: cost(node) for node in capture(function, *inputs).graph.nodes}
    return {name: each for name, each in found.items() if each != Cost()}


A, B = torch.randn(3, 5), torch.randn(5, 7)
X = torch.randn(2, 3, 5)
IDS, START = torch.tensor([1, 0, 1]), torch.tensor([0])
CASES = {
    "a product": (lambda: torch.mm(A, B), Cost(F4 * (15 + 35 + 21), 2 * 5 * 21)),
    "a batched product": (lambda: X @ B, Cost(F4 * (30 + 35 + 42), 2 * 5 * 42)),
    "a layer": (lambda: torch.nn.functional.linear(A, B.t(), B[0]), Cost(F4 * (15 + 35 + 7 + 21), 2 * 5 * 21)),
    "an einsum": (lambda: torch.einsum("abd,dc->abc", X, B), Cost(F4 * (30 + 35 + 42), 2 * 5 * 42)),
    "an einsum with dots": (lambda: torch.einsum("...d,dc", X, B), Cost(F4 * (30 + 35 + 42), 2 * 5 * 42)),
    "attention": (
        lambda: torch.nn.functional.scaled_dot_product_attention(X, X[:, :2], X[:, :2]),
        Cost(F4 * (30 + 20 + 20 + 30), 2 * 2 * 3 * 2 * 10),
    ),
    "a sum": (lambda: A.sum(1), Cost(F4 * (15 + 3), 15)),
    "pointwise": (lambda: A + A[0], Cost(F4 * (15 + 5 + 15), 15)),
    "repeated in memory": (lambda: A[:1].expand(4, 5).exp(), Cost(F4 * (5 + 20), 20)),
    "a lookup": (lambda: torch.nn.functional.embedding(IDS, A), Cost(8 * 3 + 2 * F4 * 15, 0)),
    "a bag": (
        lambda: torch.nn.functional.embedding_bag(IDS, A, START, mode="sum"),
        Cost(8 * 3 + 8 + F4 * 15 + F4 * 5, 15),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_of_an_operator(name):
    function, expected = CASES[name]
    (found,) = costs(function).values()
    assert found == expected


def test_views_are_free():
    assert costs(lambda a: a.view(15)[2:7].unsqueeze(0).expand(3, 5), A) == {}


def test_a_stack_beside_features_counts_as_what_its_lookups_replace():
    tables = [torch.randn(50, 16) for _ in range(5)]

    def stacked(x, ids):
        rows = [torch.nn.functional.embedding(ids[:, k], table) for k, table in enumerate(tables)]
        return torch.stack([x * 2, *rows], 1)

    report = recompile.explain(stacked, torch.randn(64, 16), torch.randint(0, 50, (64, 5)))
    (region,) = report.graphs[0].regions
    row = F4 * 16
    lookups, stack = 5 * (8 + 2 * row), 12 * row
    assert region.before.bytes == str(64 * (lookups + stack))
    assert region.after.bytes == str(64 * (5 * 8 + 5 * row + row + 6 * row))


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 4) for _ in range(3))

    def forward(self, ids):
        return torch.cat([table(ids[:, k]) for k, table in enumerate(self.tables)], 1)


def test_a_region_beside_what_it_replaced():
    """Three lookups of 6 samples and a cat: rows are read, written, read and written again; fused once."""
    with torch.no_grad():
        report = recompile.explain(Tables(), torch.zeros(6, 3, dtype=torch.int64))
    (region,) = report.graphs[0].regions
    ids, rows = 3 * 6 * 8, 3 * 6 * 4 * F4
    assert (region.before, region.after) == (
        CostRecord(str(ids + 4 * rows), "72", ids + 4 * rows, 72),
        CostRecord(str(ids + 2 * rows), "0", ids + 2 * rows, 0),
    )
    assert "1.3 kB -> 720 B moved" in report.text()


def test_the_last_of_several_new_nodes_stands_for_what_they_replace():
    """Whatever order a set of nodes has: it differs from run to run."""
    for _ in range(8):
        gm = capture(
            lambda x, w: torch.nn.functional.linear(x, w).mean(1), torch.ones(4, 9, 3), torch.ones(3, 3)
        )
        graph, (x, w) = gm.graph, gm.graph.find_nodes(op="placeholder")
        ledger = Ledger(graph)
        (mean,) = graph.find_nodes(op="call_function", target=aten.mean.dim)
        replaced = cost(mean) + cost(mean.args[0])
        with graph.inserting_after(mean):
            first = graph.call_function(aten.mean.dim, (x, [1]))
            first.meta["val"] = aten.mean.dim(x.meta["val"], [1])
        with graph.inserting_after(first):
            second = graph.call_function(aten.linear.default, (first, w))
            second.meta["val"] = aten.linear.default(first.meta["val"], w.meta["val"])
        mean.replace_all_uses_with(second)
        for node in (mean, mean.args[0]):
            graph.erase_node(node)
        ledger.after(graph)
        assert (ledger.before(first), ledger.before(second)) == (Cost(), replaced)


def test_what_a_shorter_list_of_arguments_replaces_counts():
    gm = capture(lambda x, y: torch.cat([x.exp().sin(), y.exp(), x], 1), X[0], X[1])
    graph, (x, y) = gm.graph, gm.graph.find_nodes(op="placeholder")
    ledger = Ledger(graph)
    (cat,) = graph.find_nodes(op="call_function", target=aten.cat.default)
    gone = [*cat.args[0][:2], cat.args[0][0].args[0]]
    replaced = sum(map(cost, gone), Cost())
    with graph.inserting_before(cat):
        both = graph.call_function(aten.cat.default, ([x, y], 1))
        both.meta["val"] = aten.cat.default([x.meta["val"], y.meta["val"]], 1)
    cat.args = ([both, x], 1)
    for node in gone:
        graph.erase_node(node)
    ledger.after(graph)
    assert ledger.before(both) == replaced


def test_of_dynamic_sizes():
    with torch.no_grad(), recompile.report.collect() as report:
        torch.compile(Tables(), backend="recompile", dynamic=True)(torch.zeros(6, 3, dtype=torch.int64))
    (region,) = report.graphs[0].regions
    (batch,) = sympy.sympify(region.after.bytes).free_symbols
    assert sympy.sympify(region.after.bytes) == 120 * batch and region.after.example_bytes == 720
    assert sympy.sympify(region.before.bytes) == 216 * batch
    assert f"bytes {region.before.bytes} -> {region.after.bytes}" in report.text()


def attention(q, k, v):
    return (q @ k.mT).softmax(-1) @ v


def regions(model, *inputs):
    gm = capture(model, *inputs)
    ledger = run_passes(gm, Options(), GraphRecord())
    return [region_record(node, ledger) for node in gm.graph.nodes if is_region(node)]


@pytest.mark.parametrize(
    ("bound", "model", "inputs"),
    [
        ("memory", Tables(), torch.zeros(1, 2000, 3, dtype=torch.int64)),
        ("compute", attention, torch.randn(3, 2, 1000, 16)),
        ("", attention, torch.randn(3, 64, 80, 16)),  # 20 operations a byte: some CPUs make more of them
        ("launch", Tables(), torch.zeros(1, 6, 3, dtype=torch.int64)),
    ],
)
def test_the_bound_is_predicted_by_the_operations_a_byte(bound, model, inputs):
    (region,) = regions(model, *inputs)
    assert region.bound == bound


def test_a_region_tells_the_shapes_of_what_it_reads_and_writes():
    (region,) = regions(Tables(), torch.zeros(6, 3, dtype=torch.int64))
    assert [*region.reads.values()] == ["f32[50, 4]"] * 3 + ["i64[6]"] * 3
    assert region.writes == ["f32[6, 12]"] and region.device == "cpu"
    (region,) = regions(attention, *torch.randn(3, 2, 10, 4))
    assert [*region.reads.values()] == ["f32[2, 10, 4]"] * 3 and region.writes == ["f32[2, 10, 4]"]


def test_attention_counts_its_pairs():
    with torch.no_grad():
        report = recompile.explain(attention, *torch.randn(3, 2, 10, 4))
    (region,) = report.graphs[0].regions
    moved, scores = 2 * 10 * 4 * F4, 2 * 10 * 10 * F4
    assert region.after == CostRecord(str(4 * moved), str(2 * 200 * 8), 4 * moved, 2 * 200 * 8)
    assert region.before.example_bytes == 4 * moved + 4 * scores
    assert report.from_json(report.to_json()) == report


def test_an_attention_that_reads_another_stands_for_its_own_nodes():
    q, k, v = torch.randn(3, 2, 10, 4)
    alone, *two = regions(attention, q, k, v) + regions(lambda *x: attention(attention(*x), *x[1:]), q, k, v)
    assert [region.before for region in two] == [alone.before] * 2


def test_a_concatenation_counts_however_it_is_read():
    class Side(Tables):
        def __init__(self, read):
            super().__init__()
            self.read = read

        def forward(self, ids):
            rows = torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)
            return self.read(torch.cat([rows, ids[:, 1:] * 0.5], 1))

    def chunks(x):
        left, right = x.chunk(2, 1)
        return left.sin() + right.cos()

    def before(read):
        with without_inductor(), torch.no_grad(), recompile.report.collect() as report:
            torch.compile(Side(read), backend="recompile")(torch.zeros(6, 3, dtype=torch.int64))
        return report.graphs[0].regions[0].before

    assert before(torch.sin) == before(chunks)


def test_a_profile_measures_each_region():
    with torch.no_grad():
        report = recompile.explain(Tables(), torch.zeros(6, 3, dtype=torch.int64), profile=True)
    measured = report.graphs[0].regions[0].measured
    assert 0 < measured.ms < 100 and measured.bound in ("memory", "launch") and 0 < measured.reached <= 1.5
    assert f"bound by {measured.bound}" in report.text()
    assert report.from_json(report.to_json()) == report
