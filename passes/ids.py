"""Ids that are computed from other ids: the row of a table, as an expression of what is loaded.

    x[:, 3] * 5 + 7                    row = 5*x0 + 7
    (x % 140) // 20                    row = floordiv(Mod(x0, 140), 20)
    x.masked_fill(x >= 1000, 0)        row = where(x0 >= 1000, 0, x0)

An expression has eager's value for every id. In 64 bits the kernel's numbers overflow as eager's do; what may overflow
in fewer, or may be another number because sympy simplifies as if nothing did, is no expression: it is loaded.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.lowering import scalar
from recompile.rewrite import arguments, same

aten = torch.ops.aten
CASTS = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
    aten._cast_Long.default,
)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPARE: dict[Any, Callable[[Any, Any], sympy.Basic]] = {
    aten.ne: sympy.Ne,
    aten.eq: sympy.Eq,
    aten.gt: sympy.Gt,
    aten.ge: sympy.Ge,
    aten.lt: sympy.Lt,
    aten.le: sympy.Le,
}
LOGIC: dict[Any, Callable[..., sympy.Basic]] = {
    aten.logical_not: sympy.Not,
    aten.bitwise_not: sympy.Not,
    aten.logical_and: sympy.And,
    aten.bitwise_and: sympy.And,
    aten.__and__: sympy.And,
    aten.logical_or: sympy.Or,
    aten.bitwise_or: sympy.Or,
    aten.__or__: sympy.Or,
}
# Of one element of each input: an expression, or None where it would not be exact.
Function = Callable[..., Any]
Step = tuple[Sequence[fx.Node], Function]
Range = tuple[Any, Any]  # the least and the largest value


def ids_of(node: fx.Node, known: dict[fx.Node, Any] | None = None) -> tuple[fx.Node, sympy.Basic]:
    """What `node` computes from each element of another node: that node, and the row as an expression of `x0`.

    Args:
        known: what this is of the nodes that were asked for already.
    """
    known = {} if known is None else known
    if node not in known:
        known[node] = node, scalar.symbol("x0")
        step = id_step(node)
        if step is not None:
            inputs, apply = step
            read = [ids_of(x, known) for x in inputs]
            row = apply(*(row for _, row in read))
            if row is not None and len({source for source, _ in read}) == 1 and not scalar.is_long(row):
                known[node] = read[0][0], row
    source, row = known[node]
    return source, row


def id_step(node: fx.Node) -> Step | None:
    """The nodes that integers (or truths) are computed from element by element, and the function of their elements.

    Casts, arithmetic with constants, comparisons with constants, and choices by them; None for anything else.
    """
    if node.op != "call_function" or not isinstance(node.target, OpOverload) or not node.args:
        return None
    dtype = _dtype(node)
    found = _truth(node) if dtype is torch.bool else _number(node) if dtype in INTEGERS else None
    if found is None or not all(same(x.meta["val"].shape, node.meta["val"].shape) for x in found[0]):
        return None
    inputs, apply = found
    return inputs, lambda *elements: _exact(dtype, inputs, elements, apply)


def _exact(dtype: torch.dtype, inputs: Sequence[fx.Node], elements: Sequence[Any], apply: Function) -> Any:
    """`apply(*elements)`, or None where eager may have another number."""
    if any(scalar.is_truth(e) != (_dtype(x) is torch.bool) for e, x in zip(elements, inputs, strict=True)):
        return None
    value = apply(*elements)
    if value is None or dtype is torch.bool:
        return value
    written = value.atoms(sympy.Integer)  # constants add up beyond what a kernel can write
    if any(abs(number) > torch.iinfo(torch.int64).max for number in written):
        return None
    if dtype is torch.int64:
        return value
    of = {sympy.Dummy(real=True): _range(e, x) for e, x in zip(elements, inputs, strict=True)}
    low, high = bounds(apply(*of), of)
    return value if _holds(dtype, low) and _holds(dtype, high) else None


def _range(element: Any, node: fx.Node) -> Range:
    """The range of an element of `node`, which has no more bits than its dtype."""
    dtype = _dtype(node)
    if dtype not in INTEGERS:
        return -sympy.oo, sympy.oo
    low, high = bounds(element)
    return max(low, torch.iinfo(dtype).min), min(high, torch.iinfo(dtype).max)


def _holds(dtype: torch.dtype, number: Any) -> bool:
    return bool(torch.iinfo(dtype).min <= number <= torch.iinfo(dtype).max)


def bounds(expr: Any, of: Mapping[Any, Range] | None = None) -> Range:
    """The range of an integer expression; symbols have the ranges `of`, or 64 bits."""
    if expr.is_Integer:
        return int(expr), int(expr)
    if isinstance(expr, scalar.where):
        return _hull([x for part in expr.args[1:] for x in bounds(part, of)])
    parts = [bounds(part, of) for part in expr.args]
    if isinstance(expr, sympy.Mod):
        return 0, parts[1][1] - 1
    if isinstance(expr, (sympy.Max, sympy.Min)):
        most: Any = max if isinstance(expr, sympy.Max) else min
        return most(low for low, _ in parts), most(high for _, high in parts)
    if isinstance(expr, sympy.Add):
        return sum(low for low, _ in parts), sum(high for _, high in parts)
    if isinstance(expr, (sympy.Mul, scalar.floordiv)):
        join = operator.mul if isinstance(expr, sympy.Mul) else operator.floordiv
        return functools.reduce(lambda a, b: _hull([join(x, y) for x in a for y in b]), parts)
    info = torch.iinfo(torch.int64)
    return (of or {}).get(expr, (info.min, info.max))


def _hull(numbers: Sequence[Any]) -> Range:
    return min(numbers), max(numbers)


def _overflows(expr: Any) -> bool:
    """Whether a sum or product in it may not fit 64 bits."""
    sums = [part for part in sympy.preorder_traversal(expr) if isinstance(part, (sympy.Add, sympy.Mul))]
    return not all(_holds(torch.int64, end) for part in sums for end in bounds(part))


def _modulo(x: Any, n: int) -> Any:
    found = sympy.Mod(x, n) if n > 0 else None
    as_it_is = isinstance(found, sympy.Mod) and found.args[0] == x
    return found if as_it_is or found is None or not (_overflows(x) or _overflows(found)) else None


def _floor(x: Any, n: int, rounding_mode: str | None = "floor") -> Any:
    return scalar.floordiv(x, n) if rounding_mode == "floor" and n > 0 else None


def _clamp(x: Any, low: int | None = None, high: int | None = None) -> Any:
    x = x if low is None else sympy.Max(x, low)
    return x if high is None else sympy.Min(x, high)


# Arithmetic on ids: the operator's arguments after the first, all constants.
_ON_IDS: dict[Any, Function] = {
    aten.add: lambda x, number, alpha: x + number * alpha,
    aten.sub: lambda x, number, alpha: x - number * alpha,
    aten.mul: lambda x, number: x * number,
    aten.remainder: _modulo,
    aten.floor_divide: _floor,
    aten.div: _floor,
    aten.abs: lambda x: sympy.Max(x, -x),
    aten.__and__: lambda x, mask: _modulo(x, mask + 1) if mask & (mask + 1) == 0 else None,  # the lowest bits
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: lambda x, high: _clamp(x, None, high),
}


def _number(node: fx.Node) -> Step | None:
    """Integers: a cast, arithmetic, a choice between two by a condition."""
    source, dtype, packet = node.args[0], _dtype(node), node.target.overloadpacket  # type: ignore[union-attr]
    if packet in (aten.where, aten.masked_fill) and len(node.args) == 3:
        return _choice(*node.args) if packet is aten.where else _choice(*(node.args[k] for k in (1, 2, 0)))
    if not isinstance(source, fx.Node):
        return None
    if node.target in CASTS:
        if _dtype(source).is_floating_point:
            return ([source], scalar.trunc) if dtype is torch.int64 else None
        return ([source], lambda x: x) if _dtype(source) in INTEGERS else None
    apply, rest = _ON_IDS.get(packet), [value for name, value in arguments(node).items() if name != "self"]
    numbers = [x for x in rest if x is not None and not isinstance(x, str)]
    if apply is None or _dtype(source) is not dtype or not all(is_constant(x, dtype) for x in numbers):
        return None
    return [source], lambda x: apply(x, *rest)


def _choice(condition: Any, *either: Any) -> Step | None:
    """`where(condition, a, b)`, each a node or a number."""
    either = tuple(_filling(x) for x in either)
    nodes = [x for x in either if isinstance(x, fx.Node)]
    if not isinstance(condition, fx.Node) or _dtype(condition) is not torch.bool or not nodes:
        return None
    dtype = _dtype(nodes[0])
    if not all(_dtype(x) is dtype if isinstance(x, fx.Node) else is_constant(x, dtype) for x in either):
        return None

    def choose(c: Any, *elements: Any) -> Any:
        left = iter(elements)
        return scalar.where(c, *(next(left) if isinstance(x, fx.Node) else x for x in either))

    return [condition, *nodes], choose


def _filling(x: Any) -> Any:
    """The number that fills all of `x`, or `x`."""
    target = x.target if isinstance(x, fx.Node) else None
    if target in (aten.zeros.default, aten.zeros_like.default):
        return 0
    return x.args[1] if target in (aten.full.default, aten.full_like.default) else x


def _truth(node: fx.Node) -> Step | None:
    """Truths: a comparison of integers with a constant, and what joins them."""
    first, *others = node.args
    packet = node.target.overloadpacket  # type: ignore[union-attr]
    if packet in COMPARE and isinstance(first, fx.Node) and _dtype(first) in INTEGERS:
        (number,) = others
        compare = COMPARE[packet]
        return ([first], lambda x: compare(x, number)) if is_constant(number, _dtype(first)) else None
    nodes = [x for x in node.args if isinstance(x, fx.Node) and _dtype(x) is torch.bool]
    return (nodes, LOGIC[packet]) if packet in LOGIC and len(nodes) == len(node.args) else None


def is_constant(x: Any, dtype: torch.dtype) -> bool:
    """Whether it is a number that `dtype` holds."""
    return type(x) is int and _holds(dtype, x)


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype
