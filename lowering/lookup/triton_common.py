"""What the Triton of forward and backward has in common: classes of bags, their arguments, and their loops.

A pooled class walks tiles `[samples, positions, columns]`: `b`, `l` and `d` number them. A class that puts rows side by
side ("none") takes (sample, position) pairs one by one: its tiles are `[pairs, columns]`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recompile.lowering import scalar
from recompile.lowering.lookup import schedule
from recompile.lowering.lookup.spec import Bag, Lookup
from recompile.lowering.lookup.triton_kernel import Arguments, indent

BAD_ID = "recompile: index out of range: an id is negative, or not below its table's number of rows"
BAD_OFFSETS = "recompile: bad offsets: expected them to start at 0, not to decrease, to stay within the ids"


@dataclass(frozen=True)
class End:
    """An output that a bag's value goes to, or whose gradient it comes from: `name` is the kernel's parameter."""

    kind: str
    name: str
    width: int = 0


@dataclass(frozen=True)
class Kind:
    """What the bags of one class have in common: all that the text of their function depends on."""

    bag: Bag  # with table, loads, offsets and frozen_row blanked
    dim: int
    table: torch.dtype
    loads: tuple[torch.dtype, ...]
    schedule: schedule.Schedule
    ends: tuple[End, ...]
    offsets: torch.dtype | None = None
    length: str = "1"  # for "none": positions a sample
    writes: tuple[str, ...] = ()  # backward: "rows", "weights"

    @property
    def acc(self) -> str:
        return "tl.float64" if self.table == torch.float64 else "tl.float32"

    @property
    def uneven(self) -> bool:
        """Whether the tile is wider than the row, or than what is left of it."""
        return self.dim % self.schedule.columns != 0

    @property
    def title(self) -> str:
        """One line for the reader of a kernel."""
        what = {"none": "rows", "sum": "sum of rows", "max": "max of rows"}[self.bag.pooling]
        where = "" if self.bag.keep == "true" else f" where {self.bag.keep}"
        over = f" / ({self.bag.divisor})" if self.bag.divisor else ""
        return f"{what}{where}{over}: {str(self.table).removeprefix('torch.')}[{self.dim}] tables"


def kind_of(
    bag: Bag,
    spec: Lookup,
    weights: Sequence[Tensor],
    sources: Sequence[Tensor],
    ends: Sequence[End],
    length: str,
    writes: tuple[str, ...] = (),
) -> Kind:
    """The class that a bag belongs to; `length` as text."""
    table, dim = weights[bag.table], spec.tables[bag.table].dim
    known = int(length) if bag.offsets < 0 and length.isdigit() else None
    item = 8 if table.dtype == torch.float64 else 4
    return Kind(
        bag=replace(bag, table=0, loads=(), offsets=-1, include_last_offset=False, frozen_row=-1),
        dim=dim,
        table=table.dtype,
        loads=tuple(sources[s].dtype for s in bag.loads),
        schedule=schedule.choose(bag.pooling, dim, known, item, whole="nonzero" in bag.count),
        ends=tuple(ends),
        offsets=sources[bag.offsets].dtype if bag.offsets >= 0 else None,
        length=length if bag.pooling == "none" else "1",
        writes=writes,
    )


def values_of(
    bag: Bag, weights: Sequence[Tensor], sources: Sequence[Tensor], args: Arguments
) -> dict[str, str]:
    """The arguments of a bag that say what it reads."""
    table = weights[bag.table]
    values = {
        "table": args.tensor(f"w{bag.table}", table),
        "rows": args.number(table.shape[0]),
        "row_stride": args.number(table.stride(0)),
    }
    for k, s in enumerate(bag.loads):
        x = sources[s]
        # With offsets a source is one value an id: position p takes the place of the sample.
        dims = (1, 0) if bag.offsets >= 0 else (0, 1)
        values[f"x{k}_at"] = args.tensor(f"s{s}", x)
        values[f"x{k}_b"] = "0" if bag.offsets >= 0 else args.stride(x, dims[0])
        values[f"x{k}_l"] = args.stride(x, dims[1])
    if bag.offsets >= 0:
        x = sources[bag.offsets]
        values["offsets_at"] = args.tensor(f"s{bag.offsets}", x)
        values["offsets_b"] = args.number(x.stride(0))
        values["bounds"] = args.size(f"size{bag.offsets}", x.shape[0])
        values["ids"] = args.size(f"size{bag.loads[0]}", sources[bag.loads[0]].shape[0])
    else:
        values["length"] = length_of(bag, sources, args)
    return values


def length_of(bag: Bag, sources: Sequence[Tensor], args: Arguments) -> str:
    """Positions of each bag, as text."""
    ids = sources[bag.loads[0]]
    return args.number(ids.shape[1]) if ids.dim() == 2 else "1"


def expression(text: str) -> str:
    return scalar.to_triton(scalar.parse(text))


def columns(kind: Kind) -> str:
    """Declares `d`: columns of the row."""
    return f"d = chunk * {kind.schedule.columns} + tl.arange(0, {kind.schedule.columns})"


def pairs(kind: Kind) -> list[str]:
    """For "none": declares `b`, `l` and `row` of each pair, and `ok`: the row is one of the table's."""
    lines = [
        f"pair = block.to(tl.int64) * {kind.schedule.samples} + tl.arange(0, {kind.schedule.samples})",
        "b = pair" if kind.length == "1" else "b = pair // length",
        "l = 0" if kind.length == "1" else "l = pair % length",
        "here = b < B",
        *_loads(kind, "b", "l", "here"),
        f"row = tl.cast({expression(kind.bag.row)}, tl.int64)",
        "ok = here & (row >= 0) & (row < rows)",
        f'tl.device_assert(ok | (b >= B), "{BAD_ID}")',
        columns(kind),
        f"wide = ok[:, None]{' & (d < ' + str(kind.dim) + ')[None, :]' if kind.uneven else ''}",
    ]
    return lines


def samples(kind: Kind) -> list[str]:
    """For pooled bags: declares `b`, `here`, `d`; `first` and `last` position; `longest`, the most positions."""
    n = kind.schedule.samples
    lines = [f"b = block.to(tl.int64) * {n} + tl.arange(0, {n})", "here = b < B", columns(kind)]
    if kind.offsets is None:
        return [*lines, "longest = length"]
    return [
        *lines,
        "first = tl.load(offsets_at + b * offsets_b, mask=here, other=0).to(tl.int64)",
        "more = here & (b + 1 < bounds)",
        "last = tl.load(offsets_at + (b + 1) * offsets_b, mask=more, other=0).to(tl.int64)",
        "last = tl.where(more, last, ids)",
        "fine = (first >= 0) & (last >= first) & (last <= ids) & ((b > 0) | (first == 0))",
        f'tl.device_assert(fine | (b >= B), "{BAD_OFFSETS}")',
        "first = tl.where(here & fine, first, 0)",
        "last = tl.where(here & fine, last, 0)",
        "lengths = last - first",
        "longest = tl.max(lengths, 0)",
    ]


def positions(kind: Kind) -> list[str]:
    """The start of a pooled bag's loop body: declares `l`, `row`, `keep` and `wide`, the mask of the rows' tile."""
    lines = [f"l = start + tl.arange(0, {kind.schedule.positions})[None, :]"]
    if kind.offsets is None:
        lines += ["L = length", "at = l.to(tl.int64)", "keep = here[:, None] & (l < length)"]
    else:
        lines += ["L = lengths[:, None]", "at = first[:, None] + l", "keep = here[:, None] & (l < L)"]
    lines += _loads(kind, "b[:, None]", "at", "keep")
    if kind.bag.keep != "true":
        lines.append(f"keep = keep & {_truth(kind.bag.keep)}")
    return [
        *lines,
        f"row = tl.cast({expression(kind.bag.row)}, tl.int64)",
        "inside = (row >= 0) & (row < rows)",
        f'tl.device_assert(inside | (keep == 0), "{BAD_ID}")',
        "keep = keep & inside",
        f"wide = keep[:, :, None]{' & (d < ' + str(kind.dim) + ')[None, None, :]' if kind.uneven else ''}",
    ]


def read_rows(kind: Kind) -> str:
    at = "table + row[:, :, None] * row_stride + d[None, None, :]"
    return f"r = tl.load({at}, mask=wide, other=0).to({kind.acc})"


def weight(kind: Kind) -> list[str]:
    """Declares `weight` of each position, if the bag has one."""
    if not kind.bag.weight:
        return []
    s = kind.schedule
    return [f"weight = tl.zeros([{s.samples}, {s.positions}], {kind.acc}) + {expression(kind.bag.weight)}"]


def pool(kind: Kind) -> list[str]:
    """The loop that pools a bag: declares `value`, and `divisor` (if any) or, for "max", `largest`: its position."""
    s = kind.schedule
    tile = f"[{s.samples}, {s.positions}, {s.columns}]"
    start = f"tl.full({tile}, float('-inf'), {kind.acc})" if is_max(kind) else f"tl.zeros({tile}, {kind.acc})"
    chosen = [f"chosen = tl.full({tile}, -1, tl.int32)"] if is_max(kind) else []
    step = [read_rows(kind), *weight(kind), *_add(kind), *_count(kind)]
    lines = [f"total = {start}", *chosen, *_loop(kind, step)]
    if not is_max(kind):
        return [*lines, "value = tl.sum(total, 1)", *_divisor(kind)]
    return [
        *lines,
        "unordered = (chosen >= 0) & (total != total)",
        "value = tl.max(tl.where(unordered, float('-inf'), total), 1)",
        "value = tl.where(tl.max(unordered.to(tl.int32), 1) > 0, float('nan'), value)",
        "best = unordered | ((chosen >= 0) & (total == value[:, None, :]))",
        "largest = tl.min(tl.where(best, chosen, 2147483647), 1)",
        f"value = tl.where(largest < 2147483647, value, {_number(kind.bag.empty)})",
    ]


def _number(text: str) -> str:
    return f"float('{text}')" if text in ("inf", "-inf") else text


def divide(kind: Kind) -> list[str]:
    """Declares `divisor` of each sample, if the bag has one, without pooling."""
    step = [*([read_rows(kind)] if "nonzero" in kind.bag.count else []), *_count(kind)]
    return [*(_loop(kind, step) if counts(kind) else []), *_divisor(kind)]


def _loop(kind: Kind, step: list[str]) -> list[str]:
    s = kind.schedule
    return [
        *([f"count = tl.zeros([{s.samples}, {s.positions}], {kind.acc})"] if counts(kind) else []),
        f"for start in range(0, longest, {s.positions}):",
        *indent([*positions(kind), *step]),
    ]


def _add(kind: Kind) -> list[str]:
    if not is_max(kind):
        return [f"total += r{' * weight[:, :, None]' if kind.bag.weight else ''}"]
    return [
        "better = wide & ((r > total) | (chosen < 0) | ((r != r) & (total == total)))",
        "total = tl.where(better, r, total)",
        "chosen = tl.where(better, l[:, :, None].to(tl.int32), chosen)",
    ]


def _count(kind: Kind) -> list[str]:
    if not counts(kind):
        return []
    each = kind.bag.count or "1"
    nonzero = [f"nonzero = (tl.sum(r, 2) != 0).to({kind.acc})"] if "nonzero" in each else []
    return [*nonzero, f"count += tl.where(keep, {expression(each)}, 0)"]


def _divisor(kind: Kind) -> list[str]:
    if not kind.bag.divisor:
        return []
    total = ["count = tl.sum(count, 1)"] if counts(kind) else []
    length = scalar.symbol("length" if kind.offsets is None else "lengths")
    formula = scalar.to_triton(scalar.parse(kind.bag.divisor).subs(scalar.symbol("L"), length))
    return [*total, f"divisor = tl.zeros([{kind.schedule.samples}], {kind.acc}) + {formula}"]


def is_max(kind: Kind) -> bool:
    return kind.bag.pooling == "max"


def counts(kind: Kind) -> bool:
    return "count" in kind.bag.divisor


def _loads(kind: Kind, sample: str, position: str, mask: str) -> list[str]:
    """Declares x0, x1, ...: integers as int64, the rest in float32 or float64."""
    lines = []
    for k, dtype in enumerate(kind.loads):
        real = "tl.float64" if dtype == torch.float64 else "tl.float32"
        cast = real if dtype.is_floating_point else "tl.int64"
        at = f"x{k}_at + {sample} * x{k}_b + {position} * x{k}_l"
        lines.append(f"x{k} = tl.load({at}, mask={mask}, other=0).to({cast})")
    return lines


def _truth(text: str) -> str:
    shown = expression(text)
    return shown if scalar.is_truth(scalar.parse(text)) else f"({shown} != 0)"
