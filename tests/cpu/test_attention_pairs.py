"""What is another for each pair of a query and a key: computed in the kernel, whatever the spelling, and never held."""

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

from recompile.lowering.attention import Attention
from recompile.report import collect
from recompile.testing import assert_rewritten_same
from tests.cpu.test_attention import attentions, score_sized

B, H, N, D, T = 2, 2, 7, 8, 33
STAMPS = torch.tensor([[-1, 0, 9, 64, 65, 1000, 4096], [3, 3, 63, 164, 414, 1150, 2500]])
KEPT = torch.tensor([[1, 1, 1, 0, 1, 0, 0], [1, 0, 1, 1, 1, 1, 1]])
LENGTHS, TARGETS = torch.tensor([N, 5]), torch.tensor([2, 1])


class Model(nn.Module):
    """`function(q, k, v, *parameters, *inputs)` of rows that are an input: so their number may be dynamic."""

    def __init__(self, function, *shapes):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        made = [torch.randn(s, dtype=torch.float64) for s in (*[(D, D)] * 3, *shapes)]
        self.parts = nn.ParameterList(map(nn.Parameter, made))

    def forward(self, x, *inputs):
        q, k, v, *rest = self.parts
        return self.function(x @ q, x @ k, x @ v, *rest, *inputs)


def assert_computed(model, *inputs, dynamic=False) -> Attention:
    """It fires once, and nothing has a dim for queries and one for keys; values and gradients are eager's."""
    torch._dynamo.reset()
    x = torch.randn(B, N, D, dtype=torch.float64)
    graph, _ = assert_rewritten_same(model, (x, *inputs), dynamic=dynamic)
    (node,) = attentions(graph)
    spec = Attention.parse(node.args[4])
    assert dynamic or score_sized(graph) == []
    assert [name for name, load in loads(node, spec) if 1 not in load.meta["val"].shape[-2:]] == []
    return spec


def loads(node: fx.Node, spec: Attention) -> list[tuple[str, fx.Node]]:
    return [pair for pair in zip(spec.extras, node.args[3], strict=True) if pair[0][0] != "T"]


def apart(stamps):
    return stamps[:, :, None] - stamps[:, None]


def hstu(q, k, v, table, stamps):
    """As published: buckets by a logarithm, detached, looked up in one line."""
    B, N = stamps.shape
    ext = torch.cat([stamps, stamps[:, N - 1 : N]], dim=1)
    seconds = torch.abs(ext[:, 1:].unsqueeze(2) - ext[:, :-1].unsqueeze(1)).clamp(min=1)
    bucket = torch.clamp((torch.log(seconds) / 0.301).long(), min=0, max=T - 1).detach()
    bias = torch.index_select(table, dim=0, index=bucket.view(-1)).view(B, N, N)
    return F.silu(q @ k.mT + bias) / N @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_hstu_as_published(dynamic):
    spec = assert_computed(Model(hstu, (T,)), STAMPS, dynamic=dynamic)
    assert "T2(Min(32, Max(0, trunc(div(log(Max(1, Abs(n0 - n1))), 0.301)))))" in spec.score


def looked_up(index):
    return lambda q, k, v, table, stamps: F.silu(q @ k.mT + table[index(stamps)]) @ v


def in_heads(bias):
    def model(q, k, v, table, *inputs):
        q, k, v = (x.view(*x.shape[:2], H, D // H).transpose(1, 2) for x in (q, k, v))
        return (q @ k.mT + bias(table, q.shape[2], *inputs)).softmax(-1) @ v

    return model


def places(n):
    i = torch.arange(n)
    return (i[:, None] - i).abs()


def grid(indexing):
    def index(stamps):
        i, j = torch.meshgrid(*[torch.arange(stamps.shape[1])] * 2, indexing=indexing)
        return (2 * i - j).clamp(min=0)

    return index


def buckets(right, cast=lambda apart: apart.abs().float(), edges=(1.0, 62.0, 100.0, 4000.0)):
    return lambda s: torch.bucketize(cast(apart(s)), torch.tensor(edges), right=right)


INDICES = {
    "floor": lambda s: torch.floor(apart(s).abs() / 200).long(),
    "ceil": lambda s: torch.ceil(apart(s).abs() / 200).long(),
    "round to even": lambda s: torch.round(apart(s).abs() / 200).long(),
    "trunc": lambda s: torch.trunc(apart(s) / 200).long(),
    "remainder": lambda s: apart(s) % 24,
    "floor_divide": lambda s: apart(s).floor_divide(300).clamp(min=0),
    "divided toward 0": lambda s: torch.div(apart(s), 300, rounding_mode="trunc"),
    "log2": lambda s: torch.log2(apart(s).abs().clamp(min=1).float()).long(),
    "log10": lambda s: (torch.log10(apart(s).abs().clamp(min=1)) * 4).long(),
    "bucketize": buckets(right=False),
    "bucketize, right": buckets(right=True),
    "bucketize integers": buckets(False, lambda apart: apart, (1, 62, 100, 4000)),
    "bucketize, edges of a tensor": lambda s: torch.bucketize(
        apart(s).abs().float(), torch.tensor([1.0, 61.0, 38.0]).cumsum(0)
    ),
    "searchsorted": lambda s: torch.searchsorted(
        torch.tensor([1.0, 61.0, 38.0]).cumsum(0), apart(s).abs().float(), side="right"
    ),
    "bucketize NaN": buckets(False, lambda apart: apart.log()),
    "meshgrid": grid("ij"),
    "meshgrid, xy": grid("xy"),
    "NumPy's names": lambda s: torch.clip(torch.subtract(torch.absolute(apart(s)), 3), 0, 30),
}


@pytest.mark.parametrize("name", INDICES)
def test_indices(name):
    assert_computed(Model(looked_up(INDICES[name]), (T,)), STAMPS)


def repeated(w, n):
    """HSTU's, as published: element [0, i, j] is w[j - i + n - 1]."""
    t = F.pad(w[: 2 * n - 1], [0, n]).repeat(n)
    r = (2 * n - 1) // 2
    return t[..., :-n].reshape(1, n, 3 * n - 2)[:, :, r:-r]


def repeated_in_heads(w, n):
    rows = F.pad(w, [0, n], value=7.0).repeat(1, n)[:, :-n]
    return rows.view(-1, n, 3 * n - 2)[..., n - 1 : 2 * n - 1]


MOVED = {
    "pad and repeat": ((2 * N - 1,), repeated),
    "pad and repeat, heads": ((H, 2 * N - 1), repeated_in_heads),
    "of a longer table": ((40,), lambda w, n: repeated(w[3:], n)),
    "windows": ((2 * N - 1,), lambda w, n: w.unfold(0, n, 1).flip(0)),
    "windows, heads last": ((2 * N - 1, H), lambda w, n: w.unfold(0, n, 1).permute(1, 2, 0).flip(-1)),
}


@pytest.mark.parametrize("name", MOVED)
def test_a_table_that_is_moved(name):
    """Read where its elements come from, not laid out for all pairs: its gradients are added up in the kernel."""
    shape, bias = MOVED[name]
    assert assert_computed(Model(in_heads(bias), shape)).extras == ("T0",)


STAYS = {
    "a padding is read": ((2 * N - 1,), lambda w, n: F.pad(w[1:], [1, n]).repeat(n)[:-n].view(n, -1)[:, n - 1 : 1 - n]),
    "a matrix": ((N * N,), lambda w, n: w.view(n, n)),
    "halves": ((2 * N,), lambda w, n: w.roll(1).unfold(0, n, 1)[:n]),
}  # fmt: skip


@pytest.mark.parametrize("name", STAYS)
def test_a_table_of_which_another_moves_is_loaded(name):
    shape, bias = STAYS[name]
    x = torch.randn(B, N, D, dtype=torch.float64)
    torch._dynamo.reset()
    graph, _ = assert_rewritten_same(Model(in_heads(bias), shape), (x,))
    (node,) = attentions(graph)
    assert Attention.parse(node.args[4]).extras == ("x0",)


TABLES = {
    "columns": ((H, T), in_heads(lambda table, n: table[:, places(n)])),
    "columns, one line": ((H, T), in_heads(lambda table, n: table.index_select(1, places(n).view(-1)).view(H, n, n))),
    "padding": ((T, H), in_heads(lambda table, n: F.embedding(places(n), table, padding_idx=0).permute(2, 0, 1))),
    "padding, no heads": ((T, 1), in_heads(lambda table, n: F.embedding(places(n), table, padding_idx=2)[..., 0])),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables(name):
    """The row of a padding takes no gradient."""
    shape, model = TABLES[name]
    assert assert_computed(Model(model, shape)).extras == ("T0",)


def under_softmax(masked):
    return lambda q, k, v, kept: masked(q @ k.mT, kept > 0).softmax(-1) @ v


def triangle(s):
    return s.new_ones(s.shape[1:]).tril()


def written(mask):
    mask[:, :, :2] = 0
    return mask


EITHER = (
    "(n0 > 0) & (n1 > 0)",
    lambda s, kept: s + (1.0 - kept.float()[:, None] * kept.float()[:, :, None]) * -1e9,
)
MASKS = {  # what is kept, and how it is written
    "a number that is a tensor": (
        "n0 > 0",
        lambda s, kept: torch.where(kept[:, None], s, torch.tensor(-1e9)),
    ),
    "the least float": (
        "n0 > 0",
        lambda s, kept: s + (1 - kept.float()[:, None]) * torch.finfo(torch.float32).min,
    ),
    "1 - integers": ("n0 > 0", lambda s, kept: s + (1 - kept.int()[:, None]) * -1e9),
    "both of two": EITHER,
    "a triangle times truths": (
        "(n0 > 0) & (-i + j <= 0)",
        lambda s, kept: s + (1 - triangle(s) * kept[:, None]) * -1e9,
    ),
    "not both": (
        "(n0 <= 0) & (-i + j <= 0)",
        lambda s, kept: s - (1 - triangle(s) * (1 - kept.long()[:, None])) * 1e9,
    ),
    "in steps": (
        "((j >= 0) & (j < 2)) | ((n0 > 0) & (-i + j <= 0))",
        lambda s, kept: (
            s + written(s.new_zeros(s.shape).masked_fill_(triangle(s) * kept[:, None] == 0, -1e9))
        ),
    ),
    "below a half": ("n0 > 0", lambda s, kept: s.masked_fill(kept.double()[:, None] < 0.5, -1e9)),
    "either": (
        "((n0 <= 0) & (-i + j <= 0)) | ((n0 > 0) & (-i + j > 0))",
        lambda s, kept: s.masked_fill(~(kept[:, None] ^ (triangle(s) > 0)), -1e9),
    ),
}


SIDE_BY_SIDE = {
    "repeated": lambda kept: kept[:, ::2].repeat_interleave(2, 1)[:, :-1],
    "expanded": lambda kept: kept[:, :3].unsqueeze(-1).expand(-1, -1, 2).reshape(B, -1),
}


@pytest.mark.parametrize("name", SIDE_BY_SIDE)
def test_a_mask_of_items_repeated_over_their_codes(name):
    def model(q, k, v, kept):
        codes = SIDE_BY_SIDE[name](kept)
        n = codes.shape[1]
        return (q @ k[:, :n].mT).masked_fill(codes[:, None] == 0, -1e9).softmax(-1) @ v[:, :n]

    assert "n0" in assert_computed(Model(model), KEPT).keep


@pytest.mark.parametrize("name", MASKS)
def test_what_is_a_mask(name):
    keep, model = MASKS[name]
    assert assert_computed(Model(under_softmax(model)), KEPT).keep == keep


class Held(nn.Module):
    """A mask that the model holds, learned or not: `function(q k^T, mask) v`."""

    def __init__(self, function, learned=False):
        super().__init__()
        self.function = function
        mask = torch.ones(N, N).tril().double()
        self.register_parameter("mask", nn.Parameter(mask)) if learned else self.register_buffer("mask", mask)

    def forward(self, x):
        return self.function(x @ x.mT, self.mask) @ x


HELD = {
    "a factor": ("Ne(x0, 0)", lambda s, mask: F.silu(s) / N * mask),
    "a truth": ("x0 > 0", lambda s, mask: F.silu(s) * (mask > 0).double()),
    "a term": ("10000*x0 - 10000 > -1000.0", lambda s, mask: (s - (1 - mask) * 1e4).softmax(-1)),
    "a term, costly": ("true", lambda s, mask: (s + mask.log()).softmax(-1)),
    "a factor after": ("true", lambda s, mask: s.softmax(-1) * mask),
}


def held(function, learned):
    torch._dynamo.reset()
    x = torch.randn(B, N, D, dtype=torch.float64, requires_grad=True)
    graph, _ = assert_rewritten_same(Held(function, learned), (x,))
    (node,) = attentions(graph)
    return Attention.parse(node.args[4]).keep


@pytest.mark.parametrize("name", HELD)
def test_a_mask_that_is_held(name):
    """Kernels look at its values."""
    keep, function = HELD[name]
    assert held(function, learned=False) == keep


@pytest.mark.parametrize("name", ["a factor", "a term"])
def test_what_learns_from_all_pairs_is_no_mask(name):
    assert held(HELD[name][1], learned=True) == "true"


def test_what_is_computed_of_what_learns_is_no_mask():
    """In a spelling that another pass rewrites, and read by others: so it is loaded."""

    class Scaled(Held):
        def forward(self, x):
            scaled = torch.multiply(self.mask, 0.5)
            return (F.silu(x @ x.mT) * scaled) @ x, scaled

    torch._dynamo.reset()
    graph, _ = assert_rewritten_same(Scaled(None, learned=True), (torch.randn(B, N, D, dtype=torch.float64),))
    (node,) = attentions(graph)
    assert Attention.parse(node.args[4]).keep == "true"


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_a_triangle_of_the_least_number(dynamic):
    """As Hugging Face's decoders make their causal mask; of float64 it is less than any float32."""

    def model(q, k, v):
        n, least = q.shape[1], torch.finfo(q.dtype).min
        return ((q @ k.mT) + torch.triu(torch.full((n, n), least, dtype=q.dtype), 1)).softmax(-1) @ v

    assert_computed(Model(model), dynamic=dynamic)


def valid(targets=False, causal=True, context=0, window=0, full=0):
    """HSTU's mask of targets that see themselves only, a context that sees all, and a window."""

    def model(q, k, v, lengths, num_targets):
        n = q.shape[1]
        ids, most = torch.arange(n).view(1, n), lengths.view(-1, 1, 1)
        if context:
            ids, most = torch.clamp(ids - context + 1, min=0), most - context + 1
        if targets:
            most = most - num_targets.view(-1, 1, 1)
            ids = torch.clamp(ids, max=most)
        row, column = ids.view(-1, n, 1).expand(-1, n, n), ids.view(-1, 1, n).expand(-1, n, n)
        distance = row - column
        mask = torch.eye(n, dtype=torch.bool).view(1, n, n)
        distance = distance if causal else torch.where(distance > 0, distance, -distance)
        mask = torch.logical_or(mask, distance > 0)
        if window:
            mask = mask & ((distance <= window) | (row >= most - full))
        if context:
            mask = torch.logical_or(mask, torch.logical_and(row == 0, column < most))
        return F.silu(q @ k.mT) / n * mask @ v

    return model


VALID = {
    "causal": ({}, "Eq(i, j) | (i - j > 0)"),
    "targets": ({"targets": True}, "Eq(i, j) | (-n0 + n1 > 0)"),
    "both ways": ({"targets": True, "causal": False}, ""),
    "a context": (
        {"context": 2},
        "Eq(i, j) | ((i - 1 > 0) & (i - 1 > j - 1)) | (Eq(Max(0, i - 1), 0) & (Max(0, j - 1) < n0))",
    ),
    "all": ({"targets": True, "context": 2, "window": 3, "full": 2}, ""),
}


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", VALID)
def test_hstu_s_masks(name, dynamic):
    how, keep = VALID[name]
    spec = assert_computed(Model(valid(**how)), LENGTHS, TARGETS, dynamic=dynamic)
    assert spec.keep == keep or (not keep and spec.keep != "true")


COMPILED = ("round to even", "trunc", "log2", "log10", "bucketize, edges of a tensor", "remainder")


def test_the_generated_kernels():
    """In float32, where powers are borders of buckets; all in one program, each with scores of its own."""

    def function(q, k, v, table, stamps):
        models = [looked_up(lambda s, name=name: INDICES[name](s).clamp(-T, T - 1)) for name in COMPILED]
        return [model(q + n, k, v, table, stamps) for n, model in enumerate(models)]

    torch._dynamo.reset()
    model = Model(function, (T,)).float()
    x = torch.randn(B, 70, D)
    stamps = torch.cat([torch.tensor([[0, 1, 2, 4, 8, 10, 100, 1000, 10**4, 2**20, 2**20 - 1, 300, 500, 700, 900]] * B),
                        torch.randint(0, 10**4, (B, 55))], 1)  # fmt: skip
    compiled = torch.compile(model, backend="recompile", options={"strict": True})
    parts = [*model.parameters()]
    with collect() as report:
        compiled(x, stamps)
    assert len(report.graphs[0].regions) == len(COMPILED)
    for k, name in enumerate(COMPILED):
        found, wanted = compiled(x, stamps)[k], model(x, stamps)[k]
        grad, say = torch.randn_like(wanted), lambda m, n=name: f"{n}: {m}"
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-3, msg=say)
        torch.testing.assert_close(
            torch.autograd.grad(found, parts, grad),
            torch.autograd.grad(wanted, parts, grad),
            rtol=1e-3,
            atol=1e-2,
            msg=say,
        )
