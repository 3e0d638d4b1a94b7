"""The generated Triton, interpreted on the CPU, against the reference in plain PyTorch: values and gradients.

TRITON_INTERPRET=1 python -m pytest tests/interpret/interpreted.py
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from triton.runtime import interpreter

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.lookup import Bag, Lookup, Output, Table, op, triton_forward

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
lookup = op.op_for("cuda")


@pytest.fixture(autouse=True)
def asserting(monkeypatch):
    """Device asserts are on, as under Inductor."""
    monkeypatch.setattr(
        interpreter.interpreter_builder, "options", interpreter.InterpreterOptions(debug=True)
    )


def check(weights, sources, spec, **tolerance):
    expected = torch.ops.recompile.lookup(weights, sources, str(spec))
    actual = lookup(weights, sources, str(spec))
    torch.testing.assert_close(list(actual), list(expected), equal_nan=True, **tolerance)
    inputs = [x for x in [*weights, *sources] if x.requires_grad]
    seeds = [torch.randn_like(x) for x in expected]
    gradients = [torch.autograd.grad(outs, inputs, seeds) for outs in (actual, expected)]
    torch.testing.assert_close(*gradients, equal_nan=True, **tolerance)


def table(rows, dim, dtype=torch.double):
    return torch.randn(rows, dim).to(dtype).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ids_dtype", [torch.int64, torch.int32])
def test_every_dtype_and_kind_in_one_group(dtype, ids_dtype):
    weights = [table(r, d, dtype) for r, d in ((20, 4), (30, 3), (40, 4))]
    dense = torch.randn(5, 2).to(dtype).requires_grad_()
    weighting = torch.randn(9).to(dtype).requires_grad_()
    sources = [
        torch.randint(0, 20, (5,), dtype=ids_dtype),
        torch.randint(0, 30, (7, 5), dtype=ids_dtype).t(),
        dense,
        torch.randint(0, 40, (9,), dtype=ids_dtype),
        torch.tensor([0, 2, 2, 6, 8], dtype=ids_dtype),
        weighting,
    ]
    bags = (
        Bag(0, (0,), frozen_row=3),
        Bag(1, (1,), "sum", keep="Ne(x0, 0)", divisor="count + 1.0e-16"),
        Bag(2, (3, 5), "sum", weight="x1", offsets=4),
        Bag(2, (3,), "max", offsets=4),
        Bag(1, (1,), "sum", divisor="sqrt(count)", dtype="float32" if dtype.itemsize == 2 else ""),
    )
    outputs = (
        Output("concat", (0, ~2, 1, 2, 3)),
        Output("concat", (3, 0)),
        Output("sum_of_squares", (0,), 2),
        Output("sum", (0, 2), 4),
        Output("concat", (4,)),
    )
    spec = Lookup((Table("a", 4), Table("b", 3), Table("c", 4)), bags, outputs)
    loose = {"rtol": 4e-2, "atol": 6e-2} if dtype.itemsize == 2 else {}
    check(weights, sources, spec, **loose)


@st.composite
def groups(draw):
    """A group of bags over shared and own tables, of random widths, lengths, poolings, masks and weights."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random_ids(*size):
        dtype = draw(st.sampled_from([torch.int64, torch.int32]))
        return torch.randint(0, rows, size, generator=generator, dtype=dtype)

    batch = draw(st.sampled_from([1, 2, 7, 33, 300]))
    shapes = st.tuples(st.integers(1, 40), st.sampled_from([1, 3, 16, 25, 64]))
    tables = draw(st.lists(shapes, min_size=1, max_size=3))
    sources, bags = [], []
    for _ in range(draw(st.integers(1, 4))):
        t, first = draw(st.integers(0, len(tables) - 1)), len(sources)
        rows = tables[t][0]
        keep = draw(st.sampled_from(["true", "Ne(x0, 0)", "(x0 > 1) & (l < 3)"]))
        divisor = draw(st.sampled_from(["", "Max(1, count)", "L + 1"]))
        kind = draw(st.sampled_from(["none", "rows", "sum", "weighted", "max", "jagged", "jagged max"]))
        pooling = "max" if "max" in kind else "sum"
        divisor = "" if pooling == "max" else divisor
        if kind == "none":
            sources.append(random_ids(batch, 3)[:, 1])
            bags.append(Bag(t, (first,), row=f"Mod(x0 - 5, {rows})", frozen_row=draw(st.integers(-1, 3))))
        elif kind == "rows":
            sources.append(random_ids(batch, draw(st.integers(1, 4))))
            bags.append(Bag(t, (first,)))
        elif kind.startswith("jagged"):
            lengths = torch.randint(0, 4, (batch,), generator=generator)
            sources += [random_ids(int(lengths.sum())), F.pad(lengths.cumsum(0), (1, 0))]
            whole = {"offsets": first + 1, "include_last_offset": True}
            bags.append(Bag(t, (first,), pooling, keep=keep, divisor=divisor, **whole))
        else:
            length = draw(st.sampled_from([1, 2, 5, 40]))
            sources.append(random_ids(length, batch).t())
            loads, weight = (first,), ""
            if kind == "weighted":
                loads, weight = (first, first + 1), "x1"
                sources.append(torch.randn(batch, length, generator=generator).double().requires_grad_())
            bags.append(Bag(t, loads, pooling, keep=keep, weight=weight, divisor=divisor))
    weights = [torch.randn(r, d, generator=generator, dtype=torch.double).requires_grad_() for r, d in tables]
    named = tuple(Table(f"t{k}", d) for k, (_, d) in enumerate(tables))
    return weights, sources, Lookup(named, tuple(bags), (Output("concat", tuple(range(len(bags)))),))


@given(groups())
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_groups(group):
    check(*group)


def test_a_bag_that_skips_rows_of_zeros():
    weights, ids = [table(9, 5)], torch.randint(0, 9, (6, 4))
    with torch.no_grad():
        weights[0][:5] = 0
    bag = Bag(0, (0,), "sum", count="nonzero", divisor="count + 1.0e-9")
    check(weights, [ids], Lookup((Table("t", 5),), (bag,), (Output("concat", (0,)),)))


def test_masks_positions_and_float_ids():
    """A mask that is loaded, lengths that positions are compared with, and ids kept as floats."""
    weights = [table(30, 4), table(30, 4)]
    sources = [
        torch.randint(0, 30, (6, 5)),
        torch.rand(6, 5) > 0.5,
        torch.randint(0, 6, (6, 1)),
        torch.rand(6) * 29,
    ]
    bags = (
        Bag(0, (0, 1), "sum", keep="Ne(x1, 0)", divisor="Max(1, count)"),
        Bag(1, (0, 2), "max", keep="~(l >= x1)"),
        Bag(1, (3,), row="trunc(x0)"),
    )
    spec = Lookup((Table("a", 4), Table("b", 4)), bags, (Output("concat", (0, 1, 2)),))
    check(weights, sources, spec)


def test_rows_wider_than_a_program():
    weights, ids = [table(7, 1100), table(7, 1025)], torch.randint(0, 7, (3, 2))
    bags = (Bag(0, (0,)), Bag(1, (0,), "sum"))
    check(weights, [ids], Lookup((Table("a", 1100), Table("b", 1025)), bags, (Output("concat", (0, 1)),)))


def test_many_tables_take_several_launches():
    weights = [table(5 + t, 4) for t in range(70)]
    ids = torch.randint(0, 5, (6, 70))
    fields = tuple(range(70))
    bags = tuple(Bag(t, (t,)) for t in fields)
    outputs = (Output("concat", fields), Output("sum", fields, 4))
    spec = Lookup(tuple(Table(f"t{t}", 4) for t in fields), bags, outputs)
    sources = [ids[:, t] for t in fields]
    check(weights, sources, spec)
    runs = list(triton_forward.split(spec, fields))
    assert len(runs) == 3 and [j for run in runs for j in run] == list(fields)


def test_strided_tables_copies_and_gradients():
    weights = [torch.randn(20, 8, dtype=torch.double)[:, ::2].requires_grad_()]
    dense = torch.randn(6, 5, dtype=torch.double).t()[:, 1:4].requires_grad_()
    spec = Lookup((Table("t", 4),), (Bag(0, (0,)),), (Output("concat", (~1, 0)), Output("sum", (0,), 2)))
    sources = [torch.randint(0, 20, (5,)), dense]
    check(weights, sources, spec)
    for loss in (lambda x: x.sum(), lambda x: x.t().contiguous().t().pow(2).sum()):
        found = [
            torch.autograd.grad(loss(which(weights, sources, str(spec))[0]), [*weights, dense])
            for which in (lookup, torch.ops.recompile.lookup)
        ]
        torch.testing.assert_close(*found)


POOLINGS = ["none", "sum", "max"]


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_a_bad_id_is_an_assert(pooling, bad):
    spec = Lookup((Table("t", 4),), (Bag(0, (0,), pooling),), (Output("concat", (0,)),))
    with pytest.raises(Exception, match="index out of range"):
        lookup([torch.randn(9, 4)], [torch.tensor([[1, bad]])], str(spec))


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("bad", [-1, 9, 1 << 40])
def test_without_asserts_a_bad_id_reads_and_writes_nothing(pooling, bad, monkeypatch):
    """An address that far away would end the process."""
    monkeypatch.setattr(interpreter.interpreter_builder, "options", interpreter.InterpreterOptions())
    spec = Lookup((Table("t", 4),), (Bag(0, (0,), pooling),), (Output("concat", (0,)),))
    weight = torch.full((9, 4), 7.0, requires_grad=True)
    rows = lookup([weight], [torch.tensor([[bad, 1]])], str(spec))[0]
    expected = {"none": [0.0] * 4 + [7.0] * 4, "sum": [7.0] * 4, "max": [7.0] * 4}[pooling]
    assert rows.tolist() == [expected]
    (gradient,) = torch.autograd.grad(rows.sum(), weight)
    assert gradient.sum() == gradient[1].sum() == 4


def test_bad_offsets_are_an_assert():
    spec = Lookup((Table("t", 4),), (Bag(0, (0,), "sum", offsets=1),), (Output("concat", (0,)),))
    for offsets in ([0, 4, 2], [1, 2, 3], [0, 2, 7]):
        with pytest.raises(Exception, match="bad offsets"):
            lookup([torch.randn(9, 4)], [torch.randint(0, 9, (6,)), torch.tensor(offsets)], str(spec))


def test_no_samples():
    spec = Lookup((Table("t", 4),), (Bag(0, (0,)),), (Output("concat", (0,)), Output("sum", (0,), 2)))
    rows, total = lookup([table(9, 4)], [torch.zeros(0, dtype=torch.int64)], str(spec))
    assert rows.shape == (0, 4) and total.shape == (0, 2)


def test_a_maximum_passes_nan_on():
    weights, ids = [torch.randn(9, 5).requires_grad_()], torch.tensor([[0, 1, 2], [1, 0, 1], [0, 2, 3]])
    with torch.no_grad():
        weights[0][1] = torch.nan
    spec = Lookup((Table("t", 5),), (Bag(0, (0,), "max"),), (Output("concat", (0,)),))
    check(weights, [ids], spec)
    assert torch.allclose(lookup(weights, [ids], str(spec))[0], weights[0][ids].max(1).values, equal_nan=True)


def test_rows_computed_from_ids_below_zero_and_in_few_bits():
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
    check([table(20, 4) for _ in range(4)], [ids, few], spec)
