"""Attention among writes, grad modes and calls of unknown effect: fused where that changes nothing."""

import copy

import pytest
import torch
from torch import nn

from recompile.report import collect
from tests.capturing import without_inductor

B, H, N, D = 2, 3, 6, 4


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


def attend(q, k, v, mask=None):
    scores = q @ k.mT
    return (scores if mask is None else scores.masked_fill(~mask, -1e9)).softmax(-1) @ v


def merged(out):
    return out.transpose(1, 2).reshape(B, N, H * D)


def written_before_its_result_is_copied(q, k, v, lengths):
    out = attend(q, k, v)
    v.detach().mul_(0.5)
    return merged(out)


def around_a_condition(q, k, v, lengths):
    mask = (torch.arange(N) < lengths[:, None])[:, None, None]
    doubled = torch.cond(lengths.sum() > 3, lambda x: 2 * x, lambda x: x + 1, (v,))
    return merged(attend(q, k, doubled, mask))


def bias_without_gradients_around_a_condition(q, k, v, lengths):
    with torch.no_grad():
        bias = q.sum(-1, keepdim=True) * 0.1 + k.sum(-1)[:, :, None]
        v = torch.cond(lengths.sum() > 3, lambda x: 2 * x, lambda x: x + 1, (v,))
    return merged((q @ k.mT + bias).softmax(-1) @ v)


def scores_written_by_a_buffer(q, k, v, lengths):
    scores = q @ k.mT
    v.mul_(0.5)
    return merged(scores.softmax(-1) @ v)


def mask_without_gradients(q, k, v, lengths):
    with torch.no_grad():
        mask = torch.arange(N) < lengths[:, None]
    return merged(attend(q, k, v, mask[:, None, None]))


def additive_mask_without_gradients(q, k, v, lengths):
    with torch.no_grad():
        bias = (1.0 - (torch.arange(N) < lengths[:, None]).to(q.dtype)) * -1e9
    return merged((q @ k.mT + bias[:, None, None]).softmax(-1) @ v)


def bias_without_gradients(q, k, v, lengths):
    with torch.no_grad():
        bias = q.sum(-1, keepdim=True) * 0.1 + k.sum(-1)[:, :, None]
    return merged((q @ k.mT + bias).softmax(-1) @ v)


def result_without_gradients(q, k, v, lengths):
    with torch.no_grad():
        out = attend(q, k, v)
    return merged(out) + q.sum()


def after_a_custom_function(q, k, v, lengths):
    return merged(attend(Doubled.apply(q.clone()), k, v, (torch.arange(N) < lengths[:, None])[:, None, None]))


def around_a_custom_function(q, k, v, lengths):
    scores = q @ k.mT
    return merged(scores.softmax(-1) @ Doubled.apply(v))


CASES = {  # the regions expected
    written_before_its_result_is_copied: 1,
    scores_written_by_a_buffer: 1,
    mask_without_gradients: 1,
    additive_mask_without_gradients: 1,
    bias_without_gradients: None,
    result_without_gradients: 1,
    after_a_custom_function: 1,
    around_a_custom_function: None,
    around_a_condition: 1,
    bias_without_gradients_around_a_condition: None,
}


class Model(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.project, self.attention = nn.Linear(D, 3 * H * D), attention

    def forward(self, x, scale, lengths):
        q, k, v = self.project(x).view(B, N, 3, H, D).permute(2, 0, 3, 1, 4)
        return self.attention(q, k, v * scale, lengths)


def results(model, call, x, lengths, train):
    scale = torch.ones(B, H, N, D, dtype=x.dtype)
    with torch.set_grad_enabled(train):
        out = call(x, scale, lengths)
    if train:
        out.square().sum().backward()
    return out, [p.grad for p in model.parameters()], scale


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("attention", CASES, ids=lambda f: f.__name__)
def test_equal_to_eager(attention, train):
    if train and attention is written_before_its_result_is_copied:
        pytest.skip("eager cannot differentiate it: the write is to what the product saved")
    torch._dynamo.reset()
    model, x, lengths = (
        Model(attention).double(),
        torch.randn(B, N, D, dtype=torch.double),
        torch.tensor([2, 5]),
    )
    other = copy.deepcopy(model)
    with without_inductor(), collect() as report:
        actual = results(other, torch.compile(other, backend="recompile"), x, lengths, train)
    torch.testing.assert_close(actual, results(model, model, x, lengths, train))
    (graph,) = report.graphs
    assert graph.fallback is None and not [p.error for p in graph.passes if p.error]
    if CASES[attention] is not None:
        assert len(graph.regions) == CASES[attention], report.text()


def test_times_in_float64_are_not_rounded():
    """Unix times lie 128 s apart in float32."""

    def model(q, k, v, table, times):
        apart = (times[:, :, None] - times[:, None]).abs()
        buckets = (apart.float() + 1).log().long().clamp(0, 31)
        return torch.nn.functional.silu(q @ k.mT + table[buckets]) @ v

    torch.manual_seed(0)
    given = [torch.randn(B, N, D) for _ in range(3)] + [torch.randn(32)]
    times = 1.7e9 + 100 * torch.rand(B, N, dtype=torch.float64).cumsum(1)
    torch._dynamo.reset()
    with collect() as report:
        actual = torch.compile(model, backend="recompile")(*given, times)
    torch.testing.assert_close(actual, model(*given, times))
    assert len(report.graphs[0].regions) == 1
