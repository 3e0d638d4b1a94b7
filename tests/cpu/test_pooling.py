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
        self.other, self.one = nn.Embedding(50, 3).double(), nn.Embedding(50, 1).double()
        self.again = nn.Embedding(50, D).double()
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
    "zeros of the rows' kind": (
        lambda m, x, n: ((e := m.table(x)) * mask(x)[..., None]).sum(1) + e.new_zeros(x.shape[0], D),
        KEPT,
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
    "where zeros, inverted": (
        lambda m, x, n: torch.where((x == 0)[..., None], torch.zeros_like(e := m.table(x)), e).sum(1),
        KEPT,
    ),
    "where a number, inverted": (
        lambda m, x, n: torch.where((x == 0)[..., None], 0.0, m.table(x)).sum(1),
        KEPT,
    ),
    "filled with a tensor": (
        lambda m, x, n: m.table(x).masked_fill((x == 0)[..., None], torch.tensor(0.0)).sum(1),
        KEPT,
    ),
    "a mask of booleans": (lambda m, x, n: (m.table(x) * x.bool()[..., None]).sum(1), KEPT),
    "one minus": (lambda m, x, n: (m.table(x) * (1 - (x == 0).double())[..., None]).sum(1), KEPT),
    "compared masks": (
        lambda m, x, n: (m.table(x).masked_fill((mask(x) == 0)[..., None], 0) * (mask(x) > 0)[..., None]).sum(
            1
        ),
        KEPT,
    ),
    "a mask of several": (
        lambda m, x, n: (m.table(x) * (~(x == 0) & ((x < 9) | (x > 40)))[..., None]).sum(1),
        replace(KEPT, keep="Ne(x0, 0) & ((x0 > 40) | (x0 < 9))"),
    ),
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
    "sum over the root of the count": (
        lambda m, x, n: (m.table(x) * mask(x)[..., None]).sum(1) / mask(x).sum(1, keepdim=True).sqrt(),
        replace(KEPT, divisor="sqrt(count)"),
    ),
    "sum over the root of the count by a power": (
        lambda m, x, n: (
            (m.table(x) * mask(x)[..., None]).sum(1) / (mask(x).sum(1)[:, None].clamp(min=1) ** 0.5)
        ),
        replace(KEPT, divisor="sqrt(Max(1, count))"),
    ),
    "scaled rows": (
        lambda m, x, n: (m.table(x) * D**0.5 * mask(x)[..., None]).sum(1),
        replace(KEPT, divisor="1/2"),
    ),
    "rows over a number": (
        lambda m, x, n: (m.table(x) * mask(x)[..., None] / 7).sum(1),
        replace(KEPT, divisor="7"),
    ),
    "rows over a large number": (
        lambda m, x, n: (m.table(x) * mask(x)[..., None] / 1e20).sum(1),
        replace(KEPT, divisor="1.00000000000000e+20"),
    ),
    "mean of scaled rows": (
        lambda m, x, n: (m.table(x) * 0.3 * mask(x)[..., None]).sum(1) / mask(x).sum(1, keepdim=True),
        replace(KEPT, divisor="3.33333333333333*count"),
    ),
    "mean of one column, squeezed at last": (
        lambda m, x, n: (m.one(x) * mask(x)[..., None]).sum(1).squeeze(-1) / (mask(x).sum(1) + 1e-8),
        replace(KEPT, divisor="count + 1.0e-8", frozen_row=-1),
    ),
    "a count written in place": (
        lambda m, x, n: (m.table(x) * (x > 9)[..., None]).sum(1) / _written(x > 9).sum(1, keepdim=True),
        replace(KEPT, keep="x0 > 9"),
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
    "masked max by addition": (
        lambda m, x, n: (m.table(x) + (1 - mask(x)[..., None]) * -1e9).max(1)[0],
        replace(KEPT, pooling="max", empty="-1000000000.0"),
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


def joined(m, x, how=lambda e: e):
    """Two fields side by side: their ids are `x` and `x` backwards, their mask is of `x`."""
    return how(torch.cat([m.table(x), m.other(x.flip(1))], -1))


OTHER = Bag(1, (0, 1), "sum", keep="Ne(x1, 0)")
SEVERAL = {
    "fields side by side": (
        lambda m, x, n: (joined(m, x) * mask(x)[..., None]).sum(1),
        [KEPT, OTHER],
    ),
    "their mean": (
        lambda m, x, n: (joined(m, x) * mask(x)[..., None]).sum(1) / (mask(x).sum(1, keepdim=True) + 1e-8),
        [replace(bag, divisor="count + 1.0e-8") for bag in (KEPT, OTHER)],
    ),
    "their product with a mask": (
        lambda m, x, n: torch.bmm(mask(x).unsqueeze(1), joined(m, x)).squeeze(1),
        [KEPT, OTHER],
    ),
    "their maximum, columns first": (
        lambda m, x, n: (
            joined(m, x).masked_fill((x == 0)[..., None], float("-inf")).permute(0, 2, 1).max(2).values
        ),
        [replace(bag, pooling="max", empty="-inf") for bag in (KEPT, OTHER)],
    ),
    "one of them masked": (
        lambda m, x, n: torch.cat([m.table(x) * mask(x)[..., None], m.other(x.flip(1))], 2).mean(1),
        [replace(KEPT, divisor="L"), Bag(1, (0,), "sum", divisor="L")],
    ),
    "each in several lists": (
        lambda m, x, n: torch.cat([m.table(y := x[:, :6].reshape(-1, 2, 3)), m.other(y)], -1).sum(2),
        [Bag(0, (0,), "sum", frozen_row=0), Bag(1, (0,), "sum")],
    ),
    "added up": (
        lambda m, x, n: ((m.table(x) + m.again(x.flip(1))) * mask(x)[..., None]).sum(1),
        [KEPT, OTHER],
    ),
    "pooled twice": (
        lambda m, x, n: torch.cat([((e := m.table(x)) * mask(x)[..., None]).sum(1), e.max(1).values], 1),
        [KEPT, Bag(0, (0,), "max", frozen_row=0)],
    ),
    "pooled thrice, once by what another gives": (
        lambda m, x, n: (
            (s := ((e := m.table(x)) * mask(x)[..., None]).sum(1) / mask(x).sum(1, keepdim=True).clamp(min=1))
            + e.mean(1)
            + (e * (s.sum(1, keepdim=True) * m.scores)[..., None]).sum(1)
        ),
        [
            replace(KEPT, divisor="Max(1, count)"),
            Bag(0, (0,), "sum", divisor="L", frozen_row=0),
            Bag(0, (0, 1), "sum", weight="x1", frozen_row=0),
        ],
    ),
}


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_several_bags(name, dynamic):
    how, expected = SEVERAL[name]
    bags, refused = pooled(how, dynamic)
    assert sorted(map(read, bags), key=str) == sorted(map(read, expected), key=str), refused


def read(bag):
    """A bag without the numbers of its tensors."""
    return replace(bag, table=0, loads=(0,) * len(bag.loads))


class Half(nn.Module):
    """Tables of 16 bits, pooled in 32."""

    def __init__(self, how, dtype):
        super().__init__()
        self.table, self.how = nn.Embedding(50, D).to(dtype), how

    def forward(self, x):
        return self.how(self.table, x, (x != 0).float()[..., None])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "how",
    [
        lambda t, x, m: (t(x).float() * m).sum(1),
        lambda t, x, m: (t(x) * m).sum(1),
        lambda t, x, m: (t(x) * m.bool()).sum(1, dtype=torch.float32),
        lambda t, x, m: t(x).float().masked_fill(m == 0, -1e9).max(1).values,
    ],
    ids=["cast", "promoted", "cast by the sum", "max"],
)
def test_half_tables_are_pooled_in_float32(dtype, how):
    x = torch.randperm(49).reshape(7, 7) + 1  # each row is read once, so that its gradient is rounded once
    x[0, 0] = 0
    graph, _ = assert_rewritten_same(Half(how, dtype), (x,))
    (spec,) = [Lookup.parse(str(n.args[2])) for n in graph.nodes if "recompile" in str(n.target)]
    assert spec.bags[0].dtype == "float32" and spec.bags[0].keep == "Ne(x0, 0)"


REFUSED = {
    "the rows have one column": lambda m, x, n: (m.one(x).squeeze(-1) * m.scores).sum(1),
    "the looked-up rows are also used by": lambda m, x, n: (e := m.table(x)).sum(1) + e[:, 0],
    "the multiplier differs from column to column": lambda m, x, n: (
        m.table(x) * torch.arange(float(D)).double()
    ).sum(1),
    "the rows have several weights": lambda m, x, n: (
        m.table(x) * m.scores[:, None] * torch.exp(m.scores)[:, None]
    ).sum(1),
    "a maximum of sums is no sum of maxima": lambda m, x, n: (m.table(x) + m.again(x)).max(1).values,
    "the looked-up rows are also used by mul": lambda m, x, n: torch.cat(
        [(e := m.table(x)).sum(1), (e * m.scores[:, None] * n[:, None, None].exp()).sum(1)], 1
    ),
    "amax shares its gradient among equal values": lambda m, x, n: m.table(x).amax(1),
    "a maximum of rows that are multiplied": lambda m, x, n: (m.table(x) * mask(x)[..., None]).max(1)[0],
    "masked positions are filled with -1.0": lambda m, x, n: (
        m.table(x).masked_fill((x == 0)[..., None], -1.0).sum(1)
    ),
    "which the lookup reads, is written in place": lambda m, x, n: _written_source(m, x),
    "is written in place": lambda m, x, n: (m.table(x) * _written(x > 9)[..., None]).sum(1),
}


def _written_source(m, x):
    other = x.cumsum(1)
    kept = (other != 0)[..., None].double()
    other.detach().fill_(1)
    return (m.table(x) * kept).sum(1)


def _written(mask):
    """Numbers that are 1 and 0 where they are computed, and 3 where they are read."""
    numbers = mask.double()
    numbers.detach().fill_(3)
    return numbers


@pytest.mark.parametrize("why", REFUSED)
def test_refusals(why):
    bags, refused = pooled(REFUSED[why])
    assert all(bag.pooling == "none" for bag in bags)
    assert any(why in sentence for sentence in refused), refused
