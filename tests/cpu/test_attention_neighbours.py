"""Attention and what it is easily confused by: detached operands, products of its own output, floor division."""

from contextlib import nullcontext

import pytest
import torch

import recompile
from tests.capturing import without_inductor

torch.manual_seed(0)
MASK = torch.tensor([[1.0, 1, 0, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 0]])
TIMES = torch.randint(0, 20, (3, 5))


def attend(scores, v):
    return torch.softmax(scores, -1) @ v


def by_hand(largest):
    def model(q, k, v):
        scores = q @ k.mT
        e = torch.exp(scores - largest(scores))
        return (e / e.sum(-1, keepdim=True)) @ v

    return model


def twice(q, k, v):
    out = attend(q @ k.mT, v)
    out = attend(out @ k.mT, v)
    return out @ out.mT


def residual(q, k, v):
    out = q + attend(q @ k.mT, v)
    return out + attend(out @ out.mT, out)


def bucketed(q, k, v):
    apart = (TIMES[:, :, None] - TIMES[:, None]) // 3
    return attend(q @ k.mT + torch.arange(7.0)[apart.clamp(-3, 3) + 3], v)


def filled(q, k, v):
    return attend((q @ k.mT).masked_fill(MASK[:, None] == 0, torch.finfo(q.dtype).min), v)


CASES = {  # the regions expected, and the model
    "keys without gradient": (1, lambda q, k, v: attend(q @ k.detach().mT, v)),
    "values without gradient": (1, lambda q, k, v: attend(q @ k.mT, v.detach())),
    "a bias without gradient": (1, lambda q, k, v: attend(q @ k.mT + q.sum(-1)[:, None].detach(), v)),
    "scores without gradient": (0, lambda q, k, v: attend((q @ k.mT).detach(), v) + q),
    "half the scores without gradient": (0, lambda q, k, v: attend(q @ k.mT + (q @ k.mT).detach(), v)),
    "a result without gradient": (1, lambda q, k, v: attend(q @ k.mT, v).detach() * q),
    "by hand, max().values": (1, by_hand(lambda s: s.max(-1, keepdim=True).values)),
    "by hand, max()[0], detached": (1, by_hand(lambda s: s.max(dim=2)[0].unsqueeze(-1).detach())),
    "by hand, amax, detached": (1, by_hand(lambda s: s.amax(-1, keepdim=True).detach())),
    "then a masked sum": (1, lambda q, k, v: (attend(q @ k.mT, v) * MASK[..., None]).sum(1)),
    "then a product with a mask": (
        1,
        lambda q, k, v: torch.bmm(MASK[:, None].to(q.dtype), attend(q @ k.mT, v)),
    ),
    "twice without projections, then pairs": (2, twice),
    "twice with residuals": (2, residual),
    "times in buckets of three": (1, bucketed),
    "rows of the smallest number": (1, filled),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_eagers(name, dtype):
    expected, model = CASES[name]
    inputs = [torch.randn(3, 5, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="recompile", options={"strict": True})
    with nullcontext() if dtype is torch.float32 else without_inductor():  # there is no kernel for float64
        found = compiled(*inputs)
    wanted = model(*doubles)
    seed = torch.randn_like(wanted)
    found_grads = torch.autograd.grad(found, inputs, seed.to(dtype), materialize_grads=True)
    wanted_grads = torch.autograd.grad(wanted, doubles, seed, materialize_grads=True)
    # Against float64: float32 rounds 8-term products and softmaxes at 1e-6 here, two of them at 1e-5.
    allowed = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for a, b in zip((found, *found_grads), (wanted, *wanted_grads), strict=True):
        torch.testing.assert_close(a.double(), b, **allowed)
    assert sum(len(graph.regions) for graph in recompile.explain(model, *inputs).graphs) == expected
