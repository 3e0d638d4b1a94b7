"""Tensors of more than 2^31 elements, of which the kernels, interpreted on the CPU, touch a few: addresses are 64 bits.

TRITON_INTERPRET=1 python -m pytest tests/interpret/huge_interpreted.py

The memory is asked for and, but for some pages, never touched.
"""

import os

import pytest
import torch

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.attention import Attention
from recompile.lowering.attention import op as attention_op
from recompile.lowering.lookup import Bag, Lookup, Output, Table, op, triton_backward

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
lookup, attention = op.op_for("cuda"), attention_op.op_for("cuda")
DIM, MANY = 64, 2**31


@pytest.fixture(scope="module")
def table():
    """Rows on both sides of element 2^31; three of them hold numbers."""
    rows = MANY // DIM + 100
    table = torch.empty(rows, DIM, dtype=torch.bfloat16)
    table[3], table[rows - 50], table[rows - 1] = 3, 50, 1
    return table


@pytest.mark.parametrize("pooling", ["none", "sum", "max"])
def test_rows(table, pooling):
    rows = table.shape[0]
    ids = torch.tensor([[3, rows - 1], [rows - 50, rows - 50]])
    spec = Lookup((Table("t", DIM),), (Bag(0, (0,), pooling),), (Output("concat", (0,)),))
    found, wanted = (which([table], [ids], str(spec)) for which in (lookup, torch.ops.recompile.lookup))
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("pooling", ["none", "sum", "max"])
def test_gradients_of_rows(table, pooling):
    from recompile.lowering.lookup.triton_op import _run

    rows = table.shape[0]
    ids = torch.tensor([[rows - 1], [rows - 50], [3]])
    spec = Lookup((Table("t", DIM),), (Bag(0, (0,), pooling),), (Output("concat", (0,)),))
    into = torch.empty(rows, DIM)
    into[[3, rows - 1, rows - 50]] = 0
    grad = torch.randn(3, DIM)
    for launch in triton_backward.launches(spec, [grad], [table], [ids], {0: into}, {}, 3):
        _run(launch)
    torch.testing.assert_close(into[ids[:, 0]], grad)


def test_ids_and_copies_with_long_strides():
    """Columns of a batch of 2^31 / 4 samples, of which the first two are asked for."""
    step = MANY // 4
    ids = torch.empty(5 * step + 2, dtype=torch.int32).as_strided((2, 6), (1, step))
    dense = torch.empty(5 * step + 2, dtype=torch.bfloat16).as_strided((2, 6), (1, step))
    ids.copy_(torch.arange(12).view(2, 6))
    dense.copy_(torch.arange(12).view(2, 6))
    weights, sources = [torch.randn(12, 8, dtype=torch.bfloat16)], [ids, dense]
    for bag in (Bag(0, (0,)), Bag(0, (0,), "sum")):
        spec = Lookup((Table("t", 8),), (bag,), (Output("concat", (0, ~1)),))
        found, wanted = (which(weights, sources, str(spec)) for which in (lookup, torch.ops.recompile.lookup))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("rows, sample", [(MANY // 16, 16), (16, MANY)], ids=["rows", "samples"])
def test_attention_over_long_strides(rows, sample):
    """Rows, or samples, so far apart that the last begins beyond element 2^31."""
    size = 2 * sample + 19 * rows + 16
    spec = Attention("where(j <= i, s, -oo)", True, (), "j <= i", "s")
    q, k, v = (
        torch.empty(size, dtype=torch.bfloat16).as_strided((2, 1, 20, 16), (sample, 0, rows, 1))
        for _ in range(3)
    )
    near = []
    for x in (q, k, v):
        x.copy_(torch.randn(2, 1, 20, 16))
        near.append(x.contiguous().requires_grad_())
    far = [x.requires_grad_() for x in (q, k, v)]
    out, expected = (attention(*x, [], str(spec))[0] for x in (far, near))
    torch.testing.assert_close(out, expected)
    found, wanted = (torch.autograd.grad(o.float().sum(), x) for o, x in ((out, far), (expected, near)))
    torch.testing.assert_close(found, wanted)
