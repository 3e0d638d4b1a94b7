"""Triton for a group of lookups: each bag is written once to every output that holds it, copies in the same launch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from recompile.lowering.lookup import schedule
from recompile.lowering.lookup.reference import flat, part_width
from recompile.lowering.lookup.spec import Lookup
from recompile.lowering.lookup.triton_common import (
    End,
    Kind,
    kind_of,
    length_of,
    pairs,
    pool,
    samples,
    values_of,
)
from recompile.lowering.lookup.triton_kernel import LIMIT, Arguments, Group, Launch, kernel, text


@dataclass(frozen=True)
class Place:
    """Columns `column` to `column + width` of a buffer: output `buffer`, or the scratch buffer (-1)."""

    buffer: int
    column: Any
    width: Any


def find_places(spec: Lookup, sources: Sequence[Tensor]) -> tuple[dict[int, list[Place]], Any]:
    """Where each part is written, and the columns of the scratch buffer, which holds bags that only sums read."""
    places: dict[int, list[Place]] = defaultdict(list)
    for o, out in enumerate(spec.outputs):
        column: Any = 0
        for part in out.parts if out.kind == "concat" else ():
            wide = part_width(part, spec, sources)
            places[part].append(Place(o, column, wide))
            column = column + wide
    scratch: Any = 0
    for j in range(len(spec.bags)):
        if j not in places:
            wide = part_width(j, spec, sources)
            places[j] = [Place(-1, scratch, wide)]
            scratch = scratch + wide
    return places, scratch


def launches(
    spec: Lookup,
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    buffers: dict[int, Tensor],
    places: dict[int, list[Place]],
    batch: Any,
) -> Iterator[Launch]:
    """The launches that write every part to its places in `buffers`."""
    for members in split(spec, list(places)):
        args = Arguments()
        groups: dict[Any, Group] = {}
        for part in members:
            add = _add_bag if part >= 0 else _add_copy
            add(part, spec, weights, sources, buffers, places[part], args, groups)
        yield kernel("lookup", list(groups.values()), args, batch)


def split(spec: Lookup, parts: Sequence[int]) -> Iterator[list[int]]:
    """`parts` in runs whose tensors are at most `LIMIT`."""
    run: list[int] = []
    tensors: set[tuple[str, int]] = set()
    room = LIMIT - 1 - len(spec.outputs)
    for part in parts:
        needed = _tensors(spec, part)
        if run and len(tensors | needed) > room:
            yield run
            run, tensors = [], set()
        run.append(part)
        tensors |= needed
    if run:
        yield run


def _tensors(spec: Lookup, part: int) -> set[tuple[str, int]]:
    if part < 0:
        return {("source", ~part)}
    bag = spec.bags[part]
    offsets = {("source", bag.offsets)} if bag.offsets >= 0 else set()
    return {("table", bag.table), *(("source", s) for s in bag.loads), *offsets}


def _name(place: Place) -> str:
    return f"out{place.buffer}" if place.buffer >= 0 else "scratch"


def _add_bag(
    j: int,
    spec: Lookup,
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    buffers: dict[int, Tensor],
    places: Sequence[Place],
    args: Arguments,
    groups: dict[Any, Group],
) -> None:
    bag = spec.bags[j]
    length = length_of(bag, sources, args) if bag.offsets < 0 else ""
    kind = kind_of(bag, spec, weights, sources, [End("concat", _name(p)) for p in places], length)
    if kind not in groups:
        body = text(_side_by_side(kind) if bag.pooling == "none" else _pooled(kind))
        groups[kind] = Group(kind.title, kind.schedule, body)
        if kind.length != "1":
            groups[kind].length, groups[kind].length_value = length, sources[bag.loads[0]].shape[1]
    values = values_of(bag, weights, sources, args)
    for k, place in enumerate(places):
        buffer = buffers[place.buffer]
        values[f"to{k}"] = args.tensor(_name(place), buffer)
        values[f"to{k}_b"] = args.number(buffer.stride(0))
        values[f"column{k}"] = args.number(place.column)
    groups[kind].members.append(values)


def _side_by_side(kind: Kind) -> list[str]:
    at = "table + row[:, None] * row_stride + d[None, :]"
    inside = f"here[:, None]{' & (d < ' + str(kind.dim) + ')[None, :]' if kind.uneven else ''}"
    column = "d[None, :]" if kind.length == "1" else f"l[:, None] * {kind.dim} + d[None, :]"
    return [
        *pairs(kind),
        f"r = tl.load({at}, mask=wide, other=0)",
        *(
            f"tl.store(to{k} + b[:, None] * to{k}_b + (column{k} + {column}), r, mask={inside})"
            for k in range(len(kind.ends))
        ),
    ]


def _pooled(kind: Kind) -> list[str]:
    inside = f"here[:, None]{' & (d < ' + str(kind.dim) + ')[None, :]' if kind.uneven else ''}"
    return [
        *samples(kind),
        *pool(kind),
        *(["value = value / divisor[:, None]"] if kind.bag.divisor else []),
        *(
            f"tl.store(to{k} + b[:, None] * to{k}_b + (column{k} + d)[None, :], value, mask={inside})"
            for k in range(len(kind.ends))
        ),
    ]


# Copies: the columns of dense features, seldom more than a few hundred.
_COPY = schedule.Schedule("copy", 64, 1, 32, 1)
_COPY_BODY = f"""    b = block.to(tl.int64) * {_COPY.samples} + tl.arange(0, {_COPY.samples})
    for start in range(0, width, {_COPY.columns}):
        d = start + tl.arange(0, {_COPY.columns})
        inside = (b < B)[:, None] & (d < width)[None, :]
        x = tl.load(x_at + b[:, None] * x_b + d[None, :].to(tl.int64) * x_d, mask=inside, other=0)
        tl.store(to + b[:, None] * to_b + (column + d)[None, :], x, mask=inside)
"""


def _add_copy(
    part: int,
    spec: Lookup,
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    buffers: dict[int, Tensor],
    places: Sequence[Place],
    args: Arguments,
    groups: dict[Any, Group],
) -> None:
    x = flat(sources[~part])
    for place in places:
        group = groups.setdefault(
            ("copy", x.dtype, place.buffer),
            Group(f"copies to {_name(place)}", _COPY, _COPY_BODY),
        )
        buffer = buffers[place.buffer]
        group.members.append(
            {
                "x_at": args.tensor(f"s{~part}", x)
                if x is sources[~part]
                else args.tensor(f"copied{~part}", x),
                "x_b": args.stride(x, 0),
                "x_d": args.stride(x, 1),
                "width": args.number(x.shape[1]),
                "to": args.tensor(_name(place), buffer),
                "to_b": args.number(buffer.stride(0)),
                "column": args.number(place.column),
            }
        )
