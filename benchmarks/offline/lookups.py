"""The lookups of the offline table: each class of bags, and the 26 fields of a real model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from recompile.lowering.lookup import Bag, Lookup, Output, Table, op, triton_backward, triton_forward
from recompile.lowering.lookup.triton_kernel import Launch

B = 300
Group = tuple[list[Tensor], list[Tensor], Lookup]


def launches(weights: Sequence[Tensor], sources: Sequence[Tensor], spec: Lookup) -> Iterator[Launch]:
    """The forward and backward kernels of a group."""
    outs = op.fake(weights, sources, str(spec))
    places, scratch = triton_forward.find_places(spec, sources)
    buffers = dict(enumerate(outs)) | {-1: _empty(B, scratch)}
    yield from triton_forward.launches(spec, weights, sources, buffers, places, B)
    rows = {
        t: torch.empty_like(w, dtype=w.dtype if w.dtype == torch.double else torch.float)
        for t, w in enumerate(weights)
    }
    weighted = {bag.loads[1]: torch.empty_like(sources[bag.loads[1]]) for bag in spec.bags if bag.weight}
    yield from triton_backward.launches(spec, outs, weights, sources, rows, weighted, B)


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _ids(*size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return _empty(*size, dtype=dtype)


def _one(dim: int, dtype: torch.dtype, sources: list[Tensor], bag: Bag) -> Group:
    outputs = (Output("concat", (0,)),)
    return [_empty(1000, dim, dtype=dtype)], sources, Lookup((Table("t", dim),), (bag,), outputs)


def _many(dtype: torch.dtype) -> Group:
    """26 one-hot fields, dense features and two sums: the select chains, copies and places of a real model."""
    weights = [_empty(1000 + t, 16, dtype=dtype) for t in range(26)]
    sources = [_ids(B, 26)[:, t] for t in range(26)] + [_empty(B, 13, dtype=dtype)]
    fields = tuple(range(26))
    outputs = (
        Output("concat", (*fields, ~26)),
        Output("sum", fields, 16),
        Output("sum_of_squares", fields, 16),
    )
    bags = tuple(Bag(t, (t,), row="Mod(x0 + 7, 1000)") for t in fields)
    return weights, sources, Lookup(tuple(Table(f"t{t}", 16) for t in fields), bags, outputs)


def _scalars() -> Group:
    """One of each scalar operation, on a loaded mask and float ids."""
    keep = "Ne(x1, 0) & ~((l >= Max(x2, 2)) | Eq(Min(x0, 5), 3))"
    bags = (
        Bag(0, (0, 1, 2), "sum", row="Mod(x0 - 5, 1000)", keep=keep, divisor="Max(1, count)/L"),
        Bag(0, (3,), row="trunc(x0)"),
    )
    sources = [_ids(B, 5), _empty(B, 5, dtype=torch.bool), _ids(B, 1), _empty(B)]
    return [_empty(1000, 8)], sources, Lookup((Table("t", 8),), bags, (Output("concat", (0, 1)),))


F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
_JAGGED = [_ids(4000), _ids(B)]
_MEAN = Bag(0, (0,), "sum", keep="Ne(x0, 0)", divisor="Max(1, count)")
GROUPS = {
    "one-hot narrow, fp32 x 16": _one(16, F32, [_ids(B)], Bag(0, (0,))),
    "one-hot narrow, bf16 x 16": _one(16, BF16, [_ids(B)], Bag(0, (0,))),
    "one-hot odd, fp16 x 25, int32 ids": _one(25, F16, [_ids(B, dtype=torch.int32)], Bag(0, (0,))),
    "one-hot wide, fp32 x 64": _one(64, F32, [_ids(B)], Bag(0, (0,))),
    "one-hot wide, bf16 x 1536": _one(1536, BF16, [_ids(B)], Bag(0, (0,))),
    "rows side by side, fp32 x 8": _one(8, F32, [_ids(B, 5)], Bag(0, (0,))),
    "pooled short, fp32 x 64": _one(64, F32, [_ids(B, 20)], _MEAN),
    "pooled short, fp16 x 64": _one(64, F16, [_ids(B, 20)], _MEAN),
    "pooled long, fp16 x 16": _one(
        16, F16, [_ids(B, 200)], Bag(0, (0,), "sum", count="nonzero", divisor="count")
    ),
    "pooled short, fp64 x 32": _one(32, F64, [_ids(B, 20)], Bag(0, (0,), "sum", divisor="L")),
    "jagged, fp32 x 64": _one(64, F32, _JAGGED, Bag(0, (0,), "sum", offsets=1)),
    "jagged weighted, fp32 x 16": _one(
        16, F32, [*_JAGGED, _empty(4000)], Bag(0, (0, 2), "sum", weight="x1", offsets=1)
    ),
    "jagged max, fp32 x 64": _one(64, F32, _JAGGED, Bag(0, (0,), "max", offsets=1)),
    "long max, bf16 x 128": _one(128, BF16, [_ids(B, 50)], Bag(0, (0,), "max")),
    "scalars, fp32 x 8": _scalars(),
    "26 fields, fp32 x 16": _many(F32),
    "26 fields, bf16 x 16": _many(BF16),
}
