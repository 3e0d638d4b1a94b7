"""The lookup op in plain PyTorch: its documentation, the oracle of its tests, the fallback without a kernel."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from recompile.lowering import scalar
from recompile.lowering.lookup.spec import Bag, Lookup, Output


def forward(weights: Sequence[Tensor], sources: Sequence[Tensor], spec: Lookup) -> list[Tensor]:
    """The outputs of `spec`, in order.

    Args:
        weights: table t is `[rows_t, spec.tables[t].dim]`, floating point.
        sources: what the bags load (ids, offsets, masks, weights) and the copies, see `spec`.
    """
    values = [_Positions(bag, sources, weights).value() for bag in spec.bags]
    parts = [[_part(values, sources, p) for p in out.parts] for out in spec.outputs]
    return [_output(out, ps) for out, ps in zip(spec.outputs, parts, strict=True)]


def backward(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    spec: Lookup,
    tables: Sequence[int],
    loads: Sequence[int],
) -> list[Tensor]:
    """Gradients of the `tables` (dense, as eager's) and of the sources `loads` that weight the rows.

    A bag's gradient g[b] collects from every output that holds it (2 * bag[b] * grad for squares); then
    d table[row(b, l)] += weight(b, l) / divisor(b) * g[b], and d weight(b, l) = <g[b], row> / divisor(b).
    """
    by_table = {t: torch.zeros_like(weights[t], memory_format=torch.contiguous_format) for t in tables}
    by_load = {s: torch.zeros_like(sources[s], memory_format=torch.contiguous_format) for s in loads}
    for j, bag in enumerate(spec.bags):
        here = _Positions(bag, sources, weights)
        g = _bag_gradient(j, here, grads, spec, sources)
        if bag.table in by_table:
            here.add_row_gradients(by_table[bag.table], g)
        if bag.weight and bag.weight_load in by_load:
            by_load[bag.weight_load] += here.weight_gradients(g)
    return [*by_table.values(), *by_load.values()]


def width(bag: Bag, spec: Lookup, sources: Sequence[Tensor]) -> int:
    """Columns that a bag takes: its table's, times its length where rows stand side by side."""
    dim = spec.tables[bag.table].dim
    ids = sources[bag.loads[0]]
    return dim * ids.shape[1] if bag.pooling == "none" and ids.dim() == 2 else dim


def part_width(part: int, spec: Lookup, sources: Sequence[Tensor]) -> int:
    """Columns that a part of an output takes: a bag, or a source that is copied."""
    return width(spec.bags[part], spec, sources) if part >= 0 else flat(sources[~part]).shape[1]


def flat(x: Tensor) -> Tensor:
    """A copied source `[B, ...]` as `[B, columns]`."""
    return x if x.dim() == 2 else x.reshape(x.shape[0], math.prod(x.shape[1:]))


class _Positions:
    """One bag's positions, flat: position p belongs to sample `sample[p]`."""

    def __init__(self, bag: Bag, sources: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.bag, self.weights = bag, weights[bag.table]
        ids = sources[bag.loads[0]]
        loads = [sources[s] for s in bag.loads]
        if bag.offsets >= 0:
            bounds = sources[bag.offsets].to(torch.int64)
            self.batch = bounds.shape[0] - int(bag.include_last_offset)
            at = torch.arange(ids.shape[0], device=ids.device)
            self.sample = torch.searchsorted(bounds[: self.batch].contiguous(), at, right=True) - 1
            self.length = torch.bincount(self.sample, minlength=self.batch)[self.sample]
            position = at - bounds[self.sample]
        else:
            two = [x.unsqueeze(1) if x.dim() == 1 else x for x in loads]
            self.batch, self.positions = two[0].shape  # positions a sample
            at = torch.arange(self.batch * self.positions, device=ids.device)
            self.sample, position = at // self.positions, at % self.positions
            self.length = torch.full_like(at, self.positions)
            loads = [x.expand(self.batch, self.positions).reshape(-1) for x in two]
        wide = [x if x.is_floating_point() else x.to(torch.int64) for x in loads]  # as kernels compute
        self.env = {f"x{k}": x for k, x in enumerate(wide)} | {"l": position, "L": self.length}
        self.keep = self._mask(bag.keep)
        row = self._eval(bag.row).to(torch.int64)
        self.row = torch.where(self.keep, row, 0) if self.weights.shape[0] else row[self.keep]
        self.rows = torch.nn.functional.embedding(self.row, self.weights)
        if self.rows.shape[0] != self.sample.shape[0]:
            self.rows = self.rows.new_zeros(self.sample.shape[0], self.rows.shape[1])

    def _eval(self, text: str) -> Tensor:
        value = scalar.evaluate(scalar.parse(text), self.env)
        return torch.as_tensor(value, device=self.sample.device)

    def _mask(self, text: str) -> Tensor:
        return self._eval(text).to(torch.bool).expand(self.sample.shape)

    def _per_sample(self, x: Tensor) -> Tensor:
        if self.bag.offsets < 0:
            return x.reshape(self.batch, x.shape[0] // max(self.batch, 1), *x.shape[1:]).sum(1)
        return x.new_zeros(self.batch, *x.shape[1:]).index_add(0, self.sample, x)

    def weight(self) -> Tensor:
        accumulate = torch.float64 if self.rows.dtype == torch.float64 else torch.float32
        w = (
            self._eval(self.bag.weight).to(accumulate)
            if self.bag.weight
            else torch.ones((), dtype=accumulate)
        )
        return w.expand(self.sample.shape) * self.keep

    def divisor(self) -> Tensor | None:
        if not self.bag.divisor:
            return None
        weight = self.weight()
        self.env["nonzero"] = (self.rows.sum(-1) != 0).to(weight.dtype)
        each = self._eval(self.bag.count or "1").to(weight.dtype) * self.keep
        length = (
            self.env["L"][:1] if self.bag.offsets < 0 else torch.bincount(self.sample, minlength=self.batch)
        )
        env = {"count": self._per_sample(each), "L": length.to(weight.dtype).expand(self.batch)}
        value = torch.as_tensor(scalar.evaluate(scalar.parse(self.bag.divisor), env))
        return value.to(weight.dtype).expand(self.batch)

    def value(self) -> Tensor:
        """The bag: `[batch, width]`."""
        if self.bag.pooling == "none":
            return self.rows.reshape(self.batch, self.positions * self.rows.shape[1])
        dtype = self.bag.value_dtype(self.rows.dtype)
        if self.bag.pooling == "max":
            return self.largest()[0].to(dtype)
        rows = self.rows.to(self.weight().dtype) * self.weight().unsqueeze(1)
        total = self._per_sample(torch.where(self.keep.unsqueeze(1), rows, 0))
        divisor = self.divisor()
        return (total if divisor is None else total / divisor.unsqueeze(1)).to(dtype)

    def largest(self) -> tuple[Tensor, Tensor]:
        """Per sample and column the largest kept value (`empty` for none), and its first position (or P)."""
        sample = self.sample.unsqueeze(1).expand_as(self.rows)
        low = torch.where(self.keep.unsqueeze(1), self.rows, float("-inf"))
        top = low.new_full((self.batch, low.shape[1]), float("-inf")).scatter_reduce(0, sample, low, "amax")
        n = self.rows.shape[0]
        at = torch.arange(n, device=low.device).unsqueeze(1).expand_as(low)
        is_top = (low == top[self.sample]) | low.isnan()
        at = torch.where(is_top & self.keep.unsqueeze(1), at, n)
        first = at.new_full(top.shape, n).scatter_reduce(0, sample, at, "amin")
        return torch.where(first < n, top, float(self.bag.empty)), first

    def add_row_gradients(self, into: Tensor, g: Tensor) -> None:
        if self.bag.pooling == "max":
            first = self.largest()[1]
            at = torch.arange(self.rows.shape[0], device=g.device).unsqueeze(1)
            per_row = torch.where(first[self.sample] == at, g[self.sample], 0)
        elif self.bag.pooling == "none":
            per_row = g.reshape(-1, into.shape[1])
        else:
            per_row = self._scaled(g)[self.sample] * self.weight().unsqueeze(1)
        kept = self.keep & (self.row != self.bag.frozen_row)
        if into.shape[0]:
            into.index_add_(0, self.row, torch.where(kept.unsqueeze(1), per_row, 0).to(into.dtype))

    def weight_gradients(self, g: Tensor) -> Tensor:
        each = (self._scaled(g)[self.sample] * self.rows).sum(1) * self.keep
        return each if self.bag.offsets >= 0 else each.reshape(self.batch, self.positions)

    def _scaled(self, g: Tensor) -> Tensor:
        divisor = self.divisor()
        return g if divisor is None else g / divisor.unsqueeze(1)


def _part(values: Sequence[Tensor], sources: Sequence[Tensor], part: int) -> Tensor:
    return values[part] if part >= 0 else flat(sources[~part])


def _output(out: Output, parts: Sequence[Tensor]) -> Tensor:
    row = torch.cat(list(parts), 1)
    if out.kind == "concat":
        return row
    fields = row.reshape(row.shape[0], row.shape[1] // out.width, out.width)
    return (fields * fields if out.kind == "sum_of_squares" else fields).sum(1)


def _bag_gradient(
    j: int, here: _Positions, grads: Sequence[Tensor], spec: Lookup, sources: Sequence[Tensor]
) -> Tensor:
    total = torch.zeros((), dtype=here.weight().dtype)
    for out, grad in zip(spec.outputs, grads, strict=True):
        column = 0
        for part in out.parts:
            wide = part_width(part, spec, sources)
            if part == j:
                total = total + through(out, grad, column, wide, here.value)
            column += wide
    return total


def through(out: Output, grad: Tensor, column: int, wide: int, value: Callable[[], Tensor]) -> Tensor:
    """The gradient that one part of an output gets: `[B, wide]`, from `column` on; `value` is the part."""
    if out.kind == "concat":
        return grad[:, column : column + wide]
    spread = grad.repeat(1, wide // out.width)
    return 2 * value() * spread if out.kind == "sum_of_squares" else spread
