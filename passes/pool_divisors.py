"""The divisor of a pooled sum: the number of kept positions, or of rows that are not all zeros, plus what is added.

sum(e * m, 1) / (m.sum(1, keepdim=True) + 1e-16)      divisor  count + 1.0e-16
sum(e * m, 1) / m.sum(1, keepdim=True).sqrt()         divisor  sqrt(count)
sum(e, 1) / (e.sum(-1) != 0).sum(1).clamp(min=1)      divisor  Max(1, count), counting rows that are not zeros
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.lowering import scalar
from recompile.rewrite import Refuse, arguments, same

from .ids import CASTS
from .pooled_rows import Pooled
from .positions import Axes, Reader, after_view, before_view

aten = torch.ops.aten
_SUMS = (aten.sum.dim_IntList, aten.count_nonzero.dim_IntList)


@dataclass(frozen=True)
class Division:
    """`root`, with its `axes`, divides what is pooled by `divisor`; what is `inside` is gone once that is a bag."""

    root: fx.Node
    axes: Axes
    divisor: sympy.Basic
    count: str = ""
    inside: tuple[fx.Node, ...] = ()


def find_division(pooled: Pooled, lookup: fx.Node, keep: sympy.Basic, reader: Reader) -> Division | None:
    """What divides the sum, as its only user, by the number of kept positions of its part `lookup`."""
    path, total, axes = [], pooled.root, pooled.axes
    while len(total.users) == 1:
        (user,) = total.users
        path.append(total)
        if user.op != "call_function":
            return None
        if user.target is aten.div.Tensor and user.args[0] is total and isinstance(user.args[1], fx.Node):
            break
        after = after_view(user, axes)
        if after is None:
            return None
        total, axes = user, after
    else:
        return None
    divisor, value = user.args[1], user.args[1].meta["val"]
    result, summed = user.meta["val"], total.meta["val"]
    if (
        not isinstance(value, torch.Tensor)
        or not same(result.shape, summed.shape)
        or result.dtype != summed.dtype
    ):
        return None
    count = _Count(lookup, keep, reader)
    expr = count.read(divisor, axes[len(axes) - value.dim() :])
    if expr is None:
        return None
    inside = (*path, *(count.inside if count.nonzero else []))
    return Division(user, axes, expr, "nonzero" if count.nonzero else "", inside)


@dataclass
class _Count:
    """Reads a divisor as an expression of the number of kept positions, or of rows that are not all zeros."""

    lookup: fx.Node
    keep: sympy.Basic
    reader: Reader
    nonzero: bool = False
    inside: list[fx.Node] = field(default_factory=list)

    def read(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        if self.reader.builder.effects.is_written(node):
            return None
        view = before_view(node, axes)
        if view is not None:
            return self._through(node, *view)
        given = arguments(node) if node.op == "call_function" and isinstance(node.target, OpOverload) else {}
        if node.target in CASTS:
            return self._through(node, node.args[0], axes) if _keeps_counts(node) else None
        if node.target in (aten.add.Tensor, aten.add.Scalar) and isinstance(given["other"], int | float):
            inner = self._through(node, node.args[0], axes)
            return None if inner is None or given["alpha"] != 1 else inner + given["other"]
        if node.target in (aten.clamp.default, aten.clamp_min.default) and given.get("max") is None:
            inner = self._through(node, node.args[0], axes)
            known = inner is not None and isinstance(given["min"], int | float)
            return sympy.Max(inner, given["min"]) if known else None
        if node.target is aten.sqrt.default or _is_root(node):
            inner = self._through(node, node.args[0], axes)
            return None if inner is None else sympy.sqrt(inner)
        dims = given.get("dim")
        if node.target in _SUMS and isinstance(dims, list) and len(dims) == 1 and _holds_counts(node):
            spread = (*axes[: dims[0]], "l", *axes[dims[0] + int(given.get("keepdim", False)) :])
            return scalar.symbol("count") if self._counts(node, given["self"], spread) else None
        return None

    def _through(self, node: fx.Node, source: Any, axes: Axes) -> sympy.Basic | None:
        self.inside.append(node)
        return self.read(source, axes)

    def _counts(self, node: fx.Node, summed: fx.Node, axes: Axes) -> bool:
        self.inside.append(node)
        shape = summed.meta["val"].shape
        if len(axes) != len(shape) or not same(shape[axes.index("l")], self.reader.sizes[-1]):
            return False
        if self.keep == sympy.true and self._tells_zeros(summed, axes):
            self.nonzero = True
            return True
        try:
            found = self.reader.element(summed, axes)
        except Refuse:
            return False
        if node.target is aten.count_nonzero.dim_IntList and not scalar.is_truth(found):
            found = sympy.Ne(found, 0)
        return scalar.is_truth(found) and found == self.keep

    def _tells_zeros(self, node: fx.Node, axes: Axes) -> bool:
        """Whether `node` is `rows.sum(-1) != 0`."""
        while node.target in CASTS or before_view(node, axes):
            self.inside.append(node)
            node, axes = before_view(node, axes) or (node.args[0], axes)  # type: ignore[assignment]
        if node.target is not aten.ne.Scalar or node.args[1] != 0:
            return False
        total: Any = node.args[0]
        self.inside += [node, total]
        return (
            total.target is aten.sum.dim_IntList
            and total.args[0] is self.lookup
            and arguments(total)["dim"] == [total.args[0].meta["val"].dim() - 1]
            and tuple(axis for axis in axes if axis) == self.reader.wanted
        )


def _holds_counts(node: fx.Node) -> bool:
    """Whether the dtype of `node` holds numbers of positions, such as no truth and no int8 does."""
    dtype = node.meta["val"].dtype
    return dtype.is_floating_point or dtype in (torch.int64, torch.int32)


def _keeps_counts(node: fx.Node) -> bool:
    """Whether a cast of a number keeps it: one to integers may cut off what was added, or a root's digits."""
    source: Any = node.args[0]
    return _holds_counts(node) and (node.meta["val"].dtype.is_floating_point or not _is_real(source))


def _is_real(node: fx.Node) -> bool:
    return node.meta["val"].dtype.is_floating_point  # type: ignore[no-any-return]


def _is_root(node: fx.Node) -> bool:
    return node.target is aten.pow.Tensor_Scalar and bool(node.args[1] == 0.5)
