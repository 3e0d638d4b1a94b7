"""The second contraction of an attention, and how far its operands and its result are followed through views."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from recompile.rewrite import Refuse, arguments, same
from recompile.torch_private.symbols import SYM

from .axes import COPIES, Axes, Axis, Split, atoms, before_view, regroup, shape
from .contractions import Contraction

aten = torch.ops.aten


@dataclass
class Second:
    """The second contraction: `weights` times `values`, with the axes of both and of the result."""

    found: Contraction
    weights: fx.Node
    values: fx.Node
    axes: tuple[Axes, Axes, Axes]
    sizes: dict[str, Any]
    batch: list[str]

    def nodes(self) -> tuple[fx.Node, ...]:
        """The contraction itself."""
        return (self.found.node, *self.found.inner)

    def split(self, atom: str, sizes: list[Any]) -> None:
        """An atom is several axes: everywhere."""
        if atom not in self.batch:
            raise Refuse(
                "a reshape between the two products splits queries, keys or features", self.found.node
            )
        parts = [f"{atom}_{k}" for k in range(len(sizes))]
        self.sizes.update(zip(parts, sizes, strict=True))
        at = self.batch.index(atom)
        self.batch[at : at + 1] = parts
        new = [tuple(_parted(axis, atom, parts) for axis in axes) for axes in self.axes]
        self.axes = (new[0], new[1], new[2])

    def turn(self, atom: str) -> None:
        """The queries are another of the weights' axes that the values lack: one of heads was taken for them."""
        names = {"i": atom, atom: "i"}
        self.sizes.update([(names[old], self.sizes[old]) for old in names])
        new = [tuple(tuple(names.get(a, a) for a in axis) for axis in axes) for axes in self.axes]
        self.axes = (new[0], new[1], new[2])

    def longest(self, own: list[str]) -> str:
        """Which of the axes that neither keys nor values have is that of the queries: the longest, for positions.

        One of unknown size is longer than others. The outermost of the scores is that of samples, if there are others.
        """
        rest = [x for x in own if x not in atoms(self.axes[0])[:1]] or own
        return max(rest, key=lambda x: (self._length(x), x == "i"))

    def is_longer(self, atom: str) -> bool:
        """Whether an axis is longer than the one that is taken for the queries."""
        return self._length(atom) > self._length("i")

    def _length(self, atom: str) -> float:
        size = self.sizes.get(atom, 1)
        return math.inf if isinstance(size, SYM) else size


class Turn(Exception):
    """The queries are the axis `atom`, not the one that was taken for them."""

    def __init__(self, atom: str) -> None:
        super().__init__(atom)
        self.atom = atom


def _parted(axis: Axis, atom: str, parts: list[str]) -> Axis:
    return tuple(x for a in axis for x in (parts if a == atom else [a]))


def seconds(found: Contraction) -> Iterator[Second]:
    """The two ways in which a contraction may be weights times values."""
    sides = ((found.left, found.letters[0]), (found.right, found.letters[1]))
    for (weights, mine), (values, other) in (sides, sides[::-1]):
        out = found.letters[2]
        queries = [x for x in out if x and x in mine and x not in other]
        features = [x for x in out if x and x in other and x not in mine]
        names = {found.summed: "j"} | dict.fromkeys(features[-1:], "e")
        names |= dict.fromkeys(queries[-1:], "i")  # heads that share their values come before, see `turn`
        batch = [x for x in out if x and x not in names]
        names |= {x: f"b{k}" for k, x in enumerate(batch)}
        sizes: dict[str, Any] = {}
        for node, letters in ((values, other), (weights, mine), (found.node, out)):
            sizes |= {names[x]: size for x, size in zip(letters, shape(node), strict=True) if x in names}
        axes = [tuple((names[x],) if x in names else () for x in letters) for letters in (mine, other, out)]
        yield Second(found, weights, values, (axes[0], axes[1], axes[2]), sizes, [names[x] for x in batch])


def furthest(node: fx.Node, axes: Axes, needed: str) -> tuple[fx.Node, Axes]:
    """The tensor furthest up that `node` is a view or a copy of, each of its dims an axis of its own.

    Args:
        needed: axes that must not be those of a repetition, as far as `node` has them.
    """
    best = node, axes
    held = {(atom,) for atom in needed} & {*axes}
    view: tuple[fx.Node, Axes] | None = best
    while view is not None:
        node, axes = view
        if all(len(axis) < 2 for axis in axes) and held <= {*axes}:
            best = view
        try:
            view = before_view(node, axes)
        except Split as split:
            if split.atom[0] == "b":
                raise
            view = None
    return best


def uncast(node: fx.Node, axes: Axes, needed: str, dtype: torch.dtype) -> tuple[fx.Node, Axes]:
    """The same through a cast from half precision `dtype` to float32, which is exact."""
    above = node.args[0] if getattr(node.target, "overloadpacket", None) in (aten.to, aten._to_copy) else None
    if not isinstance(above, fx.Node) or node.meta["val"].dtype is not torch.float32:
        return node, axes
    value = above.meta["val"]
    exact = value.dtype is dtype and dtype.itemsize == 2 and value.device == node.meta["val"].device
    return furthest(above, axes, needed) if exact else (node, axes)


def delivered(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes]:
    """The tensor furthest down, contiguous, that is all that is made of `node`: by views and copies."""
    best = node, axes
    while len(node.users) == 1:
        user = next(iter(node.users))
        packet = getattr(user.target, "overloadpacket", None)
        if packet is aten.permute:
            axes = tuple(axes[k] for k in arguments(user)["dims"])
        elif packet in (aten.reshape, aten.view, aten.unsqueeze, aten.squeeze):
            try:
                found = regroup(shape(node), axes, shape(user))
            except Split:
                break
            if found is None:
                break
            axes = found
        elif packet not in COPIES or not same(shape(node), shape(user)):
            break
        node = user
        if node.meta["val"].is_contiguous():
            best = node, axes
    return best
