"""`torch.ops.recompile.lookup` and its backward: schemas, shape functions, autograd, reference kernels."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recompile.lowering.lookup import reference
from recompile.lowering.lookup.spec import Lookup, Output

_library = torch.library.Library("recompile", "FRAGMENT")
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
    return out.width or sum(
        reference.width(spec.bags[p], spec, sources) if p >= 0 else sources[~p][0].numel() for p in out.parts
    )


def batch(spec: Lookup, sources: Sequence[Tensor]) -> int:
    """The number of samples."""
    first = spec.bags[0]
    if first.offsets < 0:
        return sources[first.loads[0]].shape[0]
    return sources[first.offsets].shape[0] - int(first.include_last_offset)


def _dtype(out: Output, spec: Lookup, weights: Sequence[Tensor], sources: Sequence[Tensor]) -> torch.dtype:
    dtypes = [weights[spec.bags[p].table].dtype if p >= 0 else sources[~p].dtype for p in out.parts]
    result = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result


@torch.library.register_fake("recompile::lookup", lib=_library)
def _(weights: Sequence[Tensor], sources: Sequence[Tensor], spec: str) -> list[Tensor]:
    group = Lookup.parse(spec)
    return [
        weights[0].new_empty(
            (batch(group, sources), output_width(out, group, sources)),
            dtype=_dtype(out, group, weights, sources),
        )
        for out in group.outputs
    ]


@torch.library.register_fake("recompile::lookup_backward", lib=_library)
def _(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    spec: str,
    tables: Sequence[int],
    loads: Sequence[int],
) -> list[Tensor]:
    like = [*(weights[t] for t in tables), *(sources[s] for s in loads)]
    return [x.new_empty(x.shape) for x in like]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    weights, sources, spec = inputs
    ctx.tables, ctx.spec = len(weights), spec
    ctx.save_for_backward(*weights, *sources)


def _differentiate(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Any, ...]:
    weights, sources = ctx.saved_tensors[: ctx.tables], ctx.saved_tensors[ctx.tables :]
    spec = Lookup.parse(ctx.spec)
    wanted = ctx.needs_input_grad
    tables = [t for t, needed in enumerate(wanted[0]) if needed]
    weighting = {bag.loads[1] for bag in spec.bags if bag.weight}
    loads = [s for s, needed in enumerate(wanted[1]) if needed and s in weighting]
    kept = [o for o, g in enumerate(grads) if g is not None]
    part = Lookup(spec.tables, spec.bags, tuple(spec.outputs[o] for o in kept))
    given = [grads[o] for o in kept]
    found = torch.ops.recompile.lookup_backward(given, weights, sources, str(part), tables, loads)
    by_table: list[Tensor | None] = [None] * len(weights)
    by_source: list[Tensor | None] = [None] * len(sources)
    for t, g in zip(tables, found, strict=False):
        by_table[t] = g
    for s, g in zip(loads, found[len(tables) :], strict=True):
        by_source[s] = g
    for s, needed in enumerate(wanted[1]):
        if needed and s not in weighting:
            by_source[s] = _copied(s, given, part, sources)
    return by_table, by_source, None


def _copied(source: int, grads: Sequence[Any], spec: Lookup, sources: Sequence[Tensor]) -> Tensor:
    """The gradient of a source that outputs copy: the columns it was copied to."""
    total = torch.zeros_like(sources[source])
    for out, grad in zip(spec.outputs, grads, strict=True):
        column = 0
        for p in out.parts:
            wide = reference.width(spec.bags[p], spec, sources) if p >= 0 else sources[~p][0].numel()
            if p == ~source:
                total = total + grad[:, column : column + wide].reshape(total.shape).to(total.dtype)
            column += wide
    return total


torch.library.register_autograd("recompile::lookup", _differentiate, setup_context=_setup, lib=_library)

LOOKUP = torch.ops.recompile.lookup.default
LOOKUP_BACKWARD = torch.ops.recompile.lookup_backward.default
