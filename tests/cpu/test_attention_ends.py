"""The two contractions of an attention, in the orders of dims and the spellings that models of strangers have."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import recompile
from recompile.passes.rewrite_attention import RewriteAttention
from recompile.testing import assert_refuses, assert_rewritten_same
from tests.capturing import without_inductor

B, H, N, D = 3, 2, 7, 8


class Projected(nn.Module):
    """`function` of inputs that depend on parameters, so that gradients reach the inputs of attention."""

    def __init__(self, function, count: int) -> None:
        super().__init__()
        self.function, self.scales = function, nn.Parameter(torch.linspace(0.5, 1.5, count).double())

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*(x * scale for x, scale in zip(inputs, self.scales, strict=True)))


def attended(function, shapes, dynamic=None, marked=()):
    """The attentions in the rewritten graph, and the refusals; values and gradients are eager's."""
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
    return [node for node in graph.nodes if "recompile.attention" in str(node.target)], said


def ends(*given):
    """How many attentions there are, and the refusals."""
    found, said = attended(*given)
    return len(found), said


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


def soft(scores):
    return scores.softmax(-1)


Q, BATCH, HEADS = (N, D), (B, N, D), (B, H, N, D)
PAIRS = "each pair of a query and a key has features of its own"
ONCE = "the attention weights are the same for all samples, or heads: they are computed once"
LAYER = "the keys are the same for all samples: it is a layer, no attention"
CASES = {  # the model, the shapes of its inputs, and the refusal; None if it is rewritten
    "one sample, no heads: silu": (lambda q, k, v: F.silu(q @ k.T) @ v, [Q] * 3, None),
    "one sample, no heads: relu squared": (lambda q, k, v: F.relu(q.mm(k.t())) ** 2 / N @ v, [Q] * 3, None),
    "shared queries": (lambda q, k, v: soft(q @ k.mT) @ v, [Q, BATCH, BATCH], None),
    "shared values": (lambda q, k, v: soft(q @ k.mT) @ v, [HEADS, HEADS, Q], None),
    "shared values, heads inside": (
        lambda q, k, v: torch.einsum("bhnm,md->bnhd", soft(q @ k.mT), v), [HEADS, HEADS, Q], None,
    ),
    "samples only in the bias": (lambda q, k, v, b: soft(q @ k.mT + b) @ v, [Q, Q, Q, (B, N, N)], None),
    "samples only in the bias and the values": (
        lambda q, k, v, b: soft(q @ k.mT + b) @ v, [Q, Q, BATCH, (B, N, N)], None,
    ),
    "heads only in the bias": (
        lambda q, k, v, b: soft((q @ k.mT)[:, None] + b) @ v[:, None], [BATCH] * 3 + [(H, N, N)], None,
    ),
    "queries only in the bias": (
        lambda q, k, v, b: soft(q[:, None] @ k.mT + b) @ v, [(B, D), BATCH, BATCH, (N, N)], None,
    ),
    "queries only in their positions": (
        lambda q, k, v: soft(q[:, None] @ k.mT + later(k.shape[1])) @ v, [(B, D), BATCH, BATCH], None,
    ),
    "keys of two letters": (
        lambda q, k, v: torch.einsum("bnhm,bmhd->bnd", soft(torch.einsum("bnhd,bmhd->bnhm", q, k)), v),
        [(B, N, H, D)] * 3, "a reshape between the two products splits queries, keys or features",
    ),
    "pairs with features": (lambda q, k, v: soft((q[:, :, None] * k).sum(-1)) @ v, [BATCH, (B, N, N, D), BATCH], PAIRS),
    "positions only": (lambda q, k, v: soft(q @ k.mT) @ v, [Q, Q, BATCH], ONCE),
    "positions only, in heads": (
        lambda q, k, v: torch.einsum("hnm,bmd->bhnd", soft(q @ k.mT), v), [(H, N, D)] * 2 + [BATCH], ONCE,
    ),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", CASES)
def test_what_is_shared(name, dynamic):
    """Scores of each sample are never held; scores that all samples share are computed once, as in eager."""
    function, shapes, why = CASES[name]
    assert ends(function, shapes, dynamic) == ((1, []) if why is None else (0, [why]))


def weighted(p, v):
    return (p[..., None] * v).sum(-2)


ONE, TWO = [(B, D), BATCH], [Q] * 3
SPELLED = {
    "target, sum": (lambda q, k: weighted(soft((q[:, None] * k).sum(-1)), k), ONE),
    "target, expanded": (lambda q, k: weighted(soft((q[:, None].expand(-1, N, -1) * k).sum(-1)), k), ONE),
    "target, repeated": (lambda q, k: weighted(soft((q[:, None].repeat(1, N, 1) * k).sum(-1)), k), ONE),
    "target, einsum": (
        lambda q, k: torch.einsum("bn,bnd->bd", soft(torch.einsum("bd,bnd->bn", q, k)), k), ONE,
    ),
    "target, bmm": (lambda q, k: soft(k.bmm(q[..., None]).squeeze(2))[:, None].bmm(k).squeeze(1), ONE),
    "target, without samples": (lambda q, k: soft(k @ q) @ k, [(D,), Q]),
    "tensordot": (lambda q, k, v: torch.tensordot(soft(torch.tensordot(q, k, ([1], [1]))), v, 1), TWO),
    "inner": (lambda q, k, v: soft(torch.inner(q, k)) @ v, [BATCH, Q, Q]),
    "linear of computed weights": (lambda q, k, v: F.linear(soft(F.linear(q, k)), v.T), [BATCH, Q, Q]),
    "linear with a bias": (lambda q, k, v, b: soft(F.linear(q, k, b)) @ v, [BATCH, Q, Q, (N,)]),
    "addmm": (lambda q, k, v, b: soft(torch.addmm(b, q, k.T, beta=2, alpha=0.5)) @ v, [*TWO, (N, N)]),
    "addmm, a bias for a key": (lambda q, k, v, b: soft(torch.addmm(b, q, k.T)) @ v, [*TWO, (N,)]),
    "einsum without an arrow": (lambda q, k, v: torch.einsum("ij,jd", soft(q @ k.T), v), TWO),
    "einsum, ... of two ranks": (
        lambda q, k, v: torch.einsum("...nm,...md->...nd", soft(torch.einsum("...nd,...md->...nm", q, k)), v),
        [HEADS, (H, N, D), (H, N, D)],
    ),
    "einsum, transposed": (lambda q, k, v: torch.einsum("bnm,bmd->bdn", soft(q @ k.mT), v), [BATCH] * 3),
    "keys shared by heads": (
        lambda q, k, v: soft(q @ k[:, None].expand(-1, H, -1, -1).mT) @ v[:, None], [HEADS, BATCH, BATCH],
    ),
    "candidates": (
        lambda c, h: weighted(soft((c[:, :, None].expand(-1, -1, N, -1) * h[:, None]).sum(-1)), h[:, None]),
        [(B, 5, D), BATCH],
    ),
    "features repeated": (lambda q, k, v: soft(q @ k.expand(-1, -1, D).mT) @ v, [BATCH, (B, N, 1), BATCH]),
    "mean, silu": (lambda q, k, v: (F.silu(q @ k.mT)[..., None] * v[:, None]).mean(2, keepdim=True), [BATCH] * 3),
    "einsum of three, values": (
        lambda q, k, v, w: torch.einsum("...nm,...md,de->...ne", soft(q @ k.mT), v, w), [BATCH] * 3 + [(D, 5)],
    ),
    "einsum over heads too": (
        lambda q, k, v: soft(torch.einsum("bnhd,bmhd->bnm", q, k)) @ v, [(B, N, H, D)] * 2 + [BATCH],
    ),
    "baddbmm": (lambda q, k, v, x: torch.baddbmm(x, soft(q @ k.mT), v, beta=2, alpha=0.5), [BATCH] * 4),
    "linear with a bias at the end": (lambda q, k, v, x: F.linear(soft(q @ k.T), v.T, x), [*TWO, (D,)]),
    "heads of values": (
        lambda q, k, v: torch.einsum("bnm,bmhd->bnhd", F.silu(q @ k.mT) / N, v), [BATCH] * 2 + [(B, N, H, D)],
    ),
    "heads of values first": (
        lambda q, k, v: torch.einsum("bnm,bmhd->bhnd", F.silu(q @ k.mT) / N, v), [BATCH] * 2 + [(B, N, H, D)],
    ),
    "heads of values by matmul": (lambda q, k, v: soft(q @ k.mT)[:, None] @ v, [BATCH] * 2 + [HEADS]),
    "values and those of keys' positions": (
        lambda q, k, v, r: (lambda p: p @ v + p @ r)(soft(q @ k.mT)), [BATCH] * 3 + [Q],
    ),
    "two values, einsum": (
        lambda q, k, v, r: (lambda p: torch.einsum("bhnm,bmhd->bnhd", p, v) + torch.einsum("bhnm,mhd->bnhd", p, r))(
            soft(q @ k.mT)
        ),
        [HEADS, HEADS, (B, N, H, D), (N, H, D)],
    ),
    "a mask of a column and a row": (
        lambda q, k, v, m: soft((q @ k.mT).masked_fill(m.relu()[..., None].bmm(m.relu()[:, None]) == 0, -1e9)) @ v,
        [BATCH] * 3 + [(B, N)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("samples", "dynamic"), [(B, False), (1, False), (B, True)])
@pytest.mark.parametrize("name", SPELLED)
def test_every_spelling_of_a_product(name, samples, dynamic):
    function, shapes = SPELLED[name]
    shapes = [(samples, *shape[1:]) if shape[0] == B else shape for shape in shapes]
    assert ends(function, shapes, dynamic) == (1, [])


@pytest.mark.parametrize("sizes", SIZES)
def test_a_bilinear_score_in_one_einsum(sizes):
    """It is computed as torch does, from the left: its first product is no score, and said to be none."""

    def bilinear(q, w, k, v):
        return soft(torch.einsum("bnd,de,bme->bnm", q, w, k)) @ v

    shapes = [BATCH, (D, 5), (B, N, 5), BATCH]
    assert ends(bilinear, shapes, SIZES[sizes][0]) == (
        1,
        ["the scores are used as they are: it is a chain of products"],
    )


@pytest.mark.parametrize("sizes", ["static", "of samples", "of items"])
def test_a_score_that_is_a_mean(sizes):
    def mean(q, k, v):
        return soft((q[:, :, None] * k[:, None]).mean(-1)) @ v

    assert ends(mean, [BATCH] * 3, *SIZES[sizes]) == (1, [])


def later(n):
    return torch.ones(n, n, dtype=torch.float64).triu(1) * -1e9


SHARED = {  # the model, the shapes of its inputs, and which of q's dims are the queries
    "heads before": (lambda q, k, v: soft(q @ k[:, None].mT) @ v[:, None], [HEADS, BATCH, BATCH], N),
    "heads inside, causal": (
        lambda q, k, v: torch.einsum(
            "bhnm,bmd->bnhd", soft(torch.einsum("bnhd,bmd->bhnm", q, k) + later(q.shape[1])), v
        ),
        [(B, N, H, D), BATCH, BATCH], N,
    ),
    "heads inside the scores": (
        lambda q, k, v: torch.einsum("bnhm,bmd->bnhd", soft(torch.einsum("bnhd,bmd->bnhm", q, k)), v),
        [(B, N, H, D), BATCH, BATCH], N,
    ),
    "candidates": (lambda c, k: soft(c[:, :, None] @ k[:, None].mT) @ k[:, None], [(B, 5, D), BATCH], 5),
    "candidates, heads": (
        lambda c, k: soft(c[:, :, :, None] @ k[:, None].mT) @ k[:, None], [(B, 5, H, D), (B, H, N, D)], 5,
    ),
    "keys of the model": (lambda q, k, v: soft(q @ k.mT) @ v, [(9, N, D), Q, Q], N),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SHARED)
def test_the_longest_axis_of_the_scores_alone_is_that_of_the_queries(name, dynamic):
    """Not heads that share keys: what is compared by position stays so, and each key is read once for all rows."""
    function, shapes, rows = SHARED[name]
    one_length = dynamic and shapes[0][1] == N == shapes[1][1]
    (found,) = attended(function, shapes, None if one_length else dynamic, (0, 1) if one_length else ())[0]
    assert dynamic or found.args[0].meta["val"].shape[-2] == rows
    assert "causal" not in name or found.args[3] == []


HALVES = {  # the model, and whether its contractions are both of what the kernel takes
    "softmax": (lambda q, k, v: soft(q.float() @ k.float().mT / 3).to(v.dtype) @ v, True),
    "silu, keys transposed first": (lambda q, k, v: (F.silu(q.float() @ k.mT.float()) / N).to(v.dtype) @ v, True),
    "one side rounded before": (lambda q, k, v: soft((q.float() / 3) @ k.float().mT).to(v.dtype) @ v, False),
    "in double": (lambda q, k, v: soft(q.double() @ k.double().mT).to(v.dtype) @ v, False),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "dynamic"), [(torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("name", HALVES)
def test_scores_in_float32_of_tensors_in_half_precision(name, dtype, dynamic):
    """As the kernel computes them anyway; a cast of a rounded tensor is exact, of others it is not seen through."""
    function, fires = HALVES[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    qkv = [torch.randn(BATCH, dtype=dtype, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(function, backend="recompile", dynamic=dynamic, options={"strict": True})
    with without_inductor(), recompile.report.collect() as report:
        actual = compiled(*qkv)
        found = torch.autograd.grad(actual, qkv, torch.ones_like(actual))
    (graph,) = report.graphs
    said = [r.why for entry in graph.passes for rule in entry.rules for r in rule.refused]
    assert len(graph.regions) == fires and fires != any("the contractions are of" in why for why in said)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = function(*exact)
    torch.testing.assert_close(actual.double(), expected, rtol=2e-2, atol=2e-2)
    wanted = torch.autograd.grad(expected, exact, torch.ones_like(expected))
    torch.testing.assert_close([g.double() for g in found], list(wanted), rtol=2e-2, atol=2e-2)


def timed(q, k, times, v):
    return soft((q @ k.mT + (times @ q[..., None]).squeeze(-1)) / 3) @ v


FIVE = [BATCH] * 5
SUMS = {
    "of two": (lambda q, k, r, t, v: soft(q @ k.mT + r @ t.mT) @ v, FIVE),
    "of two, scaled": (lambda q, k, r, t, v: soft((q @ k.mT / 3 - (r @ t.mT) * 0.2) * 2) @ v, FIVE),
    "of two, silu": (lambda q, k, r, t, v: F.silu(q @ k.mT + r @ t.mT) @ v, FIVE),
    "of two widths": (
        lambda q, k, r, t, v: soft(q @ k.mT + r @ t.mT) @ v, [BATCH, BATCH, (B, N, 3), (B, N, 3), BATCH],
    ),
    "of three": (lambda q, k, r, t, v: soft(q @ k.mT + r @ t.mT - q @ t.mT) @ v, FIVE),
    "keys' positions": (lambda q, k, t, v: soft(q @ k.mT + q @ t.mT) @ v, [HEADS, HEADS, (H, N, D), HEADS]),
    "of one and its transpose": (lambda q, k, v: soft(q @ k.mT + k @ q.mT) @ v, [BATCH] * 3),
    "of a single query": (
        lambda q, k, r, t: weighted(soft((q[:, None] * k).sum(-1) + (r[:, None] * t).sum(-1)), k), [*ONE, *ONE],
    ),
    "with a product of positions": (lambda q, k, r, t, v: soft(q @ k.mT + r @ t.mT) @ v, [BATCH, BATCH, Q, Q, BATCH]),
    "with features of pairs": (
        lambda q, k, t, v: soft(q @ k.mT + torch.einsum("bnd,bnmd->bnm", q, t)) @ v,
        [BATCH, BATCH, (B, N, N, D), BATCH],
    ),
    "with features of pairs, heads": (
        lambda q, k, t, v: soft(q @ k.mT + torch.einsum("bhnd,nmd->bhnm", q, t)) @ v, [HEADS, HEADS, (N, N, D), HEADS],
    ),
    "with features of a sample's pairs, heads": (
        lambda q, k, t, v: soft(q @ k.mT + torch.einsum("bhnd,bnmd->bhnm", q, t)) @ v,
        [HEADS, HEADS, (B, N, N, D), HEADS],
    ),
    "with features of pairs, by matmul": (timed, [BATCH, BATCH, (B, N, N, D), BATCH]),
}  # fmt: skip


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", SUMS)
def test_sums_of_products(name, dynamic):
    """Two products of the same rows and keys are one of their features; else one of them is a bias."""
    assert ends(*SUMS[name], dynamic) == (1, [])


def read_twice(second):
    def model(q, k, r, t, v):
        weights = soft(q @ k.mT + r @ t.mT)
        return second(weights, v) + weights.sum()

    return model


REFUSED = {
    "a sum": read_twice(lambda p, v: p @ v),
    "a sum of values": read_twice(lambda p, v: p @ v + p @ v.relu()),
    "an addend": read_twice(lambda p, v: torch.baddbmm(v, p, v)),
    "a mean": read_twice(lambda p, v: (p[..., None] * v[:, None]).mean(2)),
    "heads": read_twice(lambda p, v: torch.einsum("bnm,bmhd->bnhd", p, v.unflatten(2, (2, -1))).flatten(2)),
    "an einsum of three": read_twice(lambda p, v: torch.einsum("bnm,bmd,de->bne", p, v, v[0].T @ v[0])),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_stays_as_it_was(name, dynamic):
    """Whatever was written plainer for the while."""
    torch._dynamo.reset()
    given = [torch.randn(BATCH, dtype=torch.float64) for _ in range(5)]
    _, record = assert_rewritten_same(Projected(REFUSED[name], 5), given, dynamic=dynamic)
    (entry,) = [each for each in record.passes if each.name == "rewrite-attention"]
    assert any("scores are also read by sum" in r.why for rule in entry.rules for r in rule.refused)
    assert entry.nodes_after == entry.nodes_before


class Gates(nn.Module):
    """Layers that multiply by parameters: a perceptron, a gated one, a cross layer, a mixture, an excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate = (nn.Parameter(torch.randn(D, 2 * D).double()) for _ in range(2))
        self.down, self.vector = (
            nn.Parameter(torch.randn(2 * D, D).double()),
            nn.Parameter(torch.randn(D, 1).double()),
        )
        self.register_buffer("fixed", torch.randn(D, D).double())

    def forward(self, x):
        x = F.silu(x @ self.up) @ self.down + F.silu(x @ self.fixed) @ self.fixed
        x = (F.silu(x @ self.up) * torch.sigmoid(x @ self.gate)) @ self.down
        column = x[..., None]
        crossed = column @ (column.mT @ self.vector) + column
        x = (self.fixed @ crossed)[..., 0]
        experts = torch.stack([x * k for k in range(2 * D)], 1)
        x = (torch.sigmoid(x @ self.gate)[..., None] * experts).sum(1)
        return x * torch.sigmoid(F.relu(x @ self.up) @ self.down)


def test_layers_are_no_attention():
    """Not even refused: there is nothing to say about them."""
    torch.manual_seed(0)
    _, record = assert_rewritten_same(Gates(), (torch.randn(N, D, dtype=torch.float64),))
    (rule,) = [r for e in record.passes for r in e.rules if r.name == "rewrite-attention"]
    assert rule.tried == 0


def test_a_softmax_gate_is_a_layer():
    class Mixture(Gates):
        def forward(self, x):
            experts = torch.stack([x * k for k in range(2 * D)], 1)
            return torch.einsum("be,bed->bd", soft(x @ self.gate), experts)

    assert_refuses(RewriteAttention, Mixture(), (torch.randn(N, D, dtype=torch.float64),), why=LAYER)
