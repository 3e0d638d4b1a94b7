"""How Inductor lowers `recompile::attention` on the CPU: to the generated C++ of `cpp.py` and `cpp_backward.py`."""

from typing import Any

import sympy
import torch
from torch._inductor.cpu_vec_isa import pick_vec_isa
from torch._inductor.lowering import empty_strided, fallback_handler, register_lowering

from recompile.lowering.attention import cpp, cpp_backward, op
from recompile.lowering.attention.spec import Attention
from recompile.lowering.inductor import CppRegion, empty

_REAL = (torch.float32, torch.bfloat16, torch.float16)


@register_lowering(op.ATTENTION, type_promotion_kind=None)
def _attention(q: Any, k: Any, v: Any, extras: list[Any], spec: str) -> tuple[Any, Any]:
    parsed = Attention.parse(spec)
    if not _has_kernel(parsed, [q, k, v], extras):
        found: tuple[Any, Any] = _fallback(op.ATTENTION)(q, k, v, extras, spec)
        return found
    batch = op.batch_shape(*(_sizes(x) for x in (q, k, v)))
    shape = [*batch, q.get_size()[-2], v.get_size()[-1]]
    out = _empty(shape, parsed.order, q)
    rows = shape[:-1] if parsed.softmax else [0]
    lse = empty(rows, torch.float32, q.get_device())

    def render(inputs: Any, outputs: Any, threads: int) -> tuple[str, str]:
        q, k, v, *others = inputs
        return cpp.forward(parsed, q, k, v, others, outputs[0], outputs[-1], threads)

    CppRegion("attention", spec, [q, k, v, *extras], [out, lse] if parsed.softmax else [out], render)
    return out, lse


@register_lowering(op.ATTENTION_BACKWARD, type_promotion_kind=None)
def _attention_backward(
    grad: Any, q: Any, k: Any, v: Any, extras: list[Any], out: Any, lse: Any, spec: str, wanted: list[int]
) -> list[Any]:
    parsed = Attention.parse(spec)
    if not _has_kernel(parsed, [grad, q, k, v, out], extras):
        return list(_fallback(op.ATTENTION_BACKWARD)(grad, q, k, v, extras, out, lse, spec, wanted))
    found = [
        empty(x.get_size(), x.get_dtype(), x.get_device()) for x in (q, k, v, *(extras[e] for e in wanted))
    ]

    def render(inputs: Any, outputs: Any, threads: int) -> tuple[str, str]:
        grad, q, k, v, out, lse, *others = inputs
        given = cpp_backward.Given(grad, q, k, v, others, out, lse)
        return cpp_backward.backward(parsed, given, outputs, wanted, threads)

    CppRegion("attention_backward", spec, [grad, q, k, v, out, lse, *extras], found, render)
    return found


def _fallback(overload: Any) -> Any:
    """The reference as an extern kernel."""
    return fallback_handler(overload, add_to_fallback_set=False)  # type: ignore[no-untyped-call]


def _sizes(x: Any) -> list[Any]:
    """The sizes of a tensor, known ones as int."""
    return [int(size) if isinstance(size, sympy.Integer) else size for size in x.get_size()]


def _has_kernel(spec: Attention, tensors: list[Any], extras: list[Any]) -> bool:
    reals = [*tensors, *(x for name, x in zip(spec.extras, extras, strict=True) if name[0] != "n")]
    same = len({x.get_dtype() for x in tensors}) == 1
    on_cpu = all(x.get_device().type == "cpu" for x in [*tensors, *extras])
    return same and on_cpu and bool(pick_vec_isa()) and all(x.get_dtype() in _REAL for x in reals)


def _empty(shape: list[Any], order: tuple[int, ...], like: Any) -> Any:
    """A buffer of this shape, laid out with the dims of `order` from the outermost to the innermost."""
    strides: dict[int, Any] = {}
    step: Any = 1
    for dim in reversed(order or range(len(shape))):
        strides[dim], step = step, step * shape[dim]
    return empty_strided(
        shape, [strides[d] for d in range(len(shape))], dtype=like.get_dtype(), device=like.get_device()
    )
