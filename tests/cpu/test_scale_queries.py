"""Scores that are kept: the scale of their softmax moves to the smaller side of their product."""

import pytest
import torch
from torch import nn

from recompile.passes.scale_queries import ScaleQueries
from recompile.testing import assert_refuses, assert_rewrites, assert_rewritten_same, text

torch.manual_seed(0)
B, H, N, D = 3, 2, 9, 4


def in_place(q, k):
    s = torch.einsum("bhik,bhjk->bhij", q, k)
    s /= D**0.5
    return s.softmax(-1)


SPELLINGS = {
    "in place": in_place,
    "matmul": lambda q, k: (q @ k.mT * 0.5).softmax(-1),
    "number first": lambda q, k: (0.5 * (q @ k.mT)).softmax(-1),
    "einsum of other dims": lambda q, k: (torch.einsum("bhid,bhjd->bijh", q, k) / 2).softmax(2),
    "three dims": lambda q, k: (torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) / 2).softmax(-1),
    "a negative scale": lambda q, k: (q @ k.mT / -2).softmax(-1),
}


def qk(n=N):
    return torch.randn(B, H, N, D), torch.randn(B, H, n, D)


class Weighed(nn.Module):
    """A model that returns the weights beside what it makes of them."""

    def __init__(self, scores):
        super().__init__()
        self.scores, self.keys = scores, nn.Linear(D, D)

    def forward(self, q, k):
        p = self.scores(q, self.keys(k))
        return p, p.sum(1).exp()


@pytest.mark.parametrize("name", SPELLINGS)
def test_it_fires(name):
    gm = assert_rewrites(ScaleQueries, Weighed(SPELLINGS[name]), qk())
    scaled = next(n for n in gm.graph.nodes if n.name.startswith(("div", "mul")))
    assert scaled.meta["val"].numel() == B * H * N * D


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SPELLINGS)
def test_all_passes_leave_values_and_gradients(name, dynamic):
    q, k = (x.double() for x in qk())
    _, record = assert_rewritten_same(Weighed(SPELLINGS[name]).double(), (q, k), dynamic)
    (own,) = [p for p in record.passes if p.name == "scale-queries"]
    assert sum(rule.fired for rule in own.rules) == (not dynamic)  # then D < N is not known


def test_the_smaller_side_is_scaled():
    q, k = qk(2)
    assert k.numel() < B * H * N * 2 < q.numel()
    gm = assert_rewrites(ScaleQueries, Weighed(SPELLINGS["matmul"]), (q, k))
    assert "mul(permute" in text(gm)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda q, k: (q @ k.mT / 2).softmax(-1) @ k, "Inductor's own attention may fit"),
        (Weighed(lambda q, k: (q @ k.mT * 0).softmax(-1)), "scaled by 0, scores need not be finite"),
        (Weighed(lambda q, k: (q[:, :, :3] @ k[:, :, :3].mT / 2).softmax(-1)), "known to be smaller"),
        (lambda q, k: (s := q @ k.mT, p := (s / 2).softmax(-1), p.exp()), "matmul is also used by output"),
        (Weighed(lambda q, k: (q.half() @ k.half().mT / 2).softmax(-1)), "are of torch.float16"),
        (Weighed(lambda q, k: (q.int() @ k.int().mT / 2).softmax(-1)), "are of torch.int32"),
        (Weighed(lambda q, k: (q[:0] @ k[:0].mT / 2).softmax(-1)), "known to be smaller"),
    ],
)
def test_it_refuses(model, why):
    assert_refuses(ScaleQueries, model, qk(), why=why)
