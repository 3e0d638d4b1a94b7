"""Writes a script that runs one region of a dump by itself: `recompile repro out/ lookup_default`.

Shapes, strides and dtypes are those of the dump, sizes that were symbolic those of the batch that was compiled.
Values are random. Ids are drawn such that the spec's row stays inside each table that they are used for.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from .dump_read import Dump
from .errors import RecompileError
from .lowering import scalar
from .lowering import score as score_language
from .lowering.attention import Attention
from .lowering.lookup import Bag, Lookup
from .report import RegionRecord

_HELPERS = ("compare", "offsets", "real", "whole")
Shape = dict[str, Any]  # a tensor in regions.json


def script(dump: Dump, name: str, graph: int | None = None) -> str:
    """The text of the script.

    Raises:
        RecompileError: there is no such region, or several graphs have one, or it is a user's own.
    """
    index, region = dump.region(name, graph)
    *given, spec = region["args"]
    record = next((r for r in dump.record(index).regions if r.name == region["name"]), RegionRecord("", ""))
    operator = region["op"].removesuffix(".default")
    family = _family(region)
    body = f"{''.join(family(given, spec))}\ncompare(torch.ops.{operator}, {', '.join(_PARAMETERS[family])}, SPEC)\n"
    about = [
        f"{operator}, region {region['name']} of graph {index}: {record.summary}",
        *record.lines,
        "",
        "Written by `recompile repro`. The fused kernel against the operator's reference in plain PyTorch, which is",
        "written to be read and may be slower than the model's own code; both compiled by Inductor, without gradients.",
    ]
    head = "\n".join(f"# {line}".rstrip() for part in about for line in textwrap.wrap(part, 110) or [""])
    return f"""{head}

import torch

from recompile.repro import {", ".join(name for name in _HELPERS if f"{name}(" in body)}

SPEC = (
{_wrapped(spec)}
)

torch.manual_seed(0)
{body}"""


def _family(region: dict[str, Any]) -> Any:
    """What draws a region's tensors; those of a user's own would need the file that defines it."""
    name = region["op"].split(".")[1].removesuffix("_triton")
    if name not in ("lookup", "attention"):
        raise RecompileError(
            f"{region['name']} is a region of your own, of which no script can be written",
            try_=f"call `{name}(...)` and `{name}.reference(...)` with tensors of yours",
        )
    return _attention if name == "attention" else _lookup


def _wrapped(spec: str) -> str:
    parts = textwrap.wrap(spec, 100, break_long_words=False, break_on_hyphens=False, drop_whitespace=False)
    return "\n".join(f"    {part!r}" for part in parts)


def _lookup(given: Sequence[Any], spec: str) -> Iterator[str]:
    weights, sources = given
    group = Lookup.parse(spec)
    yield _listed("weights", [(_real(w), table.name) for w, table in zip(weights, group.tables, strict=True)])
    drawn = [_source(s, group, weights, sources) for s in range(len(sources))]
    yield _listed("sources", [(text, x["name"]) for text, x in zip(drawn, sources, strict=True)])


def _attention(given: Sequence[Any], spec: str) -> Iterator[str]:
    *operands, extras = given
    parsed = Attention.parse(spec)
    for name, x in zip("qkv", operands, strict=True):
        yield f"{name} = {_real(x)}  # {x['name']}\n"
    named = dict(zip(parsed.extras, extras, strict=True))
    keys = operands[1]["shape"][-2]
    drawn = [(_extra(name, named, parsed, keys), f"{name}, {x['name']}") for name, x in named.items()]
    yield _listed("extras", drawn)


_PARAMETERS: dict[Any, list[str]] = {_lookup: ["weights", "sources"], _attention: ["q", "k", "v", "extras"]}


def _listed(name: str, drawn: list[tuple[str, str]]) -> str:
    return f"{name} = [\n" + "".join(f"    {text},  # {about}\n" for text, about in drawn) + "]\n"


def _real(x: Shape) -> str:
    return f"real({_layout(x)}{_device(x)})"


def _whole(x: Shape, low: int, high: int) -> str:
    low, high = (0, 2) if x["dtype"] == "bool" else (low, max(high, low + 1))
    return f"whole({_layout(x)}, {low}, {high}{_device(x)})"


def _layout(x: Shape) -> str:
    return f"torch.{x['dtype']}, {x['shape']}, {x['stride']}"


def _device(x: Shape) -> str:
    return "" if x["device"] == "cpu" else f", device={x['device']!r}"


def _is_real(x: Shape) -> bool:
    return bool(getattr(torch, x["dtype"]).is_floating_point)


def _source(s: int, group: Lookup, weights: Sequence[Shape], sources: Sequence[Shape]) -> str:
    """The text that draws source `s`: ids, offsets, or what a mask or weight is computed from."""
    x = sources[s]
    for bag in group.bags:
        if bag.offsets == s:
            ids = sources[bag.loads[0]]["shape"][0]
            return f"offsets(torch.{x['dtype']}, {x['shape']}, {ids}, {bag.include_last_offset}{_device(x)})"
    read = [bag for bag in group.bags if bag.loads[0] == s]
    if read:
        bounds = [_ids(bag, weights[bag.table]["shape"][0], _length(sources[s])) for bag in read]
        return _whole(x, max(low for low, _ in bounds), min(high for _, high in bounds))
    if _is_real(x):
        return _real(x)
    used = next((bag for bag in group.bags if s in bag.loads), None)
    in_row = used is not None and scalar.symbol(f"x{used.loads.index(s)}") in _row(used).free_symbols
    # Beside ids, whole numbers are lengths or truths; what moves a row stays 0, as `_ids` assumes.
    return _whole(x, 0, 1 if in_row else 1 + (_length(sources[used.loads[0]]) if used else 1))


def _length(ids: Shape) -> int:
    return int(ids["shape"][1]) if len(ids["shape"]) > 1 else 1


def _row(bag: Bag) -> Any:
    return scalar.parse(bag.row)


def _ids(bag: Bag, rows: int, length: int) -> tuple[int, int]:
    """The first run of ids whose row is inside the table at every position: (first, one past the last)."""
    if bag.row == "x0":
        return 0, rows
    ids = torch.arange(-rows, 2 * rows)
    inside = torch.ones_like(ids, dtype=torch.bool)
    for position in {0, length - 1}:
        zeros = {f"x{k}": torch.tensor(0) for k in range(len(bag.loads))}
        env = {**zeros, "x0": ids, "l": torch.tensor(position), "L": torch.tensor(length)}
        row = torch.as_tensor(scalar.evaluate(_row(bag), env))
        inside &= (row >= 0) & (row < rows)
    good = ids[inside]
    if not len(good):
        return 0, rows
    breaks = (good.diff() > 1).nonzero()
    return int(good[0]), int(good[breaks[0, 0]] if len(breaks) else good[-1]) + 1


def _extra(name: str, extras: dict[str, Shape], spec: Attention, keys: int) -> str:
    """A load or a table. Whole numbers may be lengths, truths or indices: up to the keys, and inside each table."""
    x = extras[name]
    if _is_real(x):
        return _real(x)
    texts = (spec.score, spec.keep, spec.kept, spec.weight)
    loads = {t for text in texts if text for t in score_language.tables_in(score_language.parse(text))}
    symbol = score_language.symbol(name)
    lengths = [extras[type(t).__name__]["shape"][-1] for t in loads if symbol in t.args[0].free_symbols]
    return _whole(x, 0, min([keys + 1, *lengths]))
