"""Random programs between two contractions: what the pass reads off the graph is what eager computes.

Nothing is compiled: the region op runs as its reference, in float64, with gradients.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from recompile.testing import assert_rewritten_same

SIZES = st.sampled_from([1, 2, 3, 5, 7])
Step = Callable[[Tensor, "Program"], Tensor]


def _positions(scores: Tensor) -> tuple[Tensor, Tensor]:
    return torch.arange(scores.shape[-2])[:, None], torch.arange(scores.shape[-1])[None, :]


def _causal(scores: Tensor) -> Tensor:
    i, j = _positions(scores)
    return j <= i + 1


def _padding(scores: Tensor, program: "Program") -> Tensor:
    return (torch.arange(scores.shape[-1]) < program.lengths[:, None])[:, None, None]


BEFORE: dict[str, Step] = {
    "scale": lambda s, p: s * 0.37,
    "divide": lambda s, p: s / 1.7,
    "shift": lambda s, p: s - 0.25,
    "rsub": lambda s, p: 1.5 - s,
    "tanh": lambda s, p: 2.0 * torch.tanh(s / 2.0),
    "sigmoid": lambda s, p: torch.sigmoid(s),
    "silu": lambda s, p: F.silu(s),
    "relu": lambda s, p: F.relu(s),
    "leaky": lambda s, p: F.leaky_relu(s, 0.2),
    "clamp": lambda s, p: s.clamp(min=-1.0, max=1.5),
    "square": lambda s, p: s.pow(2),
    "abs": lambda s, p: s.abs(),
    "full bias": lambda s, p: s + p.bias,
    "key bias": lambda s, p: s + p.bias[:1],
    "query scale": lambda s, p: s * p.bias[:, :1],
    "table": lambda s, p: s + p.table[_positions(s)[0] - _positions(s)[1] + s.shape[-1] - 1],
    "distance": lambda s, p: s - 0.1 * (_positions(s)[0] - _positions(s)[1]).abs(),
    "causal": lambda s, p: s.masked_fill(~_causal(s), -1e9),
    "padding": lambda s, p: torch.where(_padding(s, p), s, -1e9),
    "additive": lambda s, p: s + (1.0 - _padding(s, p).double()) * -10000.0,
    "zeroed": lambda s, p: s * _causal(s),
}
AFTER = ("scale", "query scale", "zeroed")  # of a softmax' result, or of a weight: what keeps it linear
ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda s: s.softmax(-1),
    "by hand": lambda s: (
        (s - s.amax(-1, keepdim=True)).exp() / (s - s.amax(-1, keepdim=True)).exp().sum(-1, True)
    ),
    "silu": F.silu,
    "sigmoid": lambda s: s.sigmoid(),
    "relu squared": lambda s: F.relu(s) ** 2,
}


class Program(nn.Module):
    """q k^T, some steps, an end, a step after it, times v."""

    def __init__(self, m: int, n: int, before: list[str], end: str, after: list[str]) -> None:
        super().__init__()
        torch.manual_seed(m * 100 + n)
        real = torch.float64
        self.q, self.k, self.v = (nn.Parameter(torch.randn(2, 2, size, 4, dtype=real)) for size in (m, n, n))
        self.bias = nn.Parameter(torch.randn(m, n, dtype=real))
        self.table = nn.Parameter(torch.randn(m + n, dtype=real))
        self.before, self.end, self.after = before, end, after
        self.lengths = torch.tensor([n, 0])

    def forward(self, lengths: Tensor) -> Tensor:
        self.lengths = lengths
        weights = self.q @ self.k.transpose(-2, -1)
        for name in self.before:
            weights = BEFORE[name](weights, self)
        weights = ENDS[self.end](weights)
        for name in self.after:
            weights = BEFORE[name](weights, self)
        return weights @ self.v


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    m=SIZES,
    n=SIZES,
    before=st.lists(st.sampled_from(list(BEFORE)), max_size=4, unique=True),
    end=st.sampled_from(list(ENDS)),
    after=st.lists(st.sampled_from(AFTER), max_size=2),
)
def test_random_programs_equal_eager(m: int, n: int, before: list[str], end: str, after: list[str]):
    torch._dynamo.reset()
    model = Program(m, n, before, end, after)
    graph, record = assert_rewritten_same(model, (torch.tensor([n, 0]),))
    fired = [node for node in graph.nodes if "recompile.attention" in str(node.target)]
    refused = [r.why for p in record.passes for rule in p.rules for r in rule.refused]
    assert fired or refused or n == 1, "neither rewritten nor refused"
