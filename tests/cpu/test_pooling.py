"""What hand-written pooling becomes: the bag in the spec, and eager's values and gradients from its reference."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from recompile.lowering.lookup import Bag, Lookup
from recompile.testing import assert_rewritten_same

D, L = 4, 7


class Pool(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.table, self.how = nn.Embedding(50, D, padding_idx=0).double(), how
        self.scores = nn.Parameter(torch.randn(L, dtype=torch.double))

    def forward(self, x, n):
        return self.how(self, x, n)


def pooled(how, dynamic=False):
    """(the bags, what was refused) after the passes; values and gradients are checked on the way."""
    torch.manual_seed(0)
    x = torch.randint(1, 50, (5, L)) * (torch.rand(5, L) > 0.4)
    x[0], x[1] = 0, 3
    graph, record = assert_rewritten_same(Pool(how), (x, (x != 0).sum(1)), dynamic)
    specs = [Lookup.parse(str(n.args[2])) for n in graph.nodes if "recompile" in str(n.target)]
    return [bag for spec in specs for bag in spec.bags], [
        refusal.why for p in record.passes for rule in p.rules for refusal in rule.refused
    ]


def mask(x):
    return (x != 0).double()


KEPT = Bag(0, (0,), "sum", keep="Ne(x0, 0)", frozen_row=0)
SPELLINGS = {
    "expanded mask": (
        lambda m, x, n: (m.table(x) * mask(x).unsqueeze(2).expand(-1, -1, D)).sum(1),
        KEPT,
    ),
    "repeated mask": (lambda m, x, n: (m.table(x) * mask(x)[..., None].repeat(1, 1, D)).sum(1), KEPT),
    "interleaved lengths": (
        lambda m, x, n: (
            m.table(x)
            * torch.repeat_interleave((torch.arange(L) < n[:, None])[:, None].transpose(1, 2), D, 2).double()
        ).sum(1),
        Bag(0, (0, 1), "sum", keep="l < x1", frozen_row=0),
    ),
    "positions from 1": (
        lambda m, x, n: (m.table(x) * (torch.arange(1, L + 1) <= n[:, None]).view(-1, L, 1)).sum(1),
        Bag(0, (0, 1), "sum", keep="l + 1 <= x1", frozen_row=0),
    ),
    "one position for all": (
        lambda m, x, n: (m.table(x) * (torch.arange(1) < n[:, None])[..., None]).sum(1),
        Bag(0, (0, 1, 2), "sum", keep="x1 < x2", frozen_row=0),
    ),
    "matmul": (lambda m, x, n: (mask(x).unsqueeze(1) @ m.table(x)).squeeze(1), KEPT),
    "matmul, rows first": (
        lambda m, x, n: (m.table(x).transpose(1, 2) @ mask(x).unsqueeze(2)).squeeze(2),
        KEPT,
    ),
    "einsum": (lambda m, x, n: torch.einsum("bl,bld->bd", mask(x), m.table(x)), KEPT),
    "columns first": (lambda m, x, n: (m.table(x) * mask(x)[..., None]).permute(0, 2, 1).sum(-1), KEPT),
    "where zeros": (
        lambda m, x, n: torch.where((x != 0)[..., None], (e := m.table(x)), torch.zeros_like(e)).sum(1),
        KEPT,
    ),
    "one minus": (lambda m, x, n: (m.table(x) * (1 - (x == 0).double())[..., None]).sum(1), KEPT),
    "two masks": (
        lambda m, x, n: (m.table(x).masked_fill((x == 0)[..., None], 0) * (x < 40)[..., None]).sum(1),
        replace(KEPT, keep="(x0 < 40) & Ne(x0, 0)"),
    ),
    "a mask from elsewhere": (
        lambda m, x, n: (m.table(x) * (x.cumsum(1) > 9)[..., None]).sum(1),
        Bag(0, (0, 1), "sum", keep="x1 > 9", frozen_row=0),
    ),
    "mean": (
        lambda m, x, n: (m.table(x) * mask(x)[..., None]).sum(1) / mask(x).sum(1, keepdim=True),
        replace(KEPT, divisor="count"),
    ),
    "mean, counted by count_nonzero": (
        lambda m, x, n: (
            (m.table(x) * mask(x)[..., None]).sum(1) / x.count_nonzero([1]).unsqueeze(1).clamp(min=1)
        ),
        replace(KEPT, divisor="Max(1, count)"),
    ),
    "mean, kept dims": (
        lambda m, x, n: (
            (m.table(x) * mask(x)[..., None]).sum(1, keepdim=True) / (mask(x).sum(1)[:, None, None] + 1e-8)
        ),
        replace(KEPT, divisor="count + 1.0e-8"),
    ),
    "mean of rows that are not zeros": (
        lambda m, x, n: (e := m.table(x)).sum(1) / ((e.sum(-1) != 0).double().sum(-1, keepdim=True) + 1e-12),
        Bag(0, (0,), "sum", count="nonzero", divisor="count + 1.0e-12", frozen_row=0),
    ),
    "mean over all": (
        lambda m, x, n: m.table(x).mean(-2),
        Bag(0, (0,), "sum", divisor="L", frozen_row=0),
    ),
    "softmax weights": (
        lambda m, x, n: (torch.softmax(m.scores * mask(x), 1)[..., None] * m.table(x)).sum(1),
        Bag(0, (0, 1), "sum", weight="x1", frozen_row=0),
    ),
    "a weight for each position": (
        lambda m, x, n: (m.table(x) * m.scores[None, :, None]).sum(1),
        Bag(0, (0, 1), "sum", weight="x1", frozen_row=0),
    ),
    "weights and a mask": (
        lambda m, x, n: (m.table(x) * mask(x)[..., None] * torch.sigmoid(m.scores)[:, None]).sum(1),
        Bag(0, (0, 1), "sum", keep="Ne(x0, 0)", weight="x1", frozen_row=0),
    ),
    "ids as weights": (
        lambda m, x, n: (m.table(x) * x[..., None].double()).sum(1),
        Bag(0, (0,), "sum", weight="x0", frozen_row=0),
    ),
    "a truth of small numbers": (
        lambda m, x, n: (m.table(x) * x.to(torch.int8).bool()[..., None]).sum(1),
        Bag(0, (0, 1), "sum", keep="Ne(x1, 0)", frozen_row=0),
    ),
    "inverted bits of a mask": (
        lambda m, x, n: (m.table(x) * ~(x != 0).long()[..., None]).sum(1),
        Bag(0, (0, 1), "sum", weight="x1", frozen_row=0),
    ),
    "computed ids as weights": (
        lambda m, x, n: (m.table(x) * (x % 7)[..., None].double()).sum(1),
        Bag(0, (0, 1), "sum", weight="x1", frozen_row=0),
    ),
    "several lists a sample": (
        lambda m, x, n: m.table(x[:, :6].reshape(-1, 2, 3)).sum(2).flatten(1),
        Bag(0, (0,), "sum", frozen_row=0),
    ),
    "hashed ids": (
        lambda m, x, n: m.table((x + 3).clamp(1, 60) % 50).sum(1),
        Bag(0, (0,), "sum", row="Mod(Min(60, Max(1, x0 + 3)), 50)", frozen_row=0),
    ),
    "unknown ids": (
        lambda m, x, n: m.table(torch.where((x > 2) & (x < 40), x, 1)).sum(1),
        Bag(0, (0,), "sum", row="where((x0 > 2) & (x0 < 40), x0, 1)", frozen_row=0),
    ),
    "ids filled by their lengths": (
        lambda m, x, n: m.table(torch.where(torch.arange(L) < n[:, None], x, 0)).sum(1),
        Bag(0, (0,), "sum", frozen_row=0),
    ),
    "max": (lambda m, x, n: m.table(x).max(1).values, Bag(0, (0,), "max", frozen_row=0)),
    "masked max": (
        lambda m, x, n: m.table(x).masked_fill((x == 0)[..., None], float("-inf")).max(1)[0],
        replace(KEPT, pooling="max", empty="-inf"),
    ),
    "masked max by subtraction": (
        lambda m, x, n: (m.table(x) - (1 - mask(x)[..., None]) * 1e9).max(1, keepdim=True)[0],
        replace(KEPT, pooling="max", empty="-1000000000.0"),
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_spellings(name, dynamic):
    how, expected = SPELLINGS[name]
    bags, refused = pooled(how, dynamic)
    assert len(bags) == 1, refused
    assert replace(bags[0], loads=expected.loads) == expected
    assert len(bags[0].loads) == len(expected.loads)


REFUSED = {
    "the looked-up rows are also used by": lambda m, x, n: (e := m.table(x)).sum(1) + e[:, 0],
    "the multiplier differs from column to column": lambda m, x, n: (
        m.table(x) * torch.arange(float(D)).double()
    ).sum(1),
    "the rows have several weights": lambda m, x, n: (
        m.table(x) * m.scores[:, None] * torch.exp(m.scores)[:, None]
    ).sum(1),
    "amax shares its gradient among equal values": lambda m, x, n: m.table(x).amax(1),
    "a maximum of rows that are multiplied": lambda m, x, n: (m.table(x) * mask(x)[..., None]).max(1)[0],
    "masked positions are filled with -1.0": lambda m, x, n: (
        m.table(x).masked_fill((x == 0)[..., None], -1.0).sum(1)
    ),
    "which the lookup reads, is written in place": lambda m, x, n: _written(m, x),
}


def _written(m, x):
    other = x.cumsum(1)
    kept = (other != 0)[..., None].double()
    other.detach().fill_(1)
    return (m.table(x) * kept).sum(1)


@pytest.mark.parametrize("why", REFUSED)
def test_refusals(why):
    bags, refused = pooled(REFUSED[why])
    assert all(bag.pooling == "none" for bag in bags)
    assert any(why in sentence for sentence in refused), refused
