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
