"""`torch.ops.recompile.attention` and its backward: schemas, shape functions, autograd, reference kernels; the ops of
other devices share them."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recompile.lowering.attention import reference
from recompile.lowering.attention.spec import Attention

_library: Any = torch.library.Library("recompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("attention(Tensor q, Tensor k, Tensor v, Tensor[] extras, str spec) -> (Tensor, Tensor)")
_library.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor[] extras, Tensor out, Tensor lse,"
    " str spec, int[] wanted) -> Tensor[]"
)


def _attention(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    parsed = Attention.parse(spec)
    out, lse = reference.forward(q, k, v, extras, parsed)
    return reference.arrange(out, parsed.order), lse


def _attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], out: Tensor, lse: Tensor,
    spec: str, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    return reference.backward(grad, q, k, v, extras, out, lse, Attention.parse(spec), wanted)


def batch_shape(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """The batch dims of the output: each is that of the first tensor that does not broadcast it."""
    return tuple(
        next((size for size in sizes if not (isinstance(size, int) and size == 1)), 1)
        for sizes in zip(q[:-2], k[:-2], v[:-2], strict=True)
    )


def empty(q: Tensor, k: Tensor, v: Tensor, spec: Attention) -> tuple[Tensor, Tensor]:
    """The outputs, not yet filled."""
    shape = (*batch_shape(q.shape, k.shape, v.shape), q.shape[-2], v.shape[-1])
    order = spec.order or tuple(range(len(shape)))
    out = q.new_empty([shape[k] for k in order])
    inverse = sorted(range(len(order)), key=lambda k: order[k])
    rows = shape[:-1] if spec.softmax else (0,)
    return out.permute(inverse), q.new_empty(rows, dtype=torch.promote_types(q.dtype, torch.float32))


def fake(q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: str) -> tuple[Tensor, Tensor]:
    """The shape function of every attention op."""
    return empty(q, k, v, Attention.parse(spec))


def fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], out: Tensor, lse: Tensor,
    spec: str, wanted: Sequence[int],
) -> list[Tensor]:  # fmt: skip
    """The shape function of every backward op."""
    return [x.new_empty(x.shape) for x in (q, k, v, *(extras[e] for e in wanted))]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what `differentiate` needs."""
    q, k, v, extras, ctx.spec = inputs
    out, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.save_for_backward(q, k, v, *extras, out, lse)


def differentiate(backward: str) -> Callable[..., tuple[Any, ...]]:
    """The autograd formula of an attention op whose gradients the op `recompile::<backward>` computes."""

    def formula(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
        q, k, v, *extras, out, lse = ctx.saved_tensors
        wanted = [e for e, needed in enumerate(ctx.needs_input_grad[3]) if needed]
        compute = getattr(torch.ops.recompile, backward)
        found = compute(grad, q, k, v, extras, out, lse, ctx.spec, wanted)
        by_extra: list[Tensor | None] = [None] * len(extras)
        for e, gradient in zip(wanted, found[3:], strict=True):
            by_extra[e] = gradient
        return found[0], found[1], found[2], by_extra, None

    return formula


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("recompile::attention", fake, lib=_library)
torch.library.register_fake("recompile::attention_backward", fake_backward, lib=_library)
torch.library.register_autograd(
    "recompile::attention",
    differentiate("attention_backward"),
    setup_context=save_for_backward,
    lib=_library,
)

ATTENTION = torch.ops.recompile.attention.default
ATTENTION_BACKWARD = torch.ops.recompile.attention_backward.default


def op_for(device_type: str) -> torch._ops.OpOverload | None:
    """The attention op of such a device; None where there is none ("cuda" without Triton)."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        importlib.import_module(
            "recompile.lowering.attention.triton_op"
        )  # registers it; imports Triton, 0.3 s
        return torch.ops.recompile.attention_triton.default
    return ATTENTION if device_type == "cpu" else None
