"""Models that write in place: into their own scores, masks, buffers and inputs."""

from contextlib import nullcontext

import pytest
import torch

from recompile.explain import compiling
from tests.capturing import without_inductor

torch.manual_seed(0)
INF = float("-inf")
EVEN = torch.tensor([True, False, True, False, True])


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def scores_in_place(q, k, v):
    scores = q @ k.mT
    scores *= 0.3
    scores += torch.arange(5.0)
    return attend(scores.masked_fill_(EVEN, -1e9), v)


def heads_in_place(q, k, v):
    q, k, v = (x.view(-1, 5, 2, 4).transpose(1, 2) for x in (q, k, v))
    scores = q @ k.transpose(2, 3)
    scores.view(-1, 5, 5).div_(2)
    return attend(scores, v).transpose(1, 2).reshape(-1, 5, 8)


def weights_in_place(q, k, v):
    p = torch.nn.functional.silu(q @ k.mT, inplace=True)
    p *= torch.tril(torch.ones(5, 5))
    return p.div_(5) @ v


def mask_by_columns(q, k, v):
    mask = torch.zeros(5, 5)
    mask[:, 3:] = INF
    mask[0] = 1.0
    mask[2:4, :2] = -2.0
    return attend(q @ k.mT + mask, v)


def mask_of_truths(q, k, v):
    mask = torch.ones(5, 5, dtype=torch.bool).tril_()
    mask[:, 0] = True
    mask |= EVEN
    return attend((q @ k.mT).masked_fill(~mask, INF), v)


def mask_by_index(q, k, v):
    scores = q @ k.mT
    scores[:, :, EVEN] = -1e9
    scores[:, :, -1] = q.sum(-1)
    scores[:, 1] += 2.0
    return attend(scores, v)


def filled_columns(q, k, v):
    out = torch.empty(len(q), 5, 24)
    out[:, :, :8] = q
    out[..., 16:] = v * 2
    out[..., 8:16] = k
    return out.sin()


def read_between(q, k, v):
    x = q * 2
    row, before = x[:, 1], x.exp()
    x[:, 1] = k[:, 2]
    middle = row * 3
    row.mul_(v[:, 0])
    x[:, :, ::2] += 1
    x.diagonal(0, 1, 2).zero_()
    return before + x + middle[:, None] + row[:, None]


def shifted_onto_itself(q, k, v):
    x = q + 1
    x[:, 1:] = x[:, :-1].clone()
    x[:, 0] = x[:, 4]
    return x * k


def data_dependent(q, k, v):
    rows = q.sum(-1)[0].gt(0).nonzero()
    return attend(q @ k.mT, v) + rows.sum()


FIRES = {  # how many memories become values, how many regions there are, and the model
    "scores": (1, 1, scores_in_place),
    "scores by a view": (1, 1, heads_in_place),
    "weights without a softmax": (1, 1, weights_in_place),
    "an additive mask": (1, 1, mask_by_columns),
    "a mask of truths": (1, 1, mask_of_truths),
    "scores at an index": (1, 0, mask_by_index),
    "all columns": (1, 0, filled_columns),
    "reads between writes": (1, 0, read_between),
    "onto itself": (1, 0, shifted_onto_itself),
    "nonzero beside attention": (0, 1, data_dependent),
}


@torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("name", FIRES)
def test_values_and_gradients_are_eagers(name, dynamic):
    writes, regions, model = FIRES[name]
    inputs = [torch.randn(3, 5, 8, requires_grad=True) for _ in range(3)]
    torch._dynamo.reset()
    if dynamic:
        for x in inputs:
            torch._dynamo.mark_dynamic(x, 0)
    with nullcontext() if dynamic else without_inductor(), compiling({"strict": True}) as (report, backend):
        found = torch.compile(model, backend=backend)(*inputs)
    wanted = model(*inputs)
    seed = torch.randn_like(wanted)
    grads, expected = (torch.autograd.grad(y, inputs, seed, allow_unused=True) for y in (found, wanted))
    torch.testing.assert_close((found, *grads), (wanted, *expected), rtol=1e-4, atol=1e-5)
    assert outcome(report) == (writes, [])
    assert sum(len(graph.regions) for graph in report.graphs) == regions


def into_an_input(q, k, v):
    q[:, 0] = 1.0
    return q * k


def outputs_share(q, k, v):
    x = q + k
    x.mul_(2)
    return x, x.view(-1)


def through_detach(q, k, v):
    x = q * 2
    x.detach().mul_(3)
    return x * k


def without_gradients(q, k, v):
    x = q * 2
    with torch.no_grad():
        x.mul_(3)
    return x * k


def product_under_autocast(q, k, v):
    with torch.autocast("cpu", torch.bfloat16):
        return torch.zeros(3, 5, 5).baddbmm_(q, k.mT)


def random_numbers(q, k, v):
    return torch.zeros(3, 5, 8).uniform_(1, 1) * q


STAYS = {  # the refusals, and the model
    "an input": ([], into_an_input),
    "outputs that share memory": (["mul_ and view are outputs that share memory"], outputs_share),
    "data without its gradient": (
        ["a write through detach stays in place: no operator gives its result as a new tensor"],
        through_detach,
    ),
    "no_grad": (["mul_ writes without gradients to what may have some"], without_gradients),
    "autocast": (["autocast lets baddbmm compute in another dtype than baddbmm_"], product_under_autocast),
    "random numbers": (["uniform_ draws random numbers in place"], random_numbers),
}


@pytest.mark.parametrize("name", STAYS)
def test_what_stays_is_eagers_too(name):
    refusals, model = STAYS[name]
    inputs = [torch.randn(3, 5, 8).requires_grad_(model is not into_an_input) for _ in range(3)]
    torch._dynamo.reset()
    ours, theirs = ([x.detach().clone().requires_grad_(x.requires_grad) for x in inputs] for _ in range(2))
    with compiling({"strict": True}) as (report, backend):
        found, wanted = torch.compile(model, backend=backend)(*ours), model(*theirs)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(ours, theirs)
    if model is outputs_share:
        assert found[0].data_ptr() == found[1].data_ptr()
    elif inputs[0].requires_grad:
        grads = [
            torch.autograd.grad(y.sum(), xs, allow_unused=True) for y, xs in ((found, ours), (wanted, theirs))
        ]
        torch.testing.assert_close(*grads)
    assert outcome(report) == (0, refusals)


def outcome(report):
    """How many memories became values, and why others did not."""
    (graph,) = report.graphs
    (record,) = [r for p in graph.passes for r in p.rules if r.name == "functionalize"]
    return record.fired, [r.why for r in record.refused]
