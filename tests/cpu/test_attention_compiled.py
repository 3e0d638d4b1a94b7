"""From a plain model to the generated kernel: compiled attention against eager in float64."""

import re

import pytest
import torch
from torch._inductor.utils import run_and_get_code

from benchmarks.models.attention import Causal, Hstu

N = 37  # no other size of these models


def _hstu() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return Hstu(2, N, 2, 16), (torch.randint(0, 10**5, (2, N + 1)).cumsum(1),)


def _padded() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    return Causal(3, N, 2, 16), (torch.tensor([N, 5, 0]),)


def _score_sized(code: str) -> list[str]:
    sizes = re.findall(r"empty_strided\w*\(\(([^)]*)\)", code)
    return [size for size in sizes if size.replace(" ", "").split(",").count(str(N)) > 1]


@pytest.mark.parametrize("build", [_hstu, _padded])
def test_training_equals_eager_and_holds_no_scores(build):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, given = build()
    compiled = torch.compile(model, backend="recompile")

    def step() -> torch.Tensor:
        out = compiled(*given)
        out.square().sum().backward()
        return out.detach()

    out, programs = run_and_get_code(step)
    code = "\n".join(programs)
    assert "cpp_attention" in code and _score_sized(code) == []
    found = [p.grad.double() for p in model.parameters()]
    model.zero_grad()
    model.double()
    expected = model(*given)
    expected.square().sum().backward()
    # float32 sums of 37 products; gradients relative to the largest of their tensor
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    for actual, parameter in zip(found, model.parameters(), strict=True):
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(actual / scale, parameter.grad / scale, rtol=1e-4, atol=1e-5)


class Buckets(torch.nn.Module):
    """A time bias whose buckets are as wide as a tensor says."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("width", torch.tensor(41.0))  # 41 * (1 / 41) is less than 1 in float32
        self.bias = torch.nn.Parameter(torch.arange(40.0))

    def forward(self, x: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        apart = (times[:, :, None] - times[:, None]).abs()
        weights = torch.sigmoid(x @ x.mT + self.bias[(apart / self.width).long()] - 20)
        return weights @ x


def test_a_bucket_at_its_border_is_eagers():
    torch._dynamo.reset()
    model, x, times = Buckets(), torch.randn(2, N, 8) / 8, 41 * torch.arange(N).repeat(2, 1)
    with torch.no_grad():
        found, (code,) = run_and_get_code(torch.compile(model, backend="recompile"), x, times)
        torch.testing.assert_close(found, model(x, times), rtol=1e-4, atol=1e-5)
    assert "cpp_attention" in code
