"""A user's Triton launch as the compiler sees it, without a GPU: the region becomes it, forward and backward."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from recompile.lowering import Region, region

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from torch.library import wrap_triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402


class Hopper:
    """A driver that only says what it would drive: enough to find out what a kernel writes."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


@triton.jit
def tripled_kernel(x, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, 3 * tl.load(x + at, mask=at < n), mask=at < n)


def launch(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    wrap_triton(tripled_kernel)[(triton.cdiv(x.numel(), 256),)](x, out, x.numel(), BLOCK=256)
    return out


@region(triton=lambda grad, x: launch(grad))
def tripled_backward(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient."""
    return 3 * grad


@region(triton=launch, backward=tripled_backward)
def tripled(x: Tensor) -> Tensor:
    """Three times x."""
    return 3 * x


def traced(found):
    """A compiler that keeps the targets of each graph, and runs the graph with copies for launches."""

    def copies(*, kwargs, tensors_to_clone, **_):
        return {name: kwargs[name].clone() for name in tensors_to_clone}

    def keep(gm, inputs):
        found.append([str(node.target) for node in gm.graph.nodes if node.op == "call_function"])
        for node in gm.graph.nodes:
            if node.target is torch.ops.higher_order.triton_kernel_wrapper_functional:
                node.target = copies
        gm.recompile()
        return gm.forward

    return aot_autograd(fw_compiler=keep, bw_compiler=keep)


def targets():
    """What the region is in the forward's and the backward's graph."""
    torch._dynamo.reset()
    found = []
    x = torch.randn(5, requires_grad=True)
    torch.compile(lambda x: tripled.op(x, tripled.spec()), backend=traced(found))(x).sum().backward()
    return found


def test_on_a_gpu_it_is_the_launch(monkeypatch):
    monkeypatch.setattr(triton.runtime.driver, "_active", Hopper())
    monkeypatch.setattr(Region, "has_triton", lambda self, tensors: self.triton is not None)
    forward, backward = targets()
    assert "triton_kernel_wrapper_functional" in forward and "recompile.tripled.default" not in forward
    assert "triton_kernel_wrapper_functional" in backward


def test_elsewhere_it_is_the_reference():
    forward, backward = targets()
    assert forward == ["aten.mul.Tensor"] and "aten.mul.Tensor" in backward
    assert not any("triton" in target for target in (*forward, *backward))
