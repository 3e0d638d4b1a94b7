"""The two contractions of an attention, in the orders of dims and the spellings that models of strangers have."""

import pytest
import torch
from torch import Tensor, nn

from recompile.testing import assert_rewritten_same

B, H, N, D = 3, 2, 7, 8


class Projected(nn.Module):
    """`function` of inputs that depend on parameters, so that gradients reach the inputs of attention."""

    def __init__(self, function, count: int) -> None:
        super().__init__()
        self.function, self.scales = function, nn.Parameter(torch.linspace(0.5, 1.5, count).double())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*(x * scale for x, scale in zip(inputs, self.scales, strict=True)))


def ends(function, shapes, dynamic=None, marked=()):
    """How many attentions there are in the rewritten graph, and the refusals; values and gradients are eager's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for x, dim in ((x, dim) for x in given for dim in marked):
        torch._dynamo.mark_dynamic(x, dim)
    graph, record = assert_rewritten_same(Projected(function, len(given)), given, dynamic=dynamic)
    said = [
        r.why
        for e in record.passes
        for rule in e.rules
        for r in rule.refused
        if rule.name == "rewrite-attention"
    ]
    return sum("recompile.attention" in str(node.target) for node in graph.nodes), said


SIZES = {"static": (False, ()), "dynamic": (True, ()), "of samples": (None, (0,)), "of items": (None, (1,))}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("order", ["bnhd", "bhnd", "nbhd", "bhdn"])
def test_the_result_lies_as_eager_s(order, sizes):
    """Whatever reads it, heads merged or not: its strides are eager's, and so it needs no copy."""

    def attend(q, k, v, read):
        weights = torch.einsum("bnhd,bmhd->bhnm", q, k).softmax(-1)
        return read(torch.einsum(f"bhnm,bmhd->{order}", weights, v))

    for read in (lambda out: out * 2, lambda out: out.reshape(out.shape[0], out.shape[1], -1)):
        found = ends(lambda *qkv, read=read: attend(*qkv, read), [(B, N, H, D)] * 3, *SIZES[sizes])
        assert found == (1, [])
