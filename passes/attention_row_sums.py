"""Weights divided by their sum, without a softmax: the sum is one more column of the values.

    w = sigmoid(scores);  y = (w / (w.sum(-1, keepdim=True) + 1e-6)) @ v
->
    out = w @ pad(v, by ones);  y = out[..., :-1] / (out[..., -1:] + 1e-6)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from recompile.rewrite import Builder, arguments, same

from . import score_ops
from .attention_ends import Second
from .axes import Axes, shape

aten = torch.ops.aten
_VIEWS = (aten.unsqueeze.default, aten.expand.default)


@dataclass(frozen=True)
class RowSums:
    """`weights` before the division, what is divided or takes its place in `root`, and the nodes in between.

    `divisor` are the nodes from the sum, first, to what divides.
    """

    weights: fx.Node
    root: fx.Node
    divisor: tuple[fx.Node, ...]
    division: fx.Node

    def nodes(self) -> tuple[fx.Node, ...]:
        """All that the division is made of."""
        return (*self.divisor, self.division)

    def is_plain(self) -> bool:
        """Whether nothing is done to the sums."""
        return all(node.target in _VIEWS for node in self.divisor[1:])

    def with_ones(self, values: fx.Node, build: Builder) -> fx.Node:
        """The values with a column of ones behind."""
        return build.call(aten.constant_pad_nd.default, values, [0, 1], 1.0)

    def divide(self, out: fx.Node, build: Builder) -> fx.Node:
        """The product of weights and `with_ones`, divided."""
        by = build.call(aten.slice.Tensor, out, -1, -1)
        for before, node in zip(self.divisor, self.divisor[1:], strict=False):
            if node.target not in _VIEWS:
                args, kwargs = _with(node, before, by)
                by = build.call(node.target, *args, **kwargs)
        return build.call(aten.div.Tensor, build.call(aten.slice.Tensor, out, -1, 0, -1), by)


def row_sums(second: Second) -> RowSums | None:
    """How the weights, or their product with the values, are divided by the weights' sums over the keys."""
    product, weights = second.found.node, second.weights
    ours, _, out = second.axes
    keys = place = ours.index(("j",))
    if _is_division(weights) and list(weights.users) == [product]:
        division, root, weights = weights, product, weights.args[0]  # type: ignore[assignment]
    else:
        division = root = next(iter(product.users))
        later = _is_division(division) and division.args[0] is product and list(product.users) == [division]
        if not later or ("e",) not in out or _without(ours, "j") != _without(out, "e"):
            return None
        place = out.index(("e",))
    divisor = _divisor(division, weights, keys, place)
    same_shape = same(shape(weights), shape(second.weights))
    return RowSums(weights, root, divisor, division) if divisor and same_shape else None


def _without(axes: Axes, atom: str) -> Axes:
    return tuple(axis for axis in axes if axis != (atom,))


def _divisor(division: fx.Node, weights: fx.Node, keys: int, place: int) -> tuple[fx.Node, ...]:
    """The nodes from the sum of `weights` over the dim `keys` to what divides, which has one dim of size 1, at
    `place`; () if they are others."""
    found: list[fx.Node] = []
    node: Any = division.args[1]
    reader, unsqueezed = division, 0
    while isinstance(node, fx.Node) and list(node.users) == [reader]:
        found.insert(0, node)
        given = arguments(node) if isinstance(node.target, OpOverload) else {}
        if node.target is aten.sum.dim_IntList:
            dims = [dim % len(shape(weights)) for dim in given["dim"] or ()]
            kept = unsqueezed == (0 if given["keepdim"] else 1) and (unsqueezed == 1 or keys == place)
            plain = node.args[0] is weights and given["dtype"] is None
            return tuple(found) if plain and kept and dims == [keys] else ()
        if node.target is aten.unsqueeze.default and given["dim"] % len(shape(node)) == place:
            unsqueezed += 1
        elif not (_is_spread(node, place) or getattr(node.target, "overloadpacket", None) in score_ops.KNOWN):
            return ()
        if len(node.all_input_nodes) != 1:
            return ()
        reader, node = node, node.all_input_nodes[0]
    return ()


def _is_spread(node: fx.Node, place: int) -> bool:
    """Whether `node` repeats the dim at `place` only."""
    if node.target is not aten.expand.default:
        return False
    old, new = (list(shape(x)) for x in (*node.all_input_nodes[:1], node))
    return len(old) == len(new) and same(old[:place] + old[place + 1 :], new[:place] + new[place + 1 :])


def _is_division(node: fx.Node) -> bool:
    return node.target is aten.div.Tensor and all(isinstance(x, fx.Node) for x in node.args)


def _with(node: fx.Node, old: fx.Node, new: fx.Node) -> tuple[Sequence[Any], dict[str, Any]]:
    """The arguments of `node` with `new` in the place of `old`."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: new if n is old else n)
    return args, kwargs
