"""Triton for the gradients of a group of lookups: rows' gradients are added atomically to zero-filled tables.

The order of the additions is the hardware's, so that two runs may differ in the last bits, as with PyTorch's own
embedding gradients on a GPU. Divisors, and the positions of the largest values, are computed again.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor

from recompile.lowering.lookup.reference import part_width
from recompile.lowering.lookup.spec import Bag, Lookup
from recompile.lowering.lookup.triton_common import (
    End,
    Kind,
    divide,
    is_max,
    kind_of,
    length_of,
    pairs,
    pool,
    positions,
    read_rows,
    samples,
    values_of,
    weight,
)
from recompile.lowering.lookup.triton_kernel import LIMIT, Arguments, Group, Launch, kernel, text


def launches(
    spec: Lookup,
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    rows: Mapping[int, Tensor],
    weighted: Mapping[int, Tensor],
    batch: Any,
) -> Iterator[Launch]:
    """The launches that add to `rows` (table -> its gradient) and `weighted` (source -> its gradient)."""
    gathers = _gathers(spec, sources)
    wanted = [j for j, bag in enumerate(spec.bags) if gathers[j] and _writes(bag, rows, weighted)]
    for members in _split(spec, wanted):
        args = Arguments()
        groups: dict[Kind, Group] = {}
        for j in members:
            bag = spec.bags[j]
            length = length_of(bag, sources, args) if bag.offsets < 0 else ""
            ends = [end for end, _ in gathers[j]]
            kind = kind_of(bag, spec, weights, sources, ends, length, _writes(bag, rows, weighted))
            if kind not in groups:
                body = text(_side_by_side(kind) if bag.pooling == "none" else _pooled(kind))
                groups[kind] = Group(f"gradient of {kind.title}", kind.schedule, body)
                if kind.length != "1":
                    groups[kind].length, groups[kind].length_value = length, sources[bag.loads[0]].shape[1]
            values = values_of(bag, weights, sources, args)
            values |= _written(bag, kind, rows, weighted, args)
            for k, (end, column) in enumerate(gathers[j]):
                values |= _gathered(k, args.tensor(end.name, grads[int(end.name[4:])]), column, grads, args)
            groups[kind].members.append(values)
        yield kernel("lookup_backward", list(groups.values()), args, batch)


def _gathers(spec: Lookup, sources: Sequence[Tensor]) -> dict[int, list[tuple[End, Any]]]:
    """For each bag, the outputs whose gradients it collects, and its column there."""
    found: dict[int, list[tuple[End, Any]]] = defaultdict(list)
    for o, out in enumerate(spec.outputs):
        column: Any = 0
        for part in out.parts:
            if part >= 0:
                found[part].append(
                    (End(out.kind, f"grad{o}", out.width), column if out.kind == "concat" else 0)
                )
            column = column + part_width(part, spec, sources)
    return found


def _writes(bag: Bag, rows: Mapping[int, Tensor], weighted: Mapping[int, Tensor]) -> tuple[str, ...]:
    to_weight = bag.weight and bag.weight_load in weighted
    return (("rows",) if bag.table in rows else ()) + (("weights",) if to_weight else ())


def _split(spec: Lookup, bags: Sequence[int]) -> Iterator[list[int]]:
    """`bags` in runs of at most `LIMIT` tensors: at most six a bag, tables and their gradients among them."""
    run: list[int] = []
    tensors: set[tuple[str, int]] = set()
    for j in bags:
        bag = spec.bags[j]
        needed = {("table", bag.table), ("into", bag.table), *(("source", s) for s in bag.loads)}
        needed |= {("source", bag.offsets)} if bag.offsets >= 0 else set()
        needed |= {("weight_into", bag.weight_load)} if bag.weight else set()
        if run and len(tensors | needed) > LIMIT - len(spec.outputs):
            yield run
            run, tensors = [], set()
        run.append(j)
        tensors |= needed
    if run:
        yield run


def _written(
    bag: Bag, kind: Kind, rows: Mapping[int, Tensor], weighted: Mapping[int, Tensor], args: Arguments
) -> dict[str, str]:
    values: dict[str, str] = {}
    if "rows" in kind.writes:
        values |= {"into": args.tensor(f"into{bag.table}", rows[bag.table]), "frozen": str(bag.frozen_row)}
    if "weights" in kind.writes:
        x = weighted[bag.weight_load]
        values["weight_into"] = args.tensor(f"weight_into{bag.weight_load}", x)
        values["weight_b"] = "0" if bag.offsets >= 0 else args.stride(x, 0)
        values["weight_l"] = args.stride(x, 0 if bag.offsets >= 0 else 1)
    return values


def _gathered(k: int, name: str, column: Any, grads: Sequence[Tensor], args: Arguments) -> dict[str, str]:
    grad = grads[int(name[4:])]
    return {
        f"g{k}_at": name,
        f"g{k}_b": args.number(grad.stride(0)),
        f"g{k}_d": args.number(grad.stride(1)),
        f"column{k}": args.number(column),
    }


def _gradient(kind: Kind, b: str, d: str, mask: str, value: str) -> list[str]:
    """Declares `g`, the bag's gradient at columns `d`, summed over the outputs that hold it."""
    lines = []
    for k, end in enumerate(kind.ends):
        column = f"column{k} + {d}" if end.kind == "concat" else f"({d}) % {end.width}"
        at = f"g{k}_at + {b} * g{k}_b + ({column}).to(tl.int64) * g{k}_d"
        through = f"2 * {value} * " if end.kind == "sum_of_squares" else ""
        lines.append(f"g{k} = {through}tl.load({at}, mask={mask}, other=0).to({kind.acc})")
    return [*lines, "g = " + " + ".join(f"g{k}" for k in range(len(kind.ends)))]


def _squares(kind: Kind) -> bool:
    return any(end.kind == "sum_of_squares" for end in kind.ends)


def _side_by_side(kind: Kind) -> list[str]:
    read = (
        f"value = tl.load(table + row[:, None] * row_stride + d[None, :], mask=wide, other=0).to({kind.acc})"
    )
    column = "d[None, :]" if kind.length == "1" else f"l[:, None] * {kind.dim} + d[None, :]"
    return [
        *pairs(kind),
        *([read] if _squares(kind) else []),
        *_gradient(kind, "b[:, None]", column, "wide", "value"),
        f"to = into + row[:, None] * {kind.dim} + d[None, :]",
        'tl.atomic_add(to, g, mask=wide & (row != frozen)[:, None], sem="relaxed")',
    ]


def _pooled(kind: Kind) -> list[str]:
    inside = f"here[:, None]{' & (d < ' + str(kind.dim) + ')[None, :]' if kind.uneven else ''}"
    value = "(value / divisor[:, None])" if kind.bag.divisor else "value"
    return [
        *samples(kind),
        *(pool(kind) if is_max(kind) or _squares(kind) else divide(kind)),
        *_gradient(kind, "b[:, None]", "d[None, :]", inside, value),
        *(["g = g / divisor[:, None]"] if kind.bag.divisor else []),
        f"for start in range(0, longest, {kind.schedule.positions}):",
        *("    " + line for line in [*positions(kind), *weight(kind), *_scatter(kind)]),
    ]


def _scatter(kind: Kind) -> list[str]:
    """Adds to the rows of the positions at hand, and to their weights."""
    lines = []
    if "rows" in kind.writes:
        mask = "wide & (row != frozen)[:, :, None]"
        mask += " & (largest[:, None, :] == l[:, :, None])" if is_max(kind) else ""
        scale = " * weight[:, :, None]" if kind.bag.weight else ""
        zeros = f"tl.zeros([{kind.schedule.samples}, {kind.schedule.positions}, {kind.schedule.columns}], {kind.acc})"
        lines += [
            f"to = into + row[:, :, None] * {kind.dim} + d[None, None, :]",
            f"each = {zeros} + g[:, None, :]{scale}",
            f'tl.atomic_add(to, each, mask={mask}, sem="relaxed")',
        ]
    if "weights" in kind.writes:
        lines += [
            read_rows(kind),
            "to_weight = weight_into + b[:, None] * weight_b + at * weight_l",
            'tl.atomic_add(to_weight, tl.sum(g[:, None, :] * r, 2), mask=keep, sem="relaxed")',
        ]
    return lines
