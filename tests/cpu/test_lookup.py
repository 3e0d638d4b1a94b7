"""The generated C++ against the reference in plain PyTorch, over random groups of lookups."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import recompile.lowering  # noqa: F401  (registers the op)
from recompile.lowering.lookup import Bag, Lookup, Output, Table


def lookup(weights, sources, spec):
    return torch.ops.recompile.lookup(weights, sources, spec)


def grads(outs, inputs, seeds):
    return torch.autograd.grad(outs, inputs, seeds, allow_unused=True)


def check(weights, sources, spec, **tolerance):
    """Compiled equals reference: values, and gradients of tables and floating sources."""
    torch._dynamo.reset()
    expected = lookup(weights, sources, str(spec))
    actual = torch.compile(lookup)(weights, sources, str(spec))
    torch.testing.assert_close(list(actual), list(expected), equal_nan=True, **tolerance)
    inputs = [x for x in [*weights, *sources] if x.requires_grad]
    seeds = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(
        grads(actual, inputs, seeds), grads(expected, inputs, seeds), equal_nan=True, **tolerance
    )


def test_reference_against_torch():
    weights = [torch.randn(20, 4, dtype=torch.double, requires_grad=True) for _ in range(2)]
    one, many = torch.randint(0, 20, (5,)), torch.randint(0, 20, (5, 7))
    spec = Lookup(
        (Table("a", 4), Table("b", 4)),
        (Bag(0, (0,)), Bag(1, (1,), "sum", keep="Ne(x0, 0)", divisor="count + 1.0e-16")),
        (Output("concat", (0, 1)), Output("sum_of_squares", (0,), 2)),
    )
    mask = (many != 0).double()
    mean = (F.embedding(many, weights[1]) * mask[..., None]).sum(1) / (mask.sum(1, keepdim=True) + 1e-16)
    row = F.embedding(one, weights[0])
    expected = [torch.cat([row, mean], 1), (row.view(5, 2, 2) ** 2).sum(1)]
    actual = lookup(weights, [one, many], str(spec))
    torch.testing.assert_close(actual, expected)
    seeds = [torch.randn_like(x) for x in expected]
    torch.testing.assert_close(grads(actual, weights, seeds), grads(expected, weights, seeds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_every_dtype_and_kind_in_one_group(dtype, ids_dtype):
    weights = [torch.randn(r, d).to(dtype).requires_grad_() for r, d in ((20, 4), (30, 3), (40, 4))]
    dense = torch.randn(5, 2).to(dtype).requires_grad_()
    weighting = torch.randn(9).to(dtype).requires_grad_()
    sources = [
        torch.randint(0, 20, (5,), dtype=ids_dtype),
        torch.randint(0, 30, (7, 5), dtype=ids_dtype).t(),
        dense,
        torch.randint(0, 40, (9,), dtype=ids_dtype),
        torch.tensor([0, 2, 2, 6, 8], dtype=ids_dtype),
        weighting,
        torch.randn(4, 5).to(dtype).t().requires_grad_(),
    ]
    spec = Lookup(
        (Table("a", 4), Table("b", 3), Table("c", 4)),
        (
            Bag(0, (0,), frozen_row=3),
            Bag(1, (1,), "sum", keep="Ne(x0, 0)", divisor="count + 1.0e-16"),
            Bag(2, (3, 5), "sum", weight="x1", offsets=4),
            Bag(2, (3,), "max", offsets=4),
            Bag(1, (1,), "sum", divisor="sqrt(count)", dtype="float32" if dtype.itemsize == 2 else ""),
        ),
        (
            Output("concat", (0, ~2, 1, 2, 3)),
            Output("sum_of_squares", (0, ~6), 2),
            Output("sum", (0, 2, ~6), 4),
            Output("concat", (4,)),
        ),
    )
    loose = {"rtol": 4e-2, "atol": 6e-2} if dtype.itemsize == 2 else {}
    check(weights, sources, spec, **loose)


@st.composite
def groups(draw):
    """A group of bags over shared and own tables, of random widths, lengths, poolings and masks."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch = draw(st.sampled_from([1, 2, 7, 33]))
    tables = [
        (draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 16, 25])))
        for _ in range(draw(st.integers(1, 3)))
    ]
    sources, bags = [], []
    for _ in range(draw(st.integers(1, 4))):
        t = draw(st.integers(0, len(tables) - 1))
        pooling = draw(st.sampled_from(["none", "sum", "max", "jagged"]))
        rows, first = tables[t][0], len(sources)
        keep = draw(st.sampled_from(["true", "Ne(x0, 0)"]))
        divisor = draw(st.sampled_from(["", "Max(1, count)", "L + 1"]))
        if pooling == "jagged":
            lengths = torch.randint(0, 4, (batch,), generator=generator)
            ids = torch.randint(0, rows, (int(lengths.sum()),), generator=generator)
            sources += [ids, F.pad(lengths.cumsum(0), (1, 0))]
            bags.append(
                Bag(
                    t,
                    (first,),
                    "sum",
                    "x0",
                    keep,
                    divisor=divisor,
                    offsets=first + 1,
                    include_last_offset=True,
                )
            )
        elif pooling == "none":
            sources.append(torch.randint(0, rows, (batch, 2), generator=generator)[:, 1])
            bags.append(Bag(t, (first,)))
        else:
            length = draw(st.integers(1, 5))
            sources.append(torch.randint(0, rows, (length, batch), generator=generator).t())
            bags.append(Bag(t, (first,), pooling, "x0", keep, divisor=divisor if pooling == "sum" else ""))
    weights = [torch.randn(r, d, generator=generator, dtype=torch.double).requires_grad_() for r, d in tables]
    spec = Lookup(
        tuple(Table(f"t{k}", d) for k, (_, d) in enumerate(tables)),
        tuple(bags),
        (Output("concat", tuple(range(len(bags)))),),
    )
    return weights, sources, spec


@given(groups())
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_groups(group):
    check(*group)


def test_strided_copies_tables_and_gradients():
    """Columns of a transposed matrix are copied, every second column is a table, gradients are expanded."""
    table = torch.randn(20, 8, dtype=torch.double)[:, ::2].requires_grad_()
    dense = torch.randn(6, 5, dtype=torch.double).t()[:, 1:4].requires_grad_()
    ids = torch.randint(0, 20, (5,))
    spec = Lookup((Table("t", 4),), (Bag(0, (0,)),), (Output("concat", (~1, 0)), Output("sum", (0,), 2)))

    def loss(weights, sources):
        rows, total = lookup(weights, sources, str(spec))
        return (rows * rows).sum(1).sum() + rows.sum() + total.sum(0)[0]

    torch._dynamo.reset()
    expected, actual = loss([table], [ids, dense]), torch.compile(loss)([table], [ids, dense])
    torch.testing.assert_close(actual, expected)
    inputs = [table, dense]
    torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))
    for total in (lambda x: x.sum(), lambda x: x.t().contiguous().t().pow(2).sum()):
        torch._dynamo.reset()
        whole = lambda w, s, total=total: total(lookup(w, s, str(spec))[0])  # noqa: E731
        expected, actual = whole([table], [ids, dense]), torch.compile(whole)([table], [ids, dense])
        torch.testing.assert_close(torch.autograd.grad(actual, inputs), torch.autograd.grad(expected, inputs))


def test_bad_offsets_are_an_error():
    torch._dynamo.reset()
    spec = Lookup((Table("t", 4),), (Bag(0, (0,), "sum", offsets=1),), (Output("concat", (0,)),))
    compiled = torch.compile(lookup)
    weights, ids = [torch.randn(9, 4)], torch.randint(0, 9, (6,))
    for offsets in ([0, 4, 2], [1, 2, 3], [0, 2, 7]):
        with pytest.raises(RuntimeError, match="bad offsets for table 't'"):
            compiled(weights, [ids, torch.tensor(offsets)], str(spec))


def test_the_gradient_does_not_depend_on_threads():
    spec = Lookup((Table("t", 16),), (Bag(0, (0,), "sum"),), (Output("concat", (0,)),))
    weights, ids = [torch.randn(40_000, 16, requires_grad=True)], torch.randint(0, 500, (300, 20))
    found = []
    for threads in (1, 2):
        torch._dynamo.reset()
        torch.set_num_threads(threads)
        out = torch.compile(lookup)(weights, [ids], str(spec))
        found.append(torch.autograd.grad(out[0].sum(), weights)[0])
    assert torch.equal(*found)


def test_spec_text_round_trips():
    spec = Lookup((Table("t", 4),), (Bag(0, (0, 1), "sum", keep="l < x1"),), (Output("concat", (0, ~2)),))
    assert Lookup.parse(str(spec)) == spec
    with pytest.raises(ValueError, match=r"expected a Lookup"):
        Lookup.parse("1")


def test_weights_shared_by_several_bags():
    """Their gradient is the sum over the bags, whatever the number of threads."""
    tables = [torch.randn(5000, 16, dtype=torch.double, requires_grad=True) for _ in range(3)]
    ids, weight = (
        torch.randint(0, 5000, (600, 4)),
        torch.randn(600, 4, dtype=torch.double, requires_grad=True),
    )
    bags = tuple(Bag(t, (0, 1), "sum", weight="x1") for t in range(3))
    spec = Lookup(tuple(Table(f"t{t}", 16) for t in range(3)), bags, (Output("concat", (0, 1, 2)),))
    check(tables, [ids, weight], spec)


def test_a_maximum_passes_nan_on():
    weights, ids = (
        [torch.randn(9, 5, dtype=torch.double).requires_grad_()],
        torch.tensor([[0, 1, 2], [1, 0, 1], [0, 2, 3]]),
    )
    with torch.no_grad():
        weights[0][1] = torch.nan
    spec = Lookup((Table("t", 5),), (Bag(0, (0,), "max"),), (Output("concat", (0,)),))
    check(weights, [ids], spec)
    assert torch.allclose(lookup(weights, [ids], str(spec))[0], weights[0][ids].max(1).values, equal_nan=True)


def test_rows_computed_from_ids_below_zero_and_in_few_bits():
    tables = [torch.randn(20, 4, dtype=torch.double, requires_grad=True) for _ in range(4)]
    ids, few = torch.randint(-60, 60, (33, 3)), torch.randint(-(2**31), 2**31, (33,), dtype=torch.int32)
    rows = (
        "floordiv(x0, 6) + 10",
        "where((x0 < 0) | (x0 >= 20), Mod(Max(-x0, x0), 20), x0)",
        "Mod(3*where(x0 < 0, 2000000001, 1999999999), 20)",
    )
    bags = (
        *(Bag(t, (0,), "sum", row) for t, row in enumerate(rows)),
        Bag(3, (1,), row="Mod(x0*1000003, 20)"),
    )
    spec = Lookup(tuple(Table(f"t{t}", 4) for t in range(4)), bags, (Output("concat", (0, 1, 2, 3)),))
    check(tables, [ids, few], spec)
