"""`recompile::lookup_triton` and its backward: the lookup op on a GPU, as Triton kernels that Inductor inlines."""

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op, wrap_triton
from triton.runtime.jit import JITFunction

from recompile.lowering.lookup import op, triton_backward, triton_forward
from recompile.lowering.lookup.reference import flat
from recompile.lowering.lookup.spec import Lookup, Output
from recompile.lowering.lookup.triton_forward import Place
from recompile.lowering.lookup.triton_kernel import Launch
from recompile.lowering.lookup.triton_module import load


@triton_op("recompile::lookup_triton", mutates_args=())
def lookup_triton(weights: list[Tensor], sources: list[Tensor], spec: str) -> list[Tensor]:
    """As `recompile::lookup` (see `reference.forward`)."""
    group = Lookup.parse(spec)
    weights = [_dense_rows(w) for w in weights]
    batch = op.batch(group, sources)
    dtypes = [op.output_dtype(out, group, weights, sources) for out in group.outputs]
    places, scratch = triton_forward.find_places(group, sources)
    buffers = {
        o: weights[0].new_empty((batch, op.output_width(out, group, sources)), dtype=dtypes[o])
        for o, out in enumerate(group.outputs)
        if out.kind == "concat"
    }
    if any(place.buffer < 0 for held in places.values() for place in held):
        dtype = torch.float64 if any(w.dtype == torch.float64 for w in weights) else torch.float32
        buffers[-1] = weights[0].new_empty((batch, scratch), dtype=dtype)
    for launch in triton_forward.launches(group, weights, sources, buffers, places, batch):
        _run(launch)
    return [
        buffers[o] if o in buffers else _sum(out, sources, buffers, places).to(dtypes[o])
        for o, out in enumerate(group.outputs)
    ]


@triton_op("recompile::lookup_triton_backward", mutates_args=())
def lookup_triton_backward(
    grads: list[Tensor],
    weights: list[Tensor],
    sources: list[Tensor],
    spec: str,
    tables: list[int],
    loads: list[int],
) -> list[Tensor]:
    """As `recompile::lookup_backward` (see `reference.backward`)."""
    group = Lookup.parse(spec)
    weights = [_dense_rows(w) for w in weights]
    rows = {t: _zeros(weights[t]) for t in tables}
    weighted = {s: _zeros(sources[s]) for s in loads}
    batch = op.batch(group, sources)
    for launch in triton_backward.launches(group, grads, weights, sources, rows, weighted, batch):
        _run(launch)
    given = [*(rows[t].to(weights[t].dtype) for t in tables)]
    return given + [weighted[s].to(sources[s].dtype) for s in loads]


def _dense_rows(table: Tensor) -> Tensor:
    """`table` itself where the elements of a row lie side by side, else a contiguous copy."""
    return table if table.stride(1) == 1 or table.shape[1] == 1 else table.contiguous()


def _zeros(like: Tensor) -> Tensor:
    """What gradients are added up in: 16-bit types would lose small addends."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_zeros(like.shape, dtype=dtype)


def _run(launch: Launch) -> None:
    kernel: Any = getattr(load(launch.source), launch.name)
    if isinstance(kernel, JITFunction):  # else Triton's interpreter runs it
        kernel = wrap_triton(kernel)
    kernel[(launch.programs,)](**launch.arguments)


def _sum(
    out: Output, sources: list[Tensor], buffers: dict[int, Tensor], places: dict[int, list[Place]]
) -> Tensor:
    """A sum over fields, in plain PyTorch on the kernel's output: Inductor fuses it with what follows."""
    total: Any = 0
    for piece in _pieces(out, sources, buffers, places):
        x = piece if piece.dtype == torch.float64 else piece.to(torch.float32)
        x = x.reshape(x.shape[0], x.shape[1] // out.width, out.width)
        total = total + (x * x if out.kind == "sum_of_squares" else x).sum(1)
    return total  # type: ignore[no-any-return]


def _pieces(
    out: Output, sources: list[Tensor], buffers: dict[int, Tensor], places: dict[int, list[Place]]
) -> list[Tensor]:
    """The parts of a sum, neighbours in the same buffer as one."""
    merged: list[Place] = []
    for place in (places[p][0] for p in out.parts if p >= 0):
        last = merged[-1] if merged else None
        if last and last.buffer == place.buffer and str(last.column + last.width) == str(place.column):
            merged[-1] = Place(last.buffer, last.column, last.width + place.width)
        else:
            merged.append(place)
    copied = [flat(sources[~p]) for p in out.parts if p < 0]
    return [buffers[m.buffer].narrow(1, m.column, m.width) for m in merged] + copied


lookup_triton.register_fake(op.fake)
lookup_triton_backward.register_fake(op.fake_backward)
lookup_triton.register_autograd(
    op.differentiate("lookup_triton_backward"), setup_context=op.save_for_backward
)
