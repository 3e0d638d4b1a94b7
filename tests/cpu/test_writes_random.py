"""Random programs of views, writes and reads: what `functionalize` and `canonicalize` leave computes the same."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recompile import testing

VIEWS = (
    lambda x: x[1],
    lambda x: x[:, 1:3],
    lambda x: x[..., -1],
    lambda x: x[::2],
    lambda x: x.transpose(0, 1),
    lambda x: x.view(-1),
    lambda x: x.unsqueeze(1),
    lambda x: x.diagonal(0, 0, 1),
    lambda x: x.narrow(0, 0, 2),
    lambda x: x.flatten().view(x.shape),
)
WRITES = (
    lambda x, other: x.mul_(2),
    lambda x, other: x.add_(other.sum()),
    lambda x, other: x.copy_(other.mean()),
    lambda x, other: x.fill_(3.0),
    lambda x, other: x.zero_(),
    lambda x, other: x.masked_fill_(x > 0.5, -1.0),
    lambda x, other: x.__setitem__(0, 7.0),
    lambda x, other: x.__setitem__((..., slice(1, None)), 0.5),
    lambda x, other: x.__setitem__(x < 0, other.max()),
    lambda x, other: x.clamp_(-1, 1).sub_(0.25),
)
places = st.integers(0, 9)
STEPS = st.lists(st.tuples(st.sampled_from(("view", "write", "read")), places, places, places), max_size=9)


def run(steps, q, k):
    """Each step takes a view of, writes into, or reads one of the tensors so far."""
    held, read = [q * 2, k + 1], []
    for what, which, how, other in steps:
        x, y = held[which % len(held)], held[other % len(held)]
        if what == "view":
            held.append(VIEWS[how](x))
        elif what == "write":
            WRITES[how](x, y)
        else:
            read.append(x.sum() * (how + 1) + x.flatten()[0])
    return torch.stack([x.sin().sum() for x in held] + read)


def possible(steps, q, k):
    """The steps without those that eager refuses: too few dims, a write into what a gradient needs, ..."""
    kept = []
    for step in steps:
        inputs = [x.clone().requires_grad_() for x in (q, k)]
        try:
            run([*kept, step], *inputs).sum().backward()
        except (IndexError, RuntimeError):
            continue
        kept.append(step)
    return kept


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(steps=STEPS)
def test_the_rewritten_graph_computes_what_eager_does(steps):
    torch.manual_seed(0)
    q, k = (torch.randn(4, 4, 4, dtype=torch.float64) for _ in range(2))
    steps = possible(steps, q, k)
    torch._dynamo.reset()
    gm = testing.capture(lambda q, k: run(steps, q, k), q, k)
    ours, theirs = ([x.clone().requires_grad_() for x in (q, k)] for _ in range(2))
    (found,), wanted = gm(*[ours[0 if "q" in n.name else 1] for n in inputs_of(gm)]), run(steps, *theirs)
    torch.testing.assert_close(found, wanted)
    if found.requires_grad:
        seed = torch.arange(1.0, len(wanted) + 1, dtype=torch.float64)
        grads = [
            torch.autograd.grad(y, xs, seed, allow_unused=True, materialize_grads=True)
            for y, xs in ((found, ours), (wanted, theirs))
        ]
        torch.testing.assert_close(*grads)


def inputs_of(gm):
    return [n for n in gm.graph.nodes if n.op == "placeholder"]
