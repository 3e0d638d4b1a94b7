"""Elementwise operators as expressions of the score language, one operand a symbol.

Truths take part in arithmetic as PyTorch's booleans do: `x * mask` is `where(mask, x, 0)`, `1 - mask` is
`where(mask, 0, 1)`. Gradients are eager's by construction, also at kinks: `clamp` is a `where`, as are
the activations in `score_activations.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import sympy
import torch
from torch import fx

from recompile.lowering import scalar
from recompile.lowering.score import (
    atleast,
    atmost,
    div,
    erf,
    floor,
    floordiv,
    kind,
    log2,
    log10,
    nearest,
    sigmoid,
    trunc,
    where,
)
from recompile.rewrite import Refuse, arguments

from . import score_activations as activations
from .score_relations import related

aten = torch.ops.aten
Expr: TypeAlias = sympy.Basic


def apply(node: fx.Node, operand: Callable[[Any], Expr]) -> Expr | None:
    """What an elementwise `node` is, `operand` giving the expression of each of its tensors; None if unknown."""
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or packet not in _OPS:
        return None
    given = arguments(node)
    if any(given.get(name) not in (None, value) for name, value in _IGNORED.items()):
        return None
    return _OPS[packet](given, lambda x: operand(x) if isinstance(x, fx.Node) else number(x))


_IGNORED = {"memory_format": torch.preserve_format}


def number(value: Any) -> Expr:
    """A Python number as an expression.

    Raises:
        Refuse: it is something else.
    """
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if not isinstance(value, float):
        raise Refuse(f"{value!r} among the scores is no real number")
    if value in (float("inf"), float("-inf")):
        return sympy.oo if value > 0 else -sympy.oo
    return sympy.Integer(int(value)) if value.is_integer() and abs(value) < 2**24 else sympy.Float(value)


def real(expr: Expr) -> Expr:
    """A truth as 1 or 0, anything else as it is."""
    return where(expr, sympy.Integer(1), sympy.Integer(0)) if scalar.is_truth(expr) else expr


def truth(expr: Expr) -> Expr:
    """Whether a number is not 0."""
    if scalar.is_truth(expr):
        return expr
    if isinstance(expr, where) and all(part.is_number for part in expr.args[1:]):
        c, a, b = expr.args
        return sympy.Or(sympy.And(c, a != 0), sympy.And(sympy.Not(c), b != 0))
    return sympy.Ne(expr, 0)


def choose(condition: Expr, new: Expr, old: Expr) -> Expr:
    """`new` where the condition holds, as a truth if `old` is one, else `old`."""
    if scalar.is_truth(old):
        return sympy.Or(sympy.And(condition, truth(new)), sympy.And(sympy.Not(condition), old))
    return where(sympy.Not(condition), old, real(new))


def _lifted(function: Callable[..., Expr]) -> Callable[..., Expr]:
    """`f(where(c, 1, 0), 2)` is `where(c, f(1, 2), f(0, 2))`: masks made by arithmetic stay masks."""

    def lifted(*args: Expr) -> Expr:
        chosen = {a.args[0] for a in args if isinstance(a, where)}
        constant = all(part.is_number for a in args for part in (a.args[1:] if isinstance(a, where) else [a]))
        if len(chosen) != 1 or not constant:
            return function(*args)
        sides = ([a.args[k] if isinstance(a, where) else a for a in args] for k in (1, 2))
        return where(chosen.pop(), *(function(*side) for side in sides))

    return lifted


@_lifted
def plus(a: Expr, b: Expr) -> Expr:
    """a + b."""
    return a + b


@_lifted
def minus(a: Expr, b: Expr) -> Expr:
    """a - b."""
    return a - b


@_lifted
def over(a: Expr, b: Expr) -> Expr:
    """a / b, rounded once since it may become an index; with the score in it a * (1 / b), rounded twice."""
    scores = {s.name for s in a.free_symbols | b.free_symbols} & {"s", "p"}
    return a / b if scores or b == 0 else div(a, b)


def product(a: Expr, b: Expr) -> Expr:
    """a * b, also of truths."""
    if scalar.is_truth(a) and scalar.is_truth(b):
        return sympy.And(a, b)
    a, b = real(a), real(b)
    for mask, other in ((a, b), (b, a)):
        if isinstance(mask, where) and mask.args[1:] in ((1, 0), (0, 1)) and not other.is_number:
            c = mask.args[0] if mask.args[1] == 1 else sympy.Not(mask.args[0])
            if isinstance(other, where) and 0 in other.args[1:] and all(x.is_number for x in other.args[1:]):
                inner, x, y = other.args  # two masks are one, which can be told apart
                both = sympy.And(c, inner if y == 0 else sympy.Not(inner))
                return where(both, x if y == 0 else y, sympy.Integer(0))
            return where(c, other, sympy.Integer(0))
    return _lifted(lambda x, y: x * y)(a, b)


def _add(sign: int) -> Callable[..., Expr]:
    def add(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
        b, a = of(given["other"]), of(given["self"])
        if scalar.is_truth(a) and scalar.is_truth(b):
            return sympy.Or(a, b) if given["alpha"] == 1 else None  # True + True is True
        scaled = product(number(given["alpha"]), real(b))
        return (plus if sign > 0 else minus)(real(a), scaled)

    return add


def _rsub(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
    return minus(real(of(given["other"])), product(number(given["alpha"]), real(of(given["self"]))))


def _divide(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
    a, b, mode = real(of(given["self"])), real(of(given["other"])), given.get("rounding_mode")
    if mode is None:
        return over(a, b)
    if not kind(a) == kind(b) == "integer":
        return _toward_zero(over(a, b)) if mode == "trunc" else None  # eager's floor is no quotient's
    if not (b.is_Integer and b > 0):
        return None
    down = floordiv(a, b)
    return down if mode == "floor" else where(a < 0, -floordiv(-a, b), down)


def _remainder(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
    a, b = real(of(given["self"])), real(of(given["other"]))
    whole = kind(a) == kind(b) == "integer" and b.is_Integer and b > 0
    return sympy.Mod(a, b) if whole else None


def _whole(function: Callable[[Expr], Expr]) -> Callable[..., Expr | None]:
    """What a real number is rounded to; an integer stays."""

    def rounded(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
        x = real(of(given["self"]))
        if given.get("decimals", 0) != 0:
            return None
        return x if kind(x) == "integer" else _lifted(function)(x)

    return rounded


def _toward_zero(x: Expr) -> Expr:
    return where(x < 0, -floor(-x), floor(x))


def _unary(function: Callable[[Expr], Expr]) -> Callable[..., Expr]:
    return lambda given, of: _lifted(function)(real(of(given["self"])))


def _binary(function: Callable[[Expr, Expr], Expr]) -> Callable[..., Expr]:
    return lambda given, of: function(of(given["self"]), of(given["other"]))


def _compare(relation: Any) -> Callable[..., Expr]:
    return lambda given, of: related(relation, real(of(given["self"])), real(of(given["other"])))


def _clamp(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
    x = real(of(given["self"]))
    low, high = given.get("min"), given.get("max")
    for bound, below in ((low, True), (high, False)):
        if bound is not None:
            b = real(of(bound))
            chosen = sympy.Max(x, b) if below else sympy.Min(x, b)
            x = chosen if kind(chosen) == "integer" else (atleast if below else atmost)(x, b)
    return x


def _power(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
    base, exponent = real(of(given["self"])), of(given["exponent"])
    if not exponent.is_number and base.is_number and base > 0:
        return sympy.exp(exponent * sympy.Float(math.log(float(base))))
    return base**exponent if exponent.is_number and (exponent.is_Integer or exponent == 0.5) else None


def _where(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
    return where(truth(of(given["condition"])), real(of(given["self"])), real(of(given["other"])))


def _masked_fill(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
    return choose(truth(of(given["mask"])), of(given["value"]), of(given["self"]))


def _activation(function: Callable[..., Expr], *names: str) -> Callable[..., Expr]:
    """An activation function with numbers as parameters: their names, where the operator has them."""

    def activation(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
        known = {name: number(given[name]) for name in names if name in given}
        return function(real(of(given["self"])), **known)

    return activation


def _gelu(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr:
    function = activations.gelu_by_tanh if given["approximate"] == "tanh" else activations.gelu
    return function(real(of(given["self"])))


def _extreme(greater: bool) -> Callable[..., Expr | None]:
    """The greater (or lesser) of two. At a tie of real numbers it is their mean: each has half of the gradient."""

    def extreme(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
        if not isinstance(given.get("other"), fx.Node):  # the maximum of one tensor
            return None
        a, b = real(of(given["self"])), real(of(given["other"]))
        first, second = (a > b, a < b) if greater else (a < b, a > b)
        if kind(a) == kind(b) == "integer":
            return where(first, a, b)
        return where(first, a, where(second, b, a / 2 + b / 2))

    return extreme


def _invert(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
    x = of(given["self"])
    return sympy.Not(x) if scalar.is_truth(x) else None  # ~1 is -2


def _differ(a: Expr, b: Expr) -> Expr:
    return sympy.Or(sympy.And(a, sympy.Not(b)), sympy.And(sympy.Not(a), b))


def _bits(joined: Any) -> Callable[..., Expr | None]:
    def join(given: dict[str, Any], of: Callable[[Any], Expr]) -> Expr | None:
        a, b = of(given["self"]), of(given["other"])
        return joined(a, b) if scalar.is_truth(a) and scalar.is_truth(b) else None

    return join


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """`expr` as a number of another dtype."""
    if dtype is torch.bool:
        return truth(expr)
    expr = real(expr)
    if dtype.is_floating_point or kind(expr) == "integer":
        return expr
    return trunc(expr)


_OPS: dict[Any, Callable[..., Expr | None]] = {
    aten.add: _add(1),
    aten.sub: _add(-1),
    aten.rsub: _rsub,
    aten.mul: _binary(product),
    aten.div: _divide,
    aten.floor_divide: lambda given, of: _divide({**given, "rounding_mode": "floor"}, of),
    aten.remainder: _remainder,
    aten.floor: _whole(floor),
    aten.ceil: _whole(lambda x: -floor(-x)),
    aten.round: _whole(nearest),
    aten.trunc: _whole(_toward_zero),
    aten.neg: _unary(lambda x: -x),
    aten.abs: _unary(sympy.Abs),
    aten.exp: _unary(sympy.exp),
    aten.log: _unary(lambda x: sympy.log(x) if x != 0 else -sympy.oo),
    aten.log2: _unary(log2),
    aten.log10: _unary(log10),
    aten.log1p: _unary(lambda x: sympy.log(1 + x)),
    aten.sqrt: _unary(sympy.sqrt),
    aten.rsqrt: _unary(lambda x: 1 / sympy.sqrt(x)),
    aten.square: _unary(lambda x: x**2),
    aten.reciprocal: _unary(lambda x: 1 / x),
    aten.pow: _power,
    aten.tanh: _unary(sympy.tanh),
    aten.sigmoid: _unary(sigmoid),
    aten.silu: _unary(lambda x: x * sigmoid(x)),
    aten.relu: _activation(activations.relu),
    aten.leaky_relu: _activation(activations.leaky_relu, "negative_slope"),
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: _clamp,
    aten.maximum: _extreme(greater=True),
    aten.max: _extreme(greater=True),
    aten.minimum: _extreme(greater=False),
    aten.min: _extreme(greater=False),
    aten.hardtanh: _activation(activations.hardtanh, "min_val", "max_val"),
    aten.relu6: _activation(activations.relu6),
    aten.hardsigmoid: _activation(activations.hardsigmoid),
    aten.hardswish: _activation(activations.hardswish),
    aten.elu: _activation(activations.elu, "alpha", "scale", "input_scale"),
    aten.celu: _activation(activations.celu, "alpha"),
    aten.selu: _activation(activations.selu),
    aten.softplus: _activation(activations.softplus, "beta", "threshold"),
    aten.log_sigmoid: _activation(activations.log_sigmoid),
    aten.mish: _activation(activations.mish),
    aten.gelu: _gelu,
    aten.erf: _unary(erf),
    aten.where: _where,
    aten.masked_fill: _masked_fill,
    aten.eq: _compare(sympy.Eq),
    aten.ne: _compare(sympy.Ne),
    aten.lt: _compare(sympy.Lt),
    aten.le: _compare(sympy.Le),
    aten.gt: _compare(sympy.Gt),
    aten.ge: _compare(sympy.Ge),
    aten.bitwise_not: _invert,
    aten.logical_not: lambda given, of: sympy.Not(truth(of(given["self"]))),
    aten.logical_and: lambda given, of: sympy.And(truth(of(given["self"])), truth(of(given["other"]))),
    aten.logical_or: lambda given, of: sympy.Or(truth(of(given["self"])), truth(of(given["other"]))),
    aten.logical_xor: lambda given, of: _differ(truth(of(given["self"])), truth(of(given["other"]))),
    aten.bitwise_and: _bits(sympy.And),
    aten.__and__: _bits(sympy.And),
    aten.bitwise_or: _bits(sympy.Or),
    aten.__or__: _bits(sympy.Or),
    aten.bitwise_xor: _bits(_differ),
    aten.__xor__: _bits(_differ),
}
KNOWN = frozenset(_OPS)
