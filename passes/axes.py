"""Names for a tensor's dims, followed through views.

Each dim carries an *axis*: a tuple of atoms, such as ("b0",) for samples, ("b1",) for heads, ("i",) for queries and
("j",) for keys. A dim that merges two, as `view(B * H, N, D)` makes, carries both: ("b0", "b1"); one of size 1
that stands for nothing carries none: ().
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.rewrite import Builder, arguments, same
from recompile.torch_private.symbols import SYM, expression

aten = torch.ops.aten
Axis = tuple[str, ...]
Axes = tuple[Axis, ...]
# Not `detach`: what is computed above it gets no gradient, so it is an end.
COPIES = (aten.contiguous, aten.clone, aten.alias, aten._unsafe_view)


class Split(Exception):
    """An atom is two axes or more in a tensor further up: `sizes`."""

    def __init__(self, atom: str, sizes: Sequence[Any]) -> None:
        super().__init__(atom)
        self.atom, self.sizes = atom, list(sizes)


def shape(node: fx.Node) -> Any:
    """The sizes of a node's tensor; () for anything else."""
    return getattr(node.meta.get("val"), "shape", ())


def layout(x: torch.Tensor) -> tuple[int, ...] | None:
    """The dims of `x` as they lie in memory, outermost first; None if there are gaps between its elements."""
    left, found = list(range(x.dim())), list[int]()
    step: Any = 1
    while left:
        inner = (k for k in reversed(left) if same(x.shape[k], 1) or same(x.stride(k), step))
        if (dim := next(inner, None)) is None:
            return None
        left.remove(dim)
        found.insert(0, dim)
        step = step * torch.sym_max(x.shape[dim], 1)  # type: ignore[no-untyped-call]  # as torch does
    return tuple(found)


def before_view(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """The tensor that `node` is a view, a copy or a repetition of, and its axes; None if it is not one.

    Raises:
        Split: an atom of `axes` is several dims of that tensor.
    """
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.target, OpOverload):
        return None
    given, packet = arguments(node), node.target.overloadpacket
    if packet is aten.unsqueeze:
        return source, axes[: given["dim"]] + axes[given["dim"] + 1 :]
    if packet is aten.select and same(shape(source)[given["dim"]], 1):
        return source, (*axes[: given["dim"]], (), *axes[given["dim"] :])
    if packet is aten.permute:
        return source, tuple(axes[given["dims"].index(k)] for k in range(len(axes)))
    if packet is aten.expand or packet is aten.repeat:
        return _before_repeat(source, shape(node), axes)
    if node.target is aten.repeat_interleave.self_int and given["dim"] is not None:
        return _before_interleave(source, given["dim"], given["repeats"], axes)
    if packet in COPIES and same(shape(source), shape(node)):
        return source, axes
    if packet in (aten.reshape, aten.view, aten.squeeze, aten._unsafe_view):
        found = regroup(shape(node), axes, shape(source))
        return None if found is None else (source, found)
    return None


def _before_repeat(source: fx.Node, new: Any, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Where dims of size 1 are repeated, and new ones stand in front."""
    old = shape(source)
    pairs = list(zip(old, new[len(new) - len(old) :], axes[len(new) - len(old) :], strict=True))
    if not all(same(a, b) or same(a, 1) for a, b, _ in pairs):
        return None
    return source, tuple(axis if same(a, b) else () for a, b, axis in pairs)


def _before_interleave(source: fx.Node, dim: int, times: int, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Where each element of `dim` comes `times` times: a head's keys for a group of queries."""
    size = shape(source)[dim]
    if same(size, 1):
        return source, (*axes[:dim], (), *axes[dim + 1 :])
    if len(axes[dim]) == 1:
        raise Split(axes[dim][0], [size, times])
    return (source, (*axes[:dim], axes[dim][:1], *axes[dim + 1 :])) if len(axes[dim]) == 2 else None


def regroup(old: Sequence[Any], axes: Axes, new: Sequence[Any]) -> Axes | None:
    """The axes of `new` sizes that lie in memory like the `old` ones with their `axes`; None if they mix.

    Raises:
        Split: an atom is several of the new dims.
    """
    found: list[Axis] = []
    wide = [(size, axis) for size, axis in zip(old, axes, strict=True) if not same(size, 1)]
    for olds, news in _groups([size for size, _ in wide], [size for size in new if not same(size, 1)]):
        labels = [axis for _, axis in wide[: len(olds)]]
        del wide[: len(olds)]
        if len(news) == 1:
            found.append(tuple(atom for axis in labels for atom in axis))
        elif len(olds) == 1 and len(labels[0]) == len(news):
            found += [(atom,) for atom in labels[0]]
        elif len(olds) == 1 and len(labels[0]) == 1:
            raise Split(labels[0][0], news)
        else:
            return None
    if wide:
        return None
    left = iter(found)
    return tuple(() if same(size, 1) else next(left) for size in new)


def _groups(old: list[Any], new: list[Any]) -> Iterator[tuple[list[Any], list[Any]]]:
    """Runs of dims with equal products, from the front; the rest of both in one, where they never meet."""
    start, end = 0, 0
    while start < len(old) and end < len(new):
        i, j = start + 1, end + 1
        while (a := _product(old[start:i])) != (b := _product(new[end:j])):
            if i == len(old) and j == len(new):
                break
            whole = sympy.denom(sympy.cancel(a / b)) == 1 if not (a.is_number and b.is_number) else a > b
            i, j = (i, j + 1) if (whole and j < len(new)) or i == len(old) else (i + 1, j)
        yield old[start:i], new[end:j]
        start, end = i, j


def _product(sizes: Sequence[Any]) -> sympy.Expr:
    return math.prod((expression(s) if isinstance(s, SYM) else s for s in sizes), start=sympy.Integer(1))


def atoms(axes: Axes) -> list[str]:
    """All atoms, in order."""
    return [atom for axis in axes for atom in axis]


def arrange(
    node: fx.Node, axes: Axes, wanted: Sequence[str], sizes: dict[str, Any], build: Builder
) -> fx.Node:
    """`node` with one dim for each atom of `wanted`, of size 1 where it has no such axis."""
    if any(len(axis) > 1 for axis in axes):
        split = [s for axis, size in zip(axes, shape(node), strict=True) for s in _sizes(axis, size, sizes)]
        axes = tuple(part for axis in axes for part in (((atom,) for atom in axis) if axis else ((),)))
        node = build.call(aten.reshape.default, node, split)
    held = [atom for atom in wanted if (atom,) in axes]
    order = [axes.index((atom,)) for atom in held] + [k for k, axis in enumerate(axes) if not axis]
    if order != sorted(order):
        node = build.call(aten.permute.default, node, order)
    final = [sizes[atom] if atom in held else 1 for atom in wanted]
    if same(shape(node), final):
        return node
    return build.call(aten.reshape.default, node, final)


def _sizes(axis: Axis, size: Any, sizes: dict[str, Any]) -> list[Any]:
    return [size] if len(axis) < 2 else [sizes[atom] for atom in axis]
