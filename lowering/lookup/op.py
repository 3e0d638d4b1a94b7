"""`torch.ops.recompile.lookup` and its backward: schemas, shape functions, autograd, reference kernels; the ops
of other devices share them."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recompile.lowering.lookup import reference
from recompile.lowering.lookup.spec import Lookup, Output

_library: Any = torch.library.Library("recompile", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define("lookup(Tensor[] weights, Tensor[] sources, str spec) -> Tensor[]")
_library.define(
    "lookup_backward(Tensor[] grads, Tensor[] weights, Tensor[] sources, str spec, int[] tables, int[] loads)"
    " -> Tensor[]"
)


def _lookup(weights: Sequence[Tensor], sources: Sequence[Tensor], spec: str) -> list[Tensor]:
    return reference.forward(weights, sources, Lookup.parse(spec))


def _lookup_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    spec: str,
    tables: Sequence[int],
    loads: Sequence[int],
) -> list[Tensor]:
    return reference.backward(grads, weights, sources, Lookup.parse(spec), tables, loads)


_library.impl("lookup", _lookup, "CompositeExplicitAutograd")
_library.impl("lookup_backward", _lookup_backward, "CompositeExplicitAutograd")


def output_width(out: Output, spec: Lookup, sources: Sequence[Tensor]) -> int:
    """Columns of an output."""
    return out.width or sum(reference.part_width(p, spec, sources) for p in out.parts)


def batch(spec: Lookup, sources: Sequence[Tensor]) -> int:
    """The number of samples."""
    first = spec.bags[0]
    if first.offsets < 0:
        return sources[first.loads[0]].shape[0]
    return sources[first.offsets].shape[0] - int(first.include_last_offset)


def output_dtype(
    out: Output, spec: Lookup, weights: Sequence[Tensor], sources: Sequence[Tensor]
) -> torch.dtype:
    """What `torch.cat` of an output's parts would have."""
    dtypes = [
        spec.bags[p].value_dtype(weights[spec.bags[p].table].dtype) if p >= 0 else sources[~p].dtype
        for p in out.parts
    ]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


def fake(weights: Sequence[Tensor], sources: Sequence[Tensor], spec: str) -> list[Tensor]:
    """The shape function of every lookup op."""
    group = Lookup.parse(spec)
    return [
        weights[0].new_empty(
            (batch(group, sources), output_width(out, group, sources)),
            dtype=output_dtype(out, group, weights, sources),
        )
        for out in group.outputs
    ]


def fake_backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    spec: str,
    tables: Sequence[int],
    loads: Sequence[int],
) -> list[Tensor]:
    """The shape function of every backward op."""
    like = [*(weights[t] for t in tables), *(sources[s] for s in loads)]
    return [x.new_empty(x.shape) for x in like]


def save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keeps what `differentiate` needs: the inputs."""
    weights, sources, spec = inputs
    ctx.tables, ctx.spec = len(weights), spec
    ctx.save_for_backward(*weights, *sources)


def differentiate(backward: str) -> Callable[..., tuple[Any, ...]]:
    """The autograd formula of a lookup op whose gradients the op `recompile::<backward>` computes."""

    def formula(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
        weights, sources = ctx.saved_tensors[: ctx.tables], ctx.saved_tensors[ctx.tables :]
        spec = Lookup.parse(ctx.spec)
        wanted = ctx.needs_input_grad
        tables = [t for t, needed in enumerate(wanted[0]) if needed]
        weighting = {bag.weight_load for bag in spec.bags if bag.weight}
        loads = [s for s, needed in enumerate(wanted[1]) if needed and s in weighting]
        kept = [o for o, g in enumerate(grads) if g is not None]
        part = Lookup(spec.tables, spec.bags, tuple(spec.outputs[o] for o in kept))
        given = [grads[o] for o in kept]
        found = getattr(torch.ops.recompile, backward)(given, weights, sources, str(part), tables, loads)
        by_table: list[Tensor | None] = [None] * len(weights)
        by_source: list[Tensor | None] = [None] * len(sources)
        for t, g in zip(tables, found, strict=False):
            by_table[t] = g
        for s, g in zip(loads, found[len(tables) :], strict=True):
            by_source[s] = g
        copied = {~p for out in part.outputs for p in out.parts}
        for s, needed in enumerate(wanted[1]):
            if needed and s in copied:
                weighed, grad = by_source[s], _copied(s, given, part, sources)
                by_source[s] = grad if weighed is None else weighed + grad
        return by_table, by_source, None

    return formula


def _copied(source: int, grads: Sequence[Any], spec: Lookup, sources: Sequence[Tensor]) -> Tensor:
    """The gradient of a source that outputs copy or sum."""
    x = sources[source]
    flat = reference.flat(x)
    total = torch.zeros_like(flat)
    for out, grad in zip(spec.outputs, grads, strict=True):
        column = 0
        for p in out.parts:
            wide = reference.part_width(p, spec, sources)
            if p == ~source:
                total = total + reference.through(out, grad, column, wide, lambda: flat).to(total.dtype)
            column += wide
    return total.reshape(x.shape)


torch.library.register_fake("recompile::lookup", fake, lib=_library)
torch.library.register_fake("recompile::lookup_backward", fake_backward, lib=_library)
torch.library.register_autograd(
    "recompile::lookup", differentiate("lookup_backward"), setup_context=save_for_backward, lib=_library
)

LOOKUP = torch.ops.recompile.lookup.default
LOOKUP_BACKWARD = torch.ops.recompile.lookup_backward.default


def op_for(device_type: str) -> torch._ops.OpOverload | None:
    """The lookup op whose tables are on such a device; None where there is none ("cuda" without Triton)."""
    if device_type == "cuda" and importlib.util.find_spec("triton"):
        importlib.import_module("recompile.lowering.lookup.triton_op")  # registers it; imports Triton, 0.3 s
        return torch.ops.recompile.lookup_triton.default
    return LOOKUP if device_type == "cpu" else None


def is_lookup(target: object) -> bool:
    """Whether a node with this target is a lookup op, on any device."""
    return str(target) in ("recompile.lookup.default", "recompile.lookup_triton.default")
