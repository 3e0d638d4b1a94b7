"""How Inductor lowers `recompile::lookup` on the CPU: to the generated C++ of `cpp.py`."""

import math
from typing import Any

import torch
from torch._inductor.lowering import register_lowering

from recompile.lowering.inductor import CppRegion, dense_rows, empty
from recompile.lowering.lookup import cpp, cpp_backward, op
from recompile.lowering.lookup.spec import Lookup


@register_lowering(op.LOOKUP, type_promotion_kind=None)
def _lookup(weights: list[Any], sources: list[Any], spec: str) -> list[Any]:
    group = Lookup.parse(spec)
    device = weights[0].get_device()
    size = _batch(group, sources)
    outs = [
        empty(
            [size, out.width or sum(_width(p, group, sources) for p in out.parts)],
            _dtype(out, group, weights, sources),
            device,
        )
        for out in group.outputs
    ]

    copied = {~p for out in group.outputs for p in out.parts if p < 0}
    sources = [dense_rows(x) if s in copied else x for s, x in enumerate(sources)]
    weights = [dense_rows(x) for x in weights]

    def render(inputs: Any, outputs: Any, threads: int) -> tuple[str, str]:
        tables, loaded = inputs[: len(weights)], inputs[len(weights) :]
        return cpp.forward(group, tables, loaded, outputs, outputs[0].sizes[0], threads)

    CppRegion("lookup", spec, [*weights, *sources], outs, render)
    return outs


@register_lowering(op.LOOKUP_BACKWARD, type_promotion_kind=None)
def _lookup_backward(
    grads: list[Any], weights: list[Any], sources: list[Any], spec: str, tables: list[int], loads: list[int]
) -> list[Any]:
    group = Lookup.parse(spec)
    like = [*(weights[t] for t in tables), *(sources[s] for s in loads)]
    outs = [empty(x.get_size(), x.get_dtype(), x.get_device()) for x in like]

    def render(inputs: Any, outputs: Any, threads: int) -> tuple[str, str]:
        given, rest = inputs[: len(grads)], inputs[len(grads) :]
        held, loaded = rest[: len(weights)], rest[len(weights) :]
        rows = dict(zip(tables, outputs, strict=False))
        weighted = dict(zip(loads, outputs[len(tables) :], strict=True))
        return cpp_backward.backward(group, given, held, loaded, rows, weighted, threads)

    if outs:
        dense = [dense_rows(x) for x in (*grads, *weights)]
        CppRegion("lookup_backward", spec, [*dense, *sources], outs, render)
    return outs


def _batch(group: Lookup, sources: list[Any]) -> Any:
    first = group.bags[0]
    if first.offsets < 0:
        return sources[first.loads[0]].get_size()[0]
    return sources[first.offsets].get_size()[0] - int(first.include_last_offset)


def _width(part: int, group: Lookup, sources: list[Any]) -> Any:
    if part < 0:
        return math.prod(sources[~part].get_size()[1:])
    bag = group.bags[part]
    dim, size = group.tables[bag.table].dim, sources[bag.loads[0]].get_size()
    return dim * size[1] if bag.pooling == "none" and len(size) == 2 else dim


def _dtype(out: Any, group: Lookup, weights: list[Any], sources: list[Any]) -> torch.dtype:
    found = [
        group.bags[p].value_dtype(weights[group.bags[p].table].get_dtype())
        if p >= 0
        else sources[~p].get_dtype()
        for p in out.parts
    ]
    result: torch.dtype = found[0]
    for dtype in found[1:]:
        result = torch.promote_types(result, dtype)
    return result
