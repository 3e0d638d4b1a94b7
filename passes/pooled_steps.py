"""One step from a looked-up sequence to its pooling: a mask, a weight or a factor that an operator applies."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import sympy
import torch
from torch import fx

from recompile.rewrite import arguments

from .ids import CASTS

aten = torch.ops.aten
LEAST = -1e8  # a maximum filled with this or less is one over the kept rows: tables hold no such numbers


class Step(NamedTuple):
    """Masks or weights `rows`: "weight", "keep", "drop" or "lower", `by` what, with what masked positions then hold.

    Rows are lowered by a large number: what masked positions hold is nearly that, and still learns.
    """

    rows: fx.Node
    what: str
    by: fx.Node
    fill: float
    constants: tuple[fx.Node, ...]  # of which `fill` was read


def steps(node: fx.Node) -> Iterator[Step]:
    """How `node` may mask or weight something."""
    for rows, what, by, fill in _candidates(node):
        value = _constant(fill)
        tensors = (rows, by) if isinstance(rows, fx.Node) and isinstance(by, fx.Node) else ()
        if tensors and value is not None and isinstance(by.meta.get("val"), torch.Tensor):
            yield Step(rows, what, by, value, (fill,) if isinstance(fill, fx.Node) else ())


def _candidates(node: fx.Node) -> list[tuple[Any, str, Any, Any]]:
    target: Any = node.target
    args: Any = node.args
    if target is aten.mul.Tensor:
        return [(args[0], "weight", args[1], 0), (args[1], "weight", args[0], 0)]
    if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return [(args[0], "drop", args[1], args[2])]
    if target in (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        return [(args[1], "keep", args[0], args[2]), (args[2], "drop", args[0], args[1])]
    if target in (aten.sub.Tensor, aten.add.Tensor) and not node.kwargs and _is_product(args[1]):
        mask, large = args[1].args
        fill = -large if target is aten.sub.Tensor else large  # e - (1 - m) * 1e9
        return [(args[0], "lower", mask, fill)] if fill <= LEAST else []
    return []


def _is_product(node: Any) -> bool:
    """Whether `node` is a tensor times a number."""
    product = isinstance(node, fx.Node) and node.target is aten.mul.Tensor
    return product and isinstance(node.args[1], int | float)


def factor(node: fx.Node) -> sympy.Expr | None:
    """The number that `node` multiplies its first argument by."""
    divides = node.target in (aten.div.Tensor, aten.div.Scalar)
    if not divides and node.target not in (aten.mul.Tensor, aten.mul.Scalar):
        return None
    number: Any = node.args[1]
    if type(number) not in (int, float) or not math.isfinite(number) or number == 0:
        return None
    small = (
        number == int(number) and abs(number) < 1 << 10
    )  # products of larger ones may overflow in a kernel
    exact = sympy.Integer(int(number)) if small else sympy.Float(number)
    return 1 / exact if divides else exact


def _constant(value: Any) -> float | None:
    """The number that fills all of a tensor, or that a number is."""
    if isinstance(value, int | float):
        return float(value)
    if not isinstance(value, fx.Node) or value.op != "call_function":
        return None
    target = value.target
    if target in CASTS:
        return _constant(value.args[0])
    if target in (aten.zeros_like.default, aten.zeros.default, aten.new_zeros.default):
        return 0.0
    if target in (aten.scalar_tensor.default, torch.tensor):
        return _constant(value.args[0])
    if target in (aten.full.default, aten.full_like.default, aten.new_full.default):
        return _constant(arguments(value)["fill_value"])
    return None
