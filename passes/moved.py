"""A bias whose elements are those of a table, moved: one look-up, at a position linear in the query and the key.

    t = F.pad(w, [0, n]).repeat(n)[:-n].reshape(1, n, 3 * n - 2)[:, :, r:-r]       (HSTU's, w [2 n - 1], r = n - 1)
    t[0, i, j]  is  w[j - i + n - 1]

What pads, repeats, slices and reshapes come to is seen by running them on the numbers of the table's elements.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor, fx

from recompile.lowering.score import I, J
from recompile.rewrite import arguments

from .axes import COPIES, Axes, shape

aten = torch.ops.aten
_PADS = (aten.pad, aten.constant_pad_nd)
_MOVES = {
    aten.expand, aten.flip, aten.permute, aten.repeat, aten.reshape, aten.roll, aten.select, aten.slice,
    aten.squeeze, aten.unfold, aten.unsqueeze, aten.view, *COPIES, *_PADS,
}  # fmt: skip
_MOST = 1 << 26  # numbers in a step, which are held while the model is compiled; a quarter of it at the end


class Moved(NamedTuple):
    """`table`, whose dims have `axes`, is read at `position` along its dim "t"; `steps` lie between."""

    table: fx.Node
    axes: Axes
    position: sympy.Expr
    steps: list[fx.Node]


def moved(node: fx.Node, axes: Axes) -> Moved | None:
    """What `node`, with an element for each pair, is of a table; None if that is no single look-up."""
    steps = [node]
    while (source := _source(steps[-1])) is not None:
        steps.append(source)
    table = steps.pop()
    if not steps or any(len(axis) > 1 for axis in axes) or not all(map(_is_small, (table, *steps))):
        return None
    entries, pairs = table.meta["val"].numel(), node.meta["val"].numel()
    if entries >= pairs or pairs > _MOST // 4:  # what is no smaller than the pairs may as well be loaded
        return None
    numbers = torch.arange(1, entries + 1, dtype=torch.int32).view(shape(table))
    for step in reversed(steps):
        numbers = _run(step, numbers)
    if not numbers.min():  # a padding is read
        return None
    sizes = shape(table)
    found = [_along(p, axes, s) for p, s in zip(torch.unravel_index(numbers - 1, sizes), sizes, strict=True)]
    positions = [x for x in found if isinstance(x, sympy.Expr)]
    if None in found or len(positions) != 1:
        return None
    return Moved(table, tuple(("t",) if x is positions[0] else x for x in found), positions[0], steps)


def _source(node: fx.Node) -> fx.Node | None:
    """What `node` only moves the elements of."""
    packet = getattr(node.target, "overloadpacket", None)
    if node.op != "call_function" or packet not in _MOVES or len(node.all_input_nodes) != 1:
        return None
    if packet is aten.pad and arguments(node)["mode"] != "constant":
        return None
    source = node.all_input_nodes[0]
    return source if source is node.args[0] and torch.dtype not in map(type, node.args) else None


def _is_small(node: fx.Node) -> bool:
    sizes = shape(node)
    return all(type(size) is int for size in sizes) and node.meta["val"].numel() <= _MOST


def _run(step: fx.Node, x: Tensor) -> Any:
    """A step on numbers, which start at 1: what is padded is 0, whatever the number that it is padded with."""
    if step.target.overloadpacket in _PADS:  # type: ignore[union-attr]
        return aten.constant_pad_nd.default(x, arguments(step)["pad"], 0)
    return step.target(x, *step.args[1:], **step.kwargs)  # type: ignore[operator]


def _along(place: Tensor, axes: Axes, size: int) -> Any:
    """A coordinate along a dim of this size: (), an axis of the pairs, a position; None if it is none of them."""
    steps = dict[tuple[str, ...], int]()
    for dim, axis in enumerate(axes):
        if place.shape[dim] > 1:
            many = torch.arange(place.shape[dim], dtype=place.dtype)
            step = int((place.select(dim, 1) - place.select(dim, 0)).flatten()[0])
            place = place - step * many.view(-1, *[1] * (place.dim() - dim - 1))
            steps |= {axis: step} if step else {}
    start = int(place.flatten()[0])
    if not bool((place == start).all()):
        return None
    if steps and steps.keys() <= {("i",), ("j",)}:
        return steps.get(("i",), 0) * I + steps.get(("j",), 0) * J + start
    if start or len(steps) > 1 or not {1} >= {*steps.values()}:
        return None
    ((axis, reach),) = [(axis, place.shape[axes.index(axis)]) for axis in steps] or [((), 1)]
    return axis if reach == size else None
