"""What models do between two contractions: what becomes part of the kernel, and what is refused by which sentence."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.models.rankmixer import RankMixer
from recompile.passes.rewrite_attention import RewriteAttention
from recompile.report import collect
from recompile.testing import assert_refuses, assert_rewritten_same

B, N, D = 3, 5, 8
KEPT = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]).bool()[:, None]
EARLIER = torch.ones(N, N).tril().bool()
NONE = float("-inf")
HEADS = nn.Parameter(torch.tensor([[1.0, 0.5], [-0.3, 2.0]], dtype=torch.float64))


class Model(nn.Module):
    """`weights(q k^T) v`; q and k are whole numbers, so that scores stand at kinks and tie."""

    def __init__(self, weights, whole=False):
        super().__init__()
        torch.manual_seed(0)
        self.weights = weights
        made = [torch.randn(B, N, D, dtype=torch.float64) for _ in range(3)]
        if whole:
            made = [torch.randint(-2, 3, x.shape).double() for x in made]
        self.q, self.k, self.v = map(nn.Parameter, made)

    def forward(self):
        return self.weights(self.q @ self.k.mT) @ self.v


def masked(after):
    return lambda s: after(s.masked_fill(~KEPT, NONE).softmax(-1))


def with_mask(mask):
    return lambda s: torch.where(mask(s), s, -1e9).softmax(-1)


ACTIVATIONS = {
    "relu": F.relu,
    "leaky_relu": F.leaky_relu,
    "gelu": F.gelu,
    "gelu by tanh": lambda s: F.gelu(s, approximate="tanh"),
    "elu": lambda s: F.elu(s, 0.5),
    "celu": lambda s: F.celu(s, 0.5),
    "selu": F.selu,
    "softplus": F.softplus,
    "softplus with numbers": lambda s: F.softplus(s, 2.0, 1.0),
    "logsigmoid": F.logsigmoid,
    "hardtanh": lambda s: F.hardtanh(s, -2.0, 3.0),
    "relu6": F.relu6,
    "hardsigmoid": F.hardsigmoid,
    "hardswish": F.hardswish,
    "mish": F.mish,
    "erf": torch.erf,
    "maximum": lambda s: torch.maximum(s, 2 - s),
    "minimum": lambda s: torch.minimum(s, s.new_zeros(())),
    "max": lambda s: torch.max(s, s * s),
}


@pytest.mark.parametrize("whole", [False, True], ids=["anywhere", "at kinks"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name, whole):
    assert rewritten(Model(ACTIVATIONS[name], whole)) == 1


def rewritten(model) -> int:
    torch._dynamo.reset()
    graph, _ = assert_rewritten_same(model, ())
    return sum("recompile.attention" in str(node.target) for node in graph.nodes)


def divided(weights, by):
    return weights / by(weights.sum(-1, keepdim=True))


REWRITTEN = {
    # Softmaxes by their logarithm.
    "exp of less logsumexp": lambda s: (s - s.logsumexp(-1, keepdim=True)).exp(),
    "unsqueezed": lambda s: (s - s.logsumexp(-1).unsqueeze(-1).expand_as(s)).exp(),
    "masked": lambda s: (lambda m: (m - m.logsumexp(-1, True)).exp())(s.masked_fill(~KEPT, NONE)),
    "exp of log_softmax": lambda s: s.log_softmax(-1).exp(),
    "masked by a logarithm": lambda s: (s + KEPT.double().log()).softmax(-1),
    # Divided by their sum, without a softmax.
    "normalized sigmoid": lambda s: divided(s.sigmoid(), lambda total: total + 1e-6),
    "normalized relu, clamped": lambda s: divided(s.relu(), lambda total: total.clamp(min=1e-6)),
    "normalized, no small number": lambda s: divided(s.sigmoid(), lambda total: total),
    "normalized after masks": lambda s: divided(s.sigmoid() * KEPT, lambda total: total + 1e-6),
    "a softmax off by one": lambda s: divided(s.exp(), lambda total: 1 + total),
    "a masked softmax divided again": lambda s: divided(s.softmax(-1) * KEPT, lambda total: total + 1e-9),
    "unsqueezed sums": lambda s: s.sigmoid() / (s.sigmoid().sum(-1) + 1.0).unsqueeze(-1),
    # Rows without keys.
    "nan_to_num": masked(lambda p: p.nan_to_num()),
    "nan_to_num(0.0), scaled": masked(lambda p: (2 * p).nan_to_num(0.0)),
    "where isnan": masked(lambda p: torch.where(p.isnan(), 0.0, p)),
    "where isnan, zeros_like": masked(lambda p: torch.where(torch.isnan(p), torch.zeros_like(p), p)),
    "masked_fill isnan": masked(lambda p: p.masked_fill(p.isnan(), 0.0)),
    "not itself": masked(lambda p: torch.where(p != p, 0.0, p)),
    "masked again": masked(lambda p: p.masked_fill(~KEPT, 0.0)),
    "multiplied by the mask: NaN": masked(lambda p: p * KEPT),
    "two masks again": lambda s: (
        s.masked_fill(~KEPT | ~EARLIER, NONE).softmax(-1).masked_fill(~KEPT, 0.0).masked_fill(~EARLIER, 0.0)
    ),
    "masked later by others, finite": lambda s: s.masked_fill(~KEPT, -1e9).softmax(-1).tril(),
    # Constants of the scores' shape.
    "ones_like of a sample": with_mask(lambda s: torch.ones_like(s[0]).tril().bool()),
    "ones_like of a view": with_mask(lambda s: torch.ones_like(s.mT[:, :1].detach()).bool()),
    "ones_like": with_mask(lambda s: torch.ones_like(s, dtype=torch.bool).tril()),
    "new_ones": with_mask(lambda s: s.new_ones(N, N).tril() > 0),
    "zeros_like": lambda s: (s + torch.zeros_like(s[0]).masked_fill(~KEPT, NONE)).softmax(-1),
    "full_like": lambda s: torch.where(KEPT, s, torch.full_like(s[:, :1], -1e9)).softmax(-1),
    "new_full": lambda s: (s + s.new_full((N, N), -1e9).triu(1)).softmax(-1),
}


@pytest.mark.parametrize("name", REWRITTEN)
def test_equal_to_eager(name):
    assert rewritten(Model(REWRITTEN[name])) == 1


def later(total, v_width=N, out="bie"):
    """The weights' product divided by their sums, which are as many as there are values and features."""

    def model(q, k, v):
        w = (q @ k.mT).sigmoid()
        return torch.einsum(f"bij,bje->{out}", w, v[..., :v_width]) / total(w)

    return model


LATER = {
    "by each row's": (1, later(lambda w: w.sum(-1, keepdim=True) + 1e-6)),
    "by each row's, unsqueezed": (1, later(lambda w: w.sum(-1)[..., None].clamp(min=1.0))),
    "by each row's, features first": (1, later(lambda w: w.sum(-1).unsqueeze(1), out="bei")),
    "by each key's": (0, later(lambda w: w.sum(-2)[..., None] + 1.0)),
    "by each feature's": (0, later(lambda w: w.sum(-1)[:, None] + 1.0)),
    "by each feature's, rows last": (0, later(lambda w: w.sum(-1, keepdim=True), out="bei")),
    "a softmax by each key's": (
        0,
        lambda q, k, v: (lambda e: e @ v / e.sum(-2)[..., None])((q @ k.mT).exp()),
    ),
}


class Whole(Model):
    """`weights` makes the output."""

    def forward(self):
        return self.weights(self.q, self.k, self.v)


@pytest.mark.parametrize("name", LATER)
def test_divided_later(name):
    expected, model = LATER[name]
    assert rewritten(Whole(model)) == expected


def over_heads(mixed):
    """`mixed` on `[B, 2, N, N]` scores."""

    def weights(q, k, v):
        q, k, v = (x.view(B, N, 2, D // 2).transpose(1, 2) for x in (q, k, v))
        return mixed(q @ k.mT).softmax(-1) @ v

    return weights


def of(weights):
    return lambda q, k, v: weights(q @ k.mT) @ v


BETWEEN = "{} between the scores and the values is not supported"
REFUSED = {
    "heads mixed by a layer": (
        over_heads(lambda s: F.linear(s.movedim(1, -1), HEADS).movedim(-1, 1)),
        BETWEEN.format("linear"),
    ),
    "heads mixed by a convolution": (
        over_heads(lambda s: F.conv2d(s, HEADS[:, :, None, None])),
        BETWEEN.format("conv2d"),
    ),
    "a sink": (
        of(lambda s: torch.cat([s, s.new_zeros(B, N, 1)], -1).softmax(-1)[..., :-1]),
        BETWEEN.format("cat"),
    ),
    "some keys": (lambda q, k, v: (q @ k.mT)[..., 1:].softmax(-1) @ v[:, 1:], BETWEEN.format("slice")),
    "one query": (lambda q, k, v: (q @ k.mT)[:, -1].softmax(-1)[:, None] @ v, BETWEEN.format("select")),
    "the greatest": (
        of(lambda s: s.masked_fill(s < s.topk(2, -1)[0][..., -1:], NONE).softmax(-1)),
        BETWEEN.format("topk"),
    ),
    "sorted": (of(lambda s: s.sort(-1).values.softmax(-1)), BETWEEN.format("sort")),
    "normalized": (of(lambda s: F.layer_norm(s, (N,)).softmax(-1)), BETWEEN.format("layer_norm")),
    "the least": (of(lambda s: (s - s.min(-1, True).values).softmax(-1)), BETWEEN.format("min")),
    "sine": (of(torch.sin), BETWEEN.format("sin")),
    "log_softmax": (of(lambda s: s.log_softmax(-1)), BETWEEN.format("logsumexp")),
    "logsumexp without gradient": (
        of(lambda s: (s - s.logsumexp(-1, True).detach()).exp()),
        BETWEEN.format("detach"),
    ),
    "NaN is 1": (of(masked(lambda p: p.nan_to_num(1.0))), BETWEEN.format("nan_to_num")),
    "NaN of the scores": (of(lambda s: s.nan_to_num().softmax(-1)), BETWEEN.format("nan_to_num")),
    "times not NaN": (of(masked(lambda p: p * ~p.isnan())), BETWEEN.format("isnan")),
    "divided by the sums of others": (
        of(lambda s: s.sigmoid() / (s.sigmoid().sum(-2, keepdim=True) + 1.0)),
        BETWEEN.format("sum"),
    ),
    "divided by a row, not a column": (
        of(lambda s: s.sigmoid() / (s.sigmoid().sum(-1) + 1.0)[:, None]),
        BETWEEN.format("sum"),
    ),
    "less the maximum, and off by one": (
        of(lambda s: divided((s - s.amax(-1, True)).exp(), lambda total: 1 + total)),
        "the weights' sum is changed before it divides, and the row's maximum tells by how much",
    ),
    "masked later by others": (
        of(masked(lambda p: p.tril())),
        "pairs are masked after the softmax that are not masked before it",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name):
    model, why = REFUSED[name]
    inputs = [torch.randn(B, N, D, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert_refuses(RewriteAttention, model, inputs, why=why)


class Mlp(nn.Module):
    """Two layers, with a sort of attention's own operators between: no attention."""

    def __init__(self, between) -> None:
        super().__init__()
        self.between = between
        self.first, self.second = (nn.Parameter(torch.randn(D, D)) for _ in range(2))

    def forward(self, x):
        return self.between(x @ self.first) @ self.second


@pytest.mark.parametrize(
    "between",
    [F.hardswish, torch.sin, lambda h: F.layer_norm(h, (D,)), lambda h: torch.cat([h[:, 1:], h[:, :1]], 1)],
)
def test_two_layers_are_not_tried(between):
    assert layers(Mlp(between), torch.randn(B, N, D)) == []


def test_a_layer_for_each_token_is_said_to_be_one():
    mixer = RankMixer([100] * 4, 4, 8, tokens=4, hidden=8)
    refused = layers(mixer, torch.randn(B, 4), torch.randint(0, 100, (B, 4)))
    assert set(refused) == {"the keys are the same for all samples: it is a layer, no attention"}


def layers(model, *inputs) -> list[str]:
    torch._dynamo.reset()
    graph, record = assert_rewritten_same(model, inputs)
    assert not any("recompile.attention" in str(node.target) for node in graph.nodes)
    rules = [rule for entry in record.passes for rule in entry.rules if rule.name == "rewrite-attention"]
    return [refusal.why for rule in rules for refusal in rule.refused]


COMPILED = (
    "gelu",
    "mish",
    "hardswish",
    "softplus",
    "normalized sigmoid",
    "nan_to_num",
    "masked again",
    "a softmax off by one",
)


def test_the_generated_kernels():
    """In float32 against eager in float64; all in one program, each with scores of its own."""

    def model(q, k, v):
        weights = [(ACTIVATIONS | REWRITTEN)[name] for name in COMPILED]
        return [each((q + n) @ k.mT * 0.3) @ v for n, each in enumerate(weights)]

    torch._dynamo.reset()
    compiled = torch.compile(model, backend="recompile", options={"strict": True})
    inputs = [torch.randn(B, N, D, requires_grad=True) for _ in range(3)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    with collect() as report:
        compiled(*inputs)
    assert len(report.graphs[0].regions) == len(COMPILED)
    for k, name in enumerate(COMPILED):
        found, wanted, seed = compiled(*inputs)[k], model(*doubles)[k], torch.randn(B, N, D)
        of_found = torch.autograd.grad(found, inputs, seed)
        of_wanted = torch.autograd.grad(wanted, doubles, seed.double())
        for a, b in zip((found, *of_found), (wanted, *of_wanted), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
