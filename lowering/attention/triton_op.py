"""`recompile::attention_triton` and its backward: the attention op on a GPU, as kernels that Inductor inlines."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from recompile.lowering.attention import op, reference, triton_backward, triton_forward
from recompile.lowering.attention.spec import Attention
from recompile.lowering.attention.triton_frame import TRITON, Launch
from recompile.lowering.attention.triton_tile import Problem
from recompile.lowering.lookup.triton_module import load


@triton_op("recompile::attention_triton", mutates_args=())
def attention_triton(
    q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor], spec: str
) -> tuple[Tensor, Tensor]:
    """As `recompile::attention` (see `reference.forward`)."""
    parsed = Attention.parse(spec)
    if not _has_kernel(q, k, v):
        found, lse = reference.forward(q, k, v, extras, parsed)
        return reference.arrange(found, parsed.order), torch.stack([lse, torch.zeros_like(lse)], -1)
    problem = Problem(parsed, q, k, v, tuple(extras))
    out, lse = empty(q, k, v, parsed)
    _run(triton_forward.launch(problem, out, lse))
    return out, lse


@triton_op("recompile::attention_triton_backward", mutates_args=())
def attention_triton_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: list[Tensor],
    out: Tensor,
    lse: Tensor,
    spec: str,
    wanted: list[int],
) -> list[Tensor]:
    """As `recompile::attention_backward` (see `reference.backward`)."""
    parsed = Attention.parse(spec)
    if not _has_kernel(q, k, v):
        return reference.backward(grad, q, k, v, extras, out, lse.sum(-1), parsed, wanted)
    problem = Problem(parsed, q, k, v, tuple(extras))
    # In the softmax, a score's gradient is p * (g - delta).
    delta = (grad.float() * out.float()).sum(-1) if parsed.softmax else lse
    buffers = triton_backward.buffers(problem, wanted)
    for launch in triton_backward.launches(problem, grad, lse, delta, buffers):
        _run(launch)
    like = {"q": q, "k": k, "v": v} | {parsed.extras[e]: extras[e] for e in wanted}
    return [buffers[name].to(x.dtype) for name, x in like.items()]


def empty(q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> tuple[Tensor, Tensor]:
    """The outputs, not yet filled. Under a softmax the second is two numbers a row, whose sum is what the reference
    returns (see `triton_forward`)."""
    out, lse = op.empty(q, k, v, spec)
    return out, lse.new_empty((*lse.shape, 2))


def _fake(q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    return empty(q, k, v, Attention.parse(spec))


def _has_kernel(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernels know the dtype, and there is something to compute."""
    known = q.dtype in TRITON and q.dtype == k.dtype == v.dtype
    return known and not _is_empty(q, k, v)


def _is_empty(*tensors: Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for x in tensors for size in x.shape)


def _run(launch: Launch) -> None:
    kernel: Any = getattr(load(launch.source), launch.name)
    assert isinstance(kernel, Autotuner)
    if isinstance(kernel.fn, JITFunction):  # else Triton's interpreter runs it
        kernel = wrap_triton(kernel)
    kernel[launch.grid](**launch.arguments)


attention_triton.register_fake(_fake)
attention_triton_backward.register_fake(op.fake_backward)
attention_triton.register_autograd(
    op.differentiate("attention_triton_backward"), setup_context=op.save_for_backward
)
