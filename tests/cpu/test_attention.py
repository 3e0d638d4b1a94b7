"""What is recognized as attention, and what is not. Kernels are tested in test_attention_kernel.py."""

import math
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import recompile
from recompile.lowering.attention import Attention
from recompile.passes.library_attention import by_library
from recompile.passes.rewrite_attention import RewriteAttention
from recompile.rewrite.schema import op_name
from recompile.testing import assert_refuses, assert_rewrites, assert_rewritten_same
from tests.capturing import without_inductor
from tests.spellings import QKV, SPELLINGS, Spelling

B, H, N, D = QKV[0]
VIEWS = ("reshape", "view", "permute", "unsqueeze", "expand", "slice", "select")


def attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if "recompile.attention" in str(node.target)]


def score_sized(graph: fx.Graph) -> list[str]:
    """What is computed for all pairs of a query and a key: N is no other size of the spellings'."""
    graph.eliminate_dead_code()
    called = [
        n for n in graph.nodes if n.op == "call_function" and isinstance(n.meta.get("val"), torch.Tensor)
    ]
    own = [n for n in called if not n.name.startswith(VIEWS)]
    return [n.name for n in own if [int(size) for size in n.meta["val"].shape].count(N) > 1]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda s: s.name)
def test_every_spelling_is_rewritten_and_equals_eager(spelling: Spelling, dynamic: bool):
    """Values and gradients, in float64; nothing of the size of the scores is left."""
    model, others = spelling.module()
    graph, record = assert_rewritten_same(model, others, dynamic=dynamic)
    assert len(attentions(graph)) == spelling.fires, record
    if spelling.fires and not dynamic:
        assert score_sized(graph) == []


def softmax_attention(q, k, v):
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


def inputs():
    torch.manual_seed(0)
    return tuple(torch.randn(shape) for shape in QKV)


def test_the_graph_afterwards():
    graph = assert_rewrites(RewriteAttention, softmax_attention, inputs()).graph
    (node,) = attentions(graph)
    assert node.args[4].startswith("Attention(score='0.353553390593274*s', softmax=True)")
    assert [n.name for n in graph.nodes if n.op == "call_function"] == ["attention", "getitem"]


def test_heads_are_merged_without_a_copy():
    """The op writes where `transpose(1, 2).reshape(...)` wants it."""

    def merged(q, k, v):
        return softmax_attention(q, k, v).transpose(1, 2).reshape(B, N, H * D)

    graph = assert_rewrites(RewriteAttention, merged, inputs()).graph
    names = [op_name(n.target) for n in graph.nodes if n.op == "call_function"]
    assert names == ["attention", "getitem", "permute", "reshape"]
    assert "order=(0, 2, 1, 3,)" in attentions(graph)[0].args[4]


@pytest.mark.parametrize(
    "scaled",
    [
        lambda q, k, v, scale, n: ((q @ k.mT) * scale + n).softmax(-1) @ v,
        lambda q, k, v, scale, n: F.silu(q @ k.mT * scale) / n @ v,
    ],
    ids=["softmax", "silu"],
)
def test_numbers_that_are_known_at_run_time_only(scaled):
    """With dynamic=True floats and ints of the model are symbolic: one graph for all of them."""
    torch._dynamo.reset()
    compiled = torch.compile(scaled, backend="recompile", dynamic=True, options={"strict": True})
    qkv = [torch.randn(2, N, D, requires_grad=True) for _ in range(3)]
    with recompile.report.collect() as report:
        for numbers in ((0.3, 50), (0.7, 60)):
            actual, expected = compiled(*qkv, *numbers), scaled(*qkv, *numbers)
            torch.testing.assert_close(actual, expected)
            grad = torch.randn_like(expected)
            torch.testing.assert_close(
                torch.autograd.grad(actual, qkv, grad), torch.autograd.grad(expected, qkv, grad)
            )
    assert len(report.graphs) == 1 and len(report.graphs[0].regions) == 1


def test_keys_are_read_through_repeats_of_heads():
    def grouped(q, k, v):
        k, v = (x[:, :, None].expand(B, 2, 3, N, D).reshape(B, 6, N, D) for x in (k, v))
        return softmax_attention(q, k, v)

    q, k, v = torch.randn(B, 6, N, D), torch.randn(B, 2, N, D), torch.randn(B, 2, N, D)
    (node,) = attentions(assert_rewrites(RewriteAttention, grouped, (q, k, v)).graph)
    assert [list(x.meta["val"].shape) for x in node.args[:3]] == [[B, 2, 3, N, D], *[[B, 2, 1, N, D]] * 2]


def without_keys(q, k, v, length):
    mask = (torch.arange(N) < length[:, None])[:, None, None]
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


def averaged_without_keys(q, k, v, length):
    mask = (torch.arange(N) < length[:, None])[:, None, None]
    return torch.where(mask, q @ k.mT, -1e9).softmax(-1) @ v


def divided_by_no_keys(q, k, v, length):
    mask = (torch.arange(N) < length[:, None])[:, None, None]
    return F.silu(q @ k.mT) * mask / length[:, None, None, None] @ v


@pytest.mark.parametrize("function", [without_keys, averaged_without_keys])
def test_rows_without_keys_are_eager_s(function):
    """NaN for -inf, the mean for -1e9."""
    given = Spelling("", function, lambda: (*inputs(), torch.tensor([N, 0])))
    graph, _ = assert_rewritten_same(*given.module())
    assert len(attentions(graph)) == 1


def test_a_length_of_0_is_divided_by():
    """0 / 0 is NaN, though the mask alone makes the row 0."""
    graph = assert_rewrites(RewriteAttention, divided_by_no_keys, (*inputs(), torch.tensor([N, 0])))
    length = torch.tensor([N, 0])
    expected = divided_by_no_keys(*inputs(), length)
    assert expected[1].isnan().all() and len(attentions(graph.graph)) == 1
    q, k, v = inputs()
    given = {"l_q_": q, "l_k_": k, "l_v_": v, "l_length_": length}
    actual = graph(*(given[n.name] for n in graph.graph.find_nodes(op="placeholder")))[0]
    torch.testing.assert_close(actual, expected, equal_nan=True)


def dropped(q, k, v):
    return F.dropout((q @ k.mT).softmax(-1), 0.25, training=True) @ v


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_dropout_in_training(dynamic):
    """With the identity as values the output is the weights: each is dropped, or 4/3 of what it was."""
    torch.manual_seed(0)
    q, k = (torch.randn(4, 2, 64, 8, requires_grad=True) for _ in range(2))
    torch._dynamo.reset()
    v, grad = torch.eye(64).expand(4, 2, -1, -1), torch.randn(4, 2, 64, 64)
    compiled = torch.compile(dropped, backend="recompile", dynamic=dynamic, options={"strict": True})
    outs = [compiled(q, k, v) for _ in range(2)]
    expected, kept = (q @ k.mT).softmax(-1), outs[0] > 0
    torch.testing.assert_close(outs[0], expected * kept / 0.75)
    torch.testing.assert_close(
        torch.autograd.grad(outs[0], (q, k), grad), torch.autograd.grad(expected * kept / 0.75, (q, k), grad)
    )
    assert abs(kept.float().mean() - 0.75) < 0.01  # of 32768: a standard deviation is 0.0024
    again = (outs[1] > 0).float().sub(0.75).mul(kept.float() - 0.75).mean()
    assert abs(again) < 0.005  # the second call's are independent


def test_dropout_that_must_be_eager_s_is_left_alone():
    options = {"inductor": {"fallback_random": True}}
    report = recompile.explain(dropped, *inputs(), options=options)
    said = [r.why for e in report.graphs[0].passes for rule in e.rules for r in rule.refused]
    assert "dropout has to draw eager's numbers: Inductor's fallback_random is set" in said


class Library(nn.Module):
    """`nn.MultiheadAttention` as SASRec, BST and others call it."""

    def __init__(self, **how):
        super().__init__()
        self.attention, self.how = nn.MultiheadAttention(H * D, H, batch_first=True).double(), how

    def forward(self, x, **masks):
        return self.attention(x, x, x, **self.how, **masks)[0]


def test_multihead_attention_whose_weights_nobody_reads():
    x, mask = torch.randn(B, N, H * D, dtype=torch.float64), torch.ones(N, N, dtype=torch.bool).triu(1)
    graph, _ = assert_rewritten_same(Library(need_weights=True, attn_mask=mask), (x,))
    assert len(attentions(graph)) == 1
    padding = torch.arange(N) >= torch.tensor([[N], [3]])
    graph, _ = assert_rewritten_same(Library(need_weights=True, key_padding_mask=padding), (x,))
    assert "keep='Eq(n0, 0)'" in attentions(graph)[0].args[4]


def test_multihead_attention_without_weights_is_the_library_s():
    x = torch.randn(B, N, H * D, dtype=torch.float64)
    graph, record = assert_rewritten_same(Library(need_weights=False), (x,))
    said = [r.why for entry in record.passes for rule in entry.rules for r in rule.refused]
    assert not attentions(graph) and "it is the library's attention already" in said


def test_an_encoder_layer_in_training_is_the_library_s():
    layer = nn.TransformerEncoderLayer(H * D, H, 32, dropout=0.0, batch_first=True).double().train()
    padding = torch.arange(N) >= torch.tensor([[N], [3]])
    x = torch.randn(B, N, H * D, dtype=torch.float64)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x, src_key_padding_mask=padding)

    graph, record = assert_rewritten_same(Padded(), (x,))
    said = [r.why for entry in record.passes for rule in entry.rules for r in rule.refused]
    assert not attentions(graph) and "it is the library's attention already" in said


LENGTHS = torch.tensor([N, 3, 0])
ATTENDED = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=0.3),
    "causal": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
    "padding, and a sample without keys": lambda q, k, v: F.scaled_dot_product_attention(
        q, k, v, attn_mask=(torch.arange(N) < LENGTHS[:, None])[:, None, None]
    ),
    "a bias": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.linspace(0, 1, N)[None]),
    "heads inside rows": lambda q, k, v: F.scaled_dot_product_attention(
        *(x.reshape(3, N, H, D).transpose(1, 2) for x in (q, k, v))
    ).transpose(1, 2).reshape(3, N, H * D),
    "three dims": lambda q, k, v: F.scaled_dot_product_attention(q[:, 0], k[:, 0], v[:, 0]),
}  # fmt: skip


# Compiled by Inductor; the others differ from them in what the passes see, and run by the reference.
GENERATED = ("padding, and a sample without keys", "a bias", "heads inside rows")


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", ATTENDED)
def test_the_library_s_attention_in_float32(name, dynamic):
    """On a CPU it becomes ours; values, layout and gradients stay."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    qkv = [torch.randn(3, H, N, D, requires_grad=True) for _ in range(3)]
    compiled = torch.compile(ATTENDED[name], backend="recompile", dynamic=dynamic, options={"strict": True})
    generated = dynamic and name in GENERATED
    with nullcontext() if generated else without_inductor(), recompile.report.collect() as report:
        actual = compiled(*qkv)
    expected = ATTENDED[name](*qkv)
    assert [region.op for region in report.graphs[0].regions] == ["recompile.attention.default"]
    assert actual.stride() == expected.stride()
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    torch.testing.assert_close(
        torch.autograd.grad(actual, qkv, grad, allow_unused=True),
        torch.autograd.grad(expected, qkv, grad, allow_unused=True),
    )


@pytest.mark.parametrize("batch_first", [False, True])
def test_an_encoder_layer_in_training(batch_first):
    """nn.TransformerEncoderLayer in float32, with padding and a sample without keys; dropout 0 makes it comparable."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(H * D, H, 32, dropout=0.0, batch_first=batch_first, norm_first=True)
    x = torch.randn(3, N, H * D) if batch_first else torch.randn(N, 3, H * D)
    padding = torch.arange(N) >= LENGTHS[:, None]
    compiled = torch.compile(layer, backend="recompile", options={"strict": True})
    with recompile.report.collect() as report:
        actual, expected = (call(x, src_key_padding_mask=padding) for call in (compiled, layer))
    assert [region.op for region in report.graphs[0].regions] == ["recompile.attention.default"]
    torch.testing.assert_close(actual, expected)
    grad, parameters = torch.randn_like(expected), list(layer.parameters())
    found, wanted = (torch.autograd.grad(y, parameters, grad) for y in (actual, expected))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("masked", ["", "padding", "causal", "both"])
def test_an_encoder_layer_in_evaluation(masked, dynamic):
    """One call of torch's fast path becomes its layers and our attention; rows without keys are NaN as there."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    how = {"activation": "gelu", "norm_first": True} if masked in ("", "both") else {}
    layer = nn.TransformerEncoderLayer(H * D, H, 32, batch_first=True, **how).eval()
    x, masks = torch.randn(3, N, H * D), {}
    if masked in ("padding", "both"):
        masks["src_key_padding_mask"] = torch.arange(N) >= LENGTHS[:, None]
    if masked in ("causal", "both"):
        masks["src_mask"] = torch.ones(N, N, dtype=torch.bool).triu(1)
    compiled = torch.compile(layer, backend="recompile", dynamic=dynamic, options={"strict": True})
    with torch.no_grad(), without_inductor(), recompile.report.collect() as report:
        actual, expected = (call(x, **masks) for call in (compiled, layer))
    assert [region.op for region in report.graphs[0].regions] == ["recompile.attention.default"]
    torch.testing.assert_close(actual, expected, equal_nan=True)


def test_an_encoder_layer_that_stays_the_library_s():
    for dtype, rows, why in (
        (torch.float32, 1, "the product has no dim of keys of its own"),
        (torch.float64, N, "it is the library's attention already"),
    ):
        layer = nn.TransformerEncoderLayer(H * D, H, 32, batch_first=True).eval().to(dtype)
        with torch.no_grad(), without_inductor():
            report = recompile.explain(
                layer, torch.randn(3, rows, H * D, dtype=dtype), options={"strict": True}
            )
        said = [r.why for e in report.graphs[0].passes for rule in e.rules for r in rule.refused]
        assert why in said and not report.graphs[0].regions
        assert report.graphs[0].passes[-1].nodes_after == report.graphs[0].passes[-1].nodes_before


def test_the_library_s_dropout():
    q, k, v = (torch.randn(3, H, N, D, requires_grad=True) for _ in range(3))

    def attended(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    report = recompile.explain(attended, q, k, v, train=True)
    assert "weights times where(uniform(n0, i, j) >= 0.5, 2.0, 0)" in report.graphs[0].regions[0].summary


def test_what_stays_the_library_s():
    def grouped(q, k, v):
        return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)

    def of_one_key(q, k, v):
        return F.scaled_dot_product_attention(q, k[..., :1, :], v[..., :1, :])

    for model, why in (
        (grouped, "it is the library's attention, with heads that share keys"),
        (of_one_key, "the product has no dim of keys of its own"),
    ):
        report = recompile.explain(model, *inputs(), options={"strict": True})
        said = [r.why for e in report.graphs[0].passes for rule in e.rules for r in rule.refused]
        assert why in said and not report.graphs[0].regions
        assert report.graphs[0].passes[-1].nodes_after == report.graphs[0].passes[-1].nodes_before


def test_a_plain_softmax_on_a_gpu_is_the_library_s():
    causal = Attention("where(j <= i, 0.25*s, -oo)", True, keep="j <= i", kept="0.25*s")
    assert by_library(causal, "cuda", 4) == {"is_causal": True, "scale": 0.25}
    assert by_library(Attention("0.5*s", True), "cuda", 4) == {"is_causal": False, "scale": 0.5}
    window = Attention("where(i - j < 5, s, -oo)", True, keep="i - j < 5", kept="s")
    for spec in (
        window,
        Attention("s + x0", True, ("x0",)),
        Attention("tanh(s)", True),
        Attention("0.25*s", False),
    ):
        assert by_library(spec, "cuda", 4) is None
    assert by_library(causal, "cpu", 4) is None and by_library(causal, "cuda", 5) is None


def test_control_flow_on_scores_hands_them_to_python():
    """Dynamo ends the graph at the condition, so the scores leave it."""

    def branching(q, k, v):
        scores = q @ k.mT
        weights = scores.softmax(-1)
        if scores.sum() > 0:
            weights = weights * 2
        return weights @ v

    with torch.no_grad():
        report = recompile.explain(branching, *inputs())
    assert len(report.graphs) == 2
    fired = [
        r.fired for g in report.graphs for p in g.passes for r in p.rules if r.name == "rewrite-attention"
    ]
    assert sum(fired) == 0


def scores_returned(q, k, v):
    weights = (q @ k.mT).softmax(-1)
    return weights @ v, weights


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v


def softmax_over_heads(q, k, v):
    return (q @ k.mT).softmax(1) @ v


def values_made_of_scores(q, k, v):
    scores = q @ k.mT
    return scores.softmax(-1) @ (v * scores.mean())


def wiped_in_place(q, k, v):
    scores = q @ k.mT
    p = scores.softmax(-1)
    scores.detach().zero_()
    return p @ v


def drawn_in_place(q, k, v):
    scores = q @ k.mT
    return scores.bernoulli_(0.5).softmax(-1) @ v


def accumulated(q, k, v):
    return (q @ k.mT).cumsum(-1).softmax(-1) @ v


def of_two_products(q, k, v):
    return (torch.tanh(q @ k.mT) + k @ q.mT).softmax(-1) @ v


def softmax_of_softmax(q, k, v):
    return (q @ k.mT).softmax(-1).softmax(-1) @ v


def powers_of_the_softmax(q, k, v):
    return ((q @ k.mT).softmax(-1) ** 2) @ v


def a_chain(q, k, v):
    return (q @ k.mT) @ v


REFUSED = [
    (scores_returned, "scores are also returned to the caller", "softmax"),
    (softmax_over_queries, "softmax runs over the query axis", "softmax"),
    (softmax_over_heads, "softmax runs over dim 1, not over the keys", "softmax"),
    (values_made_of_scores, "scores are also read by mean", "matmul"),
    (wiped_in_place, "the scores are written in place", ""),
    (drawn_in_place, "bernoulli_ between the scores and the values is not supported", "bernoulli_"),
    (accumulated, "cumsum between the scores and the values is not supported", "cumsum"),
    (of_two_products, "the attention weights are made of two products", "matmul"),
    (softmax_of_softmax, "two softmaxes stand one after the other", "softmax_1"),
    (powers_of_the_softmax, "the softmax' result is not just multiplied: p**2", ""),
    (a_chain, "the scores are used as they are: it is a chain of products", ""),
]


@pytest.mark.parametrize(("model", "why", "at"), REFUSED, ids=[case[0].__name__ for case in REFUSED])
def test_refuses(model, why: str, at: str):
    assert_refuses(RewriteAttention, model, inputs(), why=why, at=at)


def test_a_perceptron_is_no_attention():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double()
    graph, record = assert_rewritten_same(model, (torch.randn(3, 8, dtype=torch.float64),))
    (rule,) = [r for entry in record.passes for r in entry.rules if r.name == "rewrite-attention"]
    assert not attentions(graph) and rule.tried == 0


@pytest.mark.parametrize(
    ("name", "fires"),
    [("rechub.SASRec", 2), ("rechub.HSTU", 4), ("rechub.AutoInt", 3), ("rechub.ComirecSA", 1)],
)
def test_models_of_torch_rechub(name: str, fires: int):
    pytest.importorskip("torch_rechub")
    from recompile.zoo import build

    model, given, _ = build(name, 0.01)
    with torch.no_grad():
        graph, _ = assert_rewritten_same(Forward(model.eval()), given(3))
    assert len(attentions(graph)) == fires


class Forward(nn.Module):
    """A model without parameters of its own: only its outputs are compared."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.call = model.forward

    def forward(self, *args):
        return self.call(*args)
