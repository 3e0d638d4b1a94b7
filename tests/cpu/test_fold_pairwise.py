"""Linear layers over repeated parts: what is split, what is refused, and eager's values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from recompile.passes.fold_pairwise_linear import FoldPairwiseLinear
from recompile.rewrite import Context
from recompile.testing import (
    assert_refuses,
    assert_rewrites,
    assert_rewritten_same,
    assert_same,
    capture,
    text,
)

B, N, D, H = 40, 50, 16, 32


class Layer(nn.Module):
    """`how` is given the layer, a row a sample q [B, D] and a row a position k [B, N, D]."""

    def __init__(self, how, parts=4, bias=True):
        super().__init__()
        self.first, self.how = nn.Linear(parts * D, H, bias), how

    def forward(self, q, k):
        return torch.sigmoid(self.how(self.first, q, k))


def inputs(batch=B, n=N, dtype=torch.float64):
    torch.manual_seed(0)
    return torch.randn(batch, D, dtype=dtype), torch.randn(batch, n, D, dtype=dtype)


def folded(how, parts=4, bias=True, batch=B, n=N, dynamic=False):
    """The operators after all passes. Values and gradients are checked; the inputs' too if nothing is dynamic."""
    torch.manual_seed(0)
    args = inputs(batch, n)
    model, args = (Layer(how, parts, bias), args) if dynamic else (WithInputs(how, *args, parts, bias), ())
    graph, record = assert_rewritten_same(model.double(), args, dynamic)
    (rule,) = [r for p in record.passes for r in p.rules if r.name == "fold-pairwise-linear"]
    assert rule.fired == 1, rule.refused
    return [node.name for node in graph.nodes if node.op == "call_function"]


class WithInputs(Layer):
    """The inputs as parameters, so that their gradients are compared too."""

    def __init__(self, how, q, k, parts=4, bias=True):
        super().__init__(how, parts, bias)
        self.q, self.k = nn.Parameter(q), nn.Parameter(k)

    def forward(self):
        return super().forward(self.q * 1, self.k * 1)


def cat_of_four(first, q, k):
    q = q.unsqueeze(1).expand(-1, k.shape[1], -1)
    return first(torch.cat([q, k, q - k, q * k], -1))


def test_the_graph_afterwards():
    assert_rewrites(
        FoldPairwiseLinear,
        Layer(cat_of_four).double(),
        inputs(),
        """
        unsqueeze = unsqueeze(l_q_, 1)
        slice_1 = slice(l_self_modules_first_parameters_weight_, 1, 0, 16)
        slice_2 = slice(l_self_modules_first_parameters_weight_, 1, 32, 48)
        add = add(slice_1, slice_2)
        linear_1 = linear(unsqueeze, add, l_self_modules_first_parameters_bias_)
        slice_3 = slice(l_self_modules_first_parameters_weight_, 1, 16, 32)
        slice_4 = slice(l_self_modules_first_parameters_weight_, 1, 32, 48)
        sub_1 = sub(slice_3, slice_4)
        slice_5 = slice(l_self_modules_first_parameters_weight_, 1, 48, 64)
        mul_1 = mul(unsqueeze, slice_5)
        add_1 = add(sub_1, mul_1)
        permute = permute(add_1, [0, 2, 1])
        bmm = bmm(l_k_, permute)
        add_2 = add(bmm, linear_1)
        sigmoid = sigmoid(add_2)
        return (sigmoid,)
        """,
    )


def parts_in_another_order(first, q, k):
    q = q.unsqueeze(1).expand(-1, N, -1)
    return first(torch.cat([k * q, k - q, k, q], 2))


def negated_and_scaled(first, q, k):
    q = q[:, None].expand(-1, N, -1)
    return first(torch.cat([2 * q, -k, torch.sub(k, q, alpha=3) / 4, -(q * 0.5) * k], -1))


def broadcast_by_arithmetic(first, q, k):
    q = q.unsqueeze(1)
    return first(torch.cat([q.expand_as(k), k, q - k, k * q], -1))


def repeated(first, q, k):
    q = q.unsqueeze(1).repeat(1, N, 1)
    return first(torch.cat([q, k, q - k, q * k], -1))


def repeated_interleaved(first, q, k):
    q = torch.repeat_interleave(q.unsqueeze(1), N, dim=1)
    return first(torch.cat([q, k, q - k, q * k], -1))


def repeated_columns(first, q, k):
    q = q.repeat(1, N).view(-1, N, D)
    return first(torch.cat([q, k, q - k, q * k], -1))


def tiled_columns(first, q, k):
    q = q.tile(N).view(-1, N, D)
    return first(torch.cat([q, k, q - k, q * k], -1))


def flattened_after(first, q, k):
    q = q.unsqueeze(1).expand(-1, N, -1)
    return first(torch.cat([q, k, q - k, q * k], -1).view(-1, 4 * D))


def flattened_before(first, q, k):
    q, k = q.repeat_interleave(N, 0), k.reshape(-1, D)
    return first(torch.cat([q, k, q - k, q * k], -1))


def flattened_by_expanding(first, q, k):
    q, k = q.unsqueeze(1).expand(-1, N, -1).reshape(-1, D), k.reshape(-1, D)
    return first(torch.cat([q, k, q - k, q * k], -1)).view(-1, N, H)


def multiplied(first, q, k):
    q = q.unsqueeze(1).expand(-1, N, -1)
    return torch.matmul(torch.cat([q, k, q - k, q * k], -1), first.weight.t()) + first.bias


def multiplied_flat(first, q, k):
    q = q.unsqueeze(1).expand(-1, N, -1)
    return torch.addmm(first.bias, torch.cat([q, k, q - k, q * k], -1).view(-1, 4 * D), first.weight.t())


def contracted(first, q, k):
    q = q.unsqueeze(1).expand(-1, N, -1)
    return torch.tensordot(torch.cat([q, k, q - k, q * k], -1), first.weight.t(), ([2], [0])) + first.bias


def several_axes(first, q, k):
    q, k = q[:, None, None], k.view(-1, 2, N // 2, D)
    return first(torch.cat([q.expand_as(k), k, q - k, q * k], -1))


SPELLINGS = [
    parts_in_another_order,
    negated_and_scaled,
    broadcast_by_arithmetic,
    repeated,
    repeated_interleaved,
    repeated_columns,
    tiled_columns,
    flattened_after,
    flattened_before,
    flattened_by_expanding,
    multiplied,
    multiplied_flat,
    contracted,
    several_axes,
]


@pytest.mark.parametrize("how", SPELLINGS, ids=lambda how: how.__name__)
def test_spellings(how):
    names = folded(how)
    assert "bmm" in names and not any(name.startswith(("cat", "repeat", "expand")) for name in names)


@pytest.mark.parametrize("how", [cat_of_four, flattened_after, flattened_before, repeated_columns])
def test_sizes_may_be_dynamic(how):
    assert "bmm" in folded(how, dynamic=True)


@pytest.mark.parametrize("how", [cat_of_four, broadcast_by_arithmetic])
def test_one_sample_has_one_matrix(how):
    names = folded(how, batch=1, n=300)
    assert "bmm" not in names and "cat" not in names


def test_without_a_bias():
    assert "bmm" in folded(cat_of_four, bias=False)


def candidates(first, q, k):
    return first(torch.cat([q.unsqueeze(1).expand(-1, k.shape[1], -1), k], -1))


def candidates_in_rows(first, q, k):
    return first(torch.cat([k.reshape(-1, D), q.repeat_interleave(k.shape[1], 0)], -1))


def candidates_of_one(first, q, k):
    k = k.reshape(-1, D)
    return first(torch.cat([q[:1].expand(k.shape[0], -1), k], -1))


@pytest.mark.parametrize("how", [candidates, candidates_in_rows, candidates_of_one])
def test_a_user_is_computed_once_for_many_candidates(how):
    names = folded(how, parts=2)
    assert len([name for name in names if name.startswith("linear")]) == 2 and "cat" not in names


def test_few_candidates_keep_their_product():
    def how(first, q, k):
        q = q.unsqueeze(1).expand_as(k)
        return first(torch.cat([q, k, q - k, q * k], -1))

    names = folded(how, batch=500, n=4)
    assert "bmm" not in names and len([name for name in names if name.startswith("linear")]) == 2


def test_parts_that_are_neither_keep_their_columns():
    def how(first, q, k):
        e = q.unsqueeze(1).expand_as(k)
        return first(torch.cat([e, torch.tanh(k), k * k, e * k, q[0].expand_as(k), e * e], -1))

    assert "bmm" in folded(how, parts=6)


def test_a_sum_of_new_tensors_is_one_part():
    def how(first, q, k):
        return first(torch.cat([q.unsqueeze(1).expand_as(k), torch.sin(k) + torch.cos(k)], -1))

    names = folded(how, parts=2)
    assert "cat" not in names and len([name for name in names if name.startswith("linear")]) == 2


def test_two_kinds_of_rows():
    def how(first, q, k):  # pairs of positions: k by rows and by columns
        a, b = k[:, :, None].expand(-1, -1, N, -1), k[:, None].expand(-1, N, -1, -1)
        return first(torch.cat([a, b, q[:, None, None].expand_as(a)], -1))

    assert "cat" not in folded(how, parts=3, batch=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    """As far from the exact result as eager is, or twice as far: the sum of two products is rounded once more."""
    model, args = Layer(cat_of_four).to(dtype), inputs(dtype=dtype)
    gm = capture(model, *args)
    FoldPairwiseLinear().run(gm.graph, ctx := Context())
    assert ctx.rules["fold-pairwise-linear"].fired == 1
    by_name = {
        "l_q_": args[0],
        "l_k_": args[1],
        "l_self_modules_first_parameters_weight_": model.first.weight,
        "l_self_modules_first_parameters_bias_": model.first.bias,
    }
    placeholders = [by_name[node.name] for node in gm.graph.nodes if node.op == "placeholder"]
    actual, eager = torch.fx.Interpreter(gm).run(*placeholders)[0], model(*args)
    exact = model.double()(*(x.double() for x in args))
    assert actual.dtype == dtype and (actual - exact).norm() < 2 * (eager - exact).norm()


# -- refusals


def test_refuses_few_positions():
    why = "split over its parts, the layer would cost"
    assert_refuses(FoldPairwiseLinear, Layer(thin).double(), inputs(n=2), why, "linear")


def thin(first, q, k):
    """Only one column in 64 is repeated."""
    return F.linear(
        torch.cat([q[:, None, :1].expand(-1, k.shape[1], -1), k, k.sin(), k.cos()], -1), first.weight[:, :49]
    )


def test_refuses_a_small_layer():
    why = "too small to gain"
    assert_refuses(FoldPairwiseLinear, Layer(cat_of_four).double(), inputs(1, 4), why, "linear")


def test_refuses_parts_written_in_place():
    def how(first, q, k):
        e = q.unsqueeze(1).expand_as(k)
        joined = torch.cat([e, k, e - k, e * k], -1)
        k.mul_(2)
        return first(joined)

    why = "mul_ stands between"
    assert_refuses(FoldPairwiseLinear, Layer(how).double(), inputs(), why, "mul_")


def test_refuses_a_written_concatenation():
    def how(first, q, k):
        e = q.unsqueeze(1).expand_as(k)
        joined = torch.cat([e, k, e - k, e * k], -1)
        joined.detach()[:, 0] = 0
        return first(joined)

    assert_refuses(FoldPairwiseLinear, Layer(how).double(), inputs(), "stands between cat and the layer")


def test_refuses_autocast():
    def how(first, q, k):
        e = q.unsqueeze(1).expand_as(k)
        joined = torch.cat([e, k, e - k, e * k], -1)
        return first(joined)

    class Mixed(Layer):
        def forward(self, q, k):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(q, k)

    why = "the layer computes in another dtype than"
    assert_refuses(FoldPairwiseLinear, Mixed(how), inputs(dtype=torch.float32), why)


def test_refuses_complex_numbers():
    model, args = Layer(cat_of_four).to(torch.complex64), inputs(dtype=torch.complex64)
    assert_refuses(FoldPairwiseLinear, model, args, "does not compute in floating point", "linear")


def test_a_concatenation_of_others_is_no_candidate():
    def how(first, q, k):
        return first(torch.cat([k, -k, k * k, k.sin()], -1))

    gm = capture(Layer(how).double(), *inputs())
    before = text(gm)
    FoldPairwiseLinear().run(gm.graph, ctx := Context())
    assert text(gm) == before and ctx.rules["fold-pairwise-linear"].tried == 0


def test_a_concatenation_that_others_read_is_still_built():
    def how(first, q, k):
        e = q.unsqueeze(1).expand_as(k)
        joined = torch.cat([e, k, e - k, e * k], -1)
        return first(joined) + joined.sum(-1, keepdim=True)

    assert {"cat", "bmm"} <= set(folded(how))


# -- whole models


class Attention(nn.Module):
    """DIN's, with a mask, softmax or not, and any activation."""

    def __init__(self, activation, softmax):
        super().__init__()
        self.first, self.activation, self.softmax = nn.Linear(4 * D, H), activation, softmax
        self.last = nn.Linear(H, 1)

    def forward(self, q, k, lengths):
        scores = self.last(self.activation(cat_of_four(self.first, q, k))).squeeze(-1)
        kept = torch.arange(k.shape[1]) < lengths[:, None]
        scores = scores.masked_fill(~kept, -1e9).softmax(-1) if self.softmax else scores * kept
        return torch.bmm(scores.unsqueeze(1), k).squeeze(1)


def rewritten(model, *args):
    """How often the pass fired; values and gradients are checked."""
    _, record = assert_rewritten_same(model.double(), args)
    return sum(r.fired for p in record.passes for r in p.rules if r.name == "fold-pairwise-linear")


def test_compiled():
    torch._dynamo.reset()
    report = assert_same(Attention(nn.PReLU(), True), (*inputs(), torch.randint(1, N, (B,))), train=True)
    assert [
        r.fired for p in report.graphs[0].passes for r in p.rules if r.name == "fold-pairwise-linear"
    ] == [1]


def test_attention_without_softmax():
    assert rewritten(Attention(nn.Sigmoid(), False), *inputs(), torch.randint(1, N, (B,))) == 1


@pytest.mark.parametrize("softmax", [False, True])
def test_rechub(softmax):
    rechub = pytest.importorskip("torch_rechub.models.ranking.din")
    unit = rechub.ActivationUnit(D, dims=[H, 8], activation="dice", use_softmax=softmax)
    assert rewritten(unit.eval(), *inputs()[::-1]) == 1


def test_deepctr():
    deepctr = pytest.importorskip("deepctr_torch.layers.sequence")
    unit = deepctr.AttentionSequencePoolingLayer((H, 8), weight_normalization=True, embedding_dim=D)
    for weight in unit.parameters():
        nn.init.normal_(weight, std=0.1)
    q, k = inputs()
    assert rewritten(unit, q.unsqueeze(1), k, torch.randint(1, N, (B, 1))) == 1
