"""Ids computed from ids: each expression is eager's number for every id, also where numbers overflow."""

import pytest
import torch
from torch.nn import functional as F

from recompile.lowering import scalar
from recompile.lowering.lookup import Lookup
from recompile.passes.fuse_lookups import FuseLookups
from recompile.passes.ids import ids_of
from recompile.testing import assert_refuses, assert_rewritten_same, capture

FOLLOWED = {  # of ids in 64 bits
    "product": (lambda x: x * 3, "3*x0"),
    "hash": (lambda x: (x * 2654435761 + 11) % 1000, "Mod(2654435761*x0 + 11, 1000)"),
    "quotient": (lambda x: x // 20, "floordiv(x0, 20)"),
    "rounded quotient": (lambda x: torch.div(x, 7, rounding_mode="floor"), "floordiv(x0, 7)"),
    "quotient of a remainder": (lambda x: x % 140 // 20 * 2 - 1, "2*floordiv(Mod(x0, 140), 20) - 1"),
    "absolute": (lambda x: x.abs() % 10, "Mod(Max(-x0, x0), 10)"),
    "low bits": (lambda x: x & 7, "Mod(x0, 8)"),
    "unknown ids by where": (lambda x: torch.where(x < 10, x, 0), "where(x0 < 10, x0, 0)"),
    "by where, zeros": (lambda x: torch.where(x >= 10, torch.zeros_like(x), x), "where(x0 >= 10, 0, x0)"),
    "unknown ids filled": (lambda x: x.masked_fill(x == -1, 9), "where(Eq(x0, -1), 9, x0)"),
    "both ends": (
        lambda x: torch.where((x >= 0) & (x < 10), x + 1, 0),
        "where((x0 >= 0) & (x0 < 10), x0 + 1, 0)",
    ),
    "not": (lambda x: x.masked_fill(~(x > 3), 3), "where(x0 <= 3, 3, x0)"),
    "fewer bits that suffice": (lambda x: (x % 1000).int() * 2 + 1, "2*(Mod(x0, 1000)) + 1"),
}
NOT = {  # what is computed from them is loaded
    "overflows before it is simplified": lambda x: x * 6 % 4,
    "overflows once it is simplified": lambda x: (x % 100 + 3) % 10,
    "a cast that cuts bits": lambda x: x.int(),
    "a product in 32 bits": lambda x: (x % 10**6).int() * 10**4,
    "an absolute value in 32 bits": lambda x: x.int().abs(),
    "a constant beyond 64 bits": lambda x: x * 2**40 * 2**40,
    "a negative divisor": lambda x: x // -3,
    "a quotient rounded to zero": lambda x: torch.div(x, 3, rounding_mode="trunc"),
    "a condition on other ids": lambda x: torch.where(x.flip(0) < 3, x, 0),
}
ENDS = [2**63 - 1, 2**62 + 5, 2**32 + 7, 2**31 - 1, 999, 20, 10, 3, 1]
EDGES = torch.tensor([0, *ENDS, *(-n for n in ENDS), -(2**63)])


def followed(function, x):
    """(what is loaded, the expression, its values at `x`) for the ids that `function` computes."""
    graph = capture(function, x).graph
    source, row = ids_of(graph.output_node().args[0][0])
    value = scalar.evaluate(scalar.parse(scalar.text(row)), {"x0": x.long()})
    return source.op, scalar.text(row), value


@pytest.mark.parametrize("case", FOLLOWED)
def test_arithmetic_is_followed_to_the_ids(case):
    function, expected = FOLLOWED[case]
    op, row, value = followed(function, EDGES)
    assert (op, row) == ("placeholder", expected)
    assert torch.equal(value, function(EDGES).long())


@pytest.mark.parametrize("case", NOT)
def test_what_may_be_another_number_is_loaded(case):
    op, row, _ = followed(NOT[case], EDGES)
    assert op == "call_function" or row == "x0"


@pytest.mark.parametrize(
    "function", [lambda x: x % 100 * 3, lambda x: x // 2, lambda x: x.clamp(0, 9).long() * 10**12]
)
def test_ids_in_32_bits(function):
    x = EDGES.clamp(-(2**31), 2**31 - 1).int()
    op, _, value = followed(function, x)
    assert op == "placeholder" and torch.equal(value.long(), function(x).long())


def test_sums_in_32_bits_are_loaded():
    assert followed(lambda x: x + 7, EDGES.int())[1] == "x0"


class Tables(torch.nn.Module):
    """Rows of two tables by `how(table, ids)`, concatenated."""

    def __init__(self, how, rows=20):
        super().__init__()
        self.how = how
        self.a, self.b = (torch.nn.Parameter(torch.randn(rows, n, dtype=torch.double)) for n in (4, 3))

    def forward(self, *ids):
        return torch.cat([self.how(self.a, *ids), self.how(self.b, *ids)], 1)


def bag(x, w, *args, **kwargs):
    return F.embedding_bag(x, w, *args, mode="sum", **kwargs)


POOLED = torch.randint(0, 100, (6, 3))
OFFSETS = torch.tensor([0, 2, 2, 5])
LOOKUPS = {
    "bags of hashed ids": (lambda w, x: bag(x % 20, w), (POOLED,), "Mod(x0, 20)"),
    "jagged": (
        lambda w, x, off: bag(x.long() // 5, w, off),
        (POOLED.flatten().int(), OFFSETS),
        "floordiv(x0, 5)",
    ),
    "float ids": (lambda w, x, off: bag(x.long(), w, off), (torch.rand(9) * 20, OFFSETS), "trunc(x0)"),
    "padded": (lambda w, x: bag(x % 20, w, padding_idx=3), (POOLED,), "Mod(x0, 20)"),
    "index_select": (lambda w, x: w.index_select(0, x), (torch.arange(6),), "x0"),
    "brackets": (lambda w, x: w[x], (torch.arange(-20, 20),), "where(x0 < 0, x0 + 20, x0)"),
    "brackets, never below 0": (lambda w, x: w[x % 20], (torch.arange(-20, 20),), "Mod(x0, 20)"),
    "one hot": (lambda w, x: F.one_hot(x, 20).double() @ w, (torch.arange(6),), "x0"),
    "one hot by mm": (
        lambda w, x: torch.mm(F.one_hot(x % 20, 20).to(w), w),
        (torch.arange(60),),
        "Mod(x0, 20)",
    ),
    "flat ids": (lambda w, x: F.embedding(x.flatten(), w).view(6, 3, -1).sum(1), (POOLED % 20,), "x0"),
}


@pytest.mark.parametrize("case", LOOKUPS)
def test_lookups(case):
    """Two bags in one region, which loads the ids as they come in; values and gradients are eager's."""
    how, ids, row = LOOKUPS[case]
    graph, _ = assert_rewritten_same(Tables(how), ids)
    (node,) = (n for n in graph.nodes if "recompile" in str(n.target))
    assert [b.row for b in Lookup.parse(node.args[2]).bags] == [row] * 2
    assert all(source.op == "placeholder" for source in node.args[1])


@pytest.mark.parametrize("ids", [[-21], [20]])
@pytest.mark.parametrize("case", ["brackets", "one hot", "index_select"])
def test_ids_outside_the_table_are_an_error(case, ids):
    with pytest.raises((IndexError, RuntimeError), match=r"range|smaller|negative"):
        assert_rewritten_same(Tables(LOOKUPS[case][0]), (torch.tensor(ids),))


COMPUTED = {
    "scaled": lambda w, x: F.embedding(x, w * 0.5),
    "of fewer bits": lambda w, x: F.embedding(x, w.detach().half().float()),
    "a view of it": lambda w, x: F.embedding(x, w.tanh().view(20, -1)),
}


@pytest.mark.parametrize("case", COMPUTED)
def test_tables_that_are_computed_row_by_row_are_left_to_inductor(case):
    why = "the table is computed elementwise: Inductor computes only the rows that are read"
    assert_refuses(FuseLookups, Tables(COMPUTED[case]), (torch.arange(6),), why=why)


def test_tables_that_are_written_out_anyway_are_read():
    for how in (
        lambda w, x: bag(x[:, None], w * 2),
        lambda w, x: F.embedding(x, w @ w.mT @ w),
        lambda w, x: F.embedding(x, y := w * 2) + y.sum(0),
    ):
        _, record = assert_rewritten_same(Tables(how), (torch.arange(6),))
        assert not [
            r.why for p in record.passes for u in p.rules for r in u.refused if "elementwise" in r.why
        ]


def test_ids_that_are_written_on_the_way_are_not_followed():
    def how(w, x):
        ids = x * 3
        ids.as_strided((6,), (1,)).fill_(7)
        return F.embedding(ids % 20, w)

    assert_refuses(
        FuseLookups, Tables(how), (torch.arange(6),), why="which the lookup reads, is written in place"
    )
    assert_rewritten_same(Tables(how), (torch.arange(6),))
