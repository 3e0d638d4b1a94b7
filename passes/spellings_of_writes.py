"""Canonical spellings of what writes into tensors become: see `functionalize.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from recompile.passes.spellings import spelling
from recompile.rewrite import Builder, arguments

aten = torch.ops.aten
_SCATTERS = (aten.select_scatter, aten.slice_scatter)


@spelling(aten.index_put)
def masked_fill_from_index_put(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`x[:, mask] = value`, of one mask and one value, is `masked_fill(x, mask, value)`."""
    x, indices, value = given["self"], given["indices"], given["values"]
    *before, mask = indices
    alone = mask is not None and all(index is None for index in before)
    if not alone or given["accumulate"] or mask.meta["val"].dtype is not torch.bool or value.meta["val"].ndim:
        return None
    for _ in range(x.meta["val"].ndim - len(before) - mask.meta["val"].ndim):
        mask = build.call(aten.unsqueeze.default, mask, -1)
    return build.call(aten.masked_fill, x, mask, _number(value))


def _number(value: fx.Node) -> Any:
    """The number that a tensor without dims is filled with; the tensor if that is not known."""
    filled = value.target is aten.full.default and isinstance(value.args[1], (bool, int, float))
    return value.args[1] if filled else value


@spelling(*_SCATTERS)
def cat_from_scatters(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`out[:, 0] = a; out[:, 1:] = b`, where that is all of `out`, is `cat([unsqueeze(a, 1), b], 1)`."""
    dim, size = given["dim"], node.meta["val"].shape[given["dim"]]
    users = list(node.users)
    if type(size) is not int or (
        len(users) == 1 and users[0].args[:1] == (node,) and _piece(users[0], dim, size)
    ):
        return None  # it goes on
    pieces, place = [], node
    while (place is node or len(place.users) == 1) and (piece := _piece(place, dim, size)) is not None:
        pieces.append(piece)
        place = place.args[0]  # type: ignore[assignment]
    pieces.sort()
    ends = [0, *(end for _, end, _ in pieces)]
    if any(arguments(scatter)["src"].meta["val"].dtype != node.meta["val"].dtype for *_, scatter in pieces):
        return None
    if len(pieces) < 2 or [start for start, *_ in pieces] != ends[:-1] or ends[-1] != size:
        return None
    tensors = [
        build.call(aten.unsqueeze.default, given["src"], dim) if "index" in given else given["src"]
        for given in (arguments(scatter) for *_, scatter in pieces)
    ]
    return build.call(aten.cat.default, tensors, dim)


def _piece(node: fx.Node, dim: int, size: int) -> tuple[int, int, fx.Node] | None:
    """From where to where along `dim` a scatter writes; None if that is not known, or not one run."""
    if getattr(node.target, "overloadpacket", None) not in _SCATTERS:
        return None
    given = arguments(node)
    if "index" in given:
        bounds = [given["index"], given["index"] + 1 if given["index"] != -1 else size]
    else:
        bounds = [given["start"] or 0, size if given["end"] is None else given["end"]]
    if given["dim"] != dim or given.get("step", 1) != 1 or not all(type(b) is int for b in bounds):
        return None
    start, end = (min(b + size if b < 0 else b, size) for b in bounds)
    return start, end, node
