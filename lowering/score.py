"""The score language: what happens between two contractions, for one query i and one key j, as sympy.

It extends the scalar language (`scalar.py`) by functions of real numbers. Symbols are

    s           the dot product of query i and key j
    i, j, M, N  the positions of query and key, and how many there are
    x0, x1 ..   a loaded real number; n0, n1, ... a loaded integer (a truth is loaded as 1 or 0)
    T0(e) ..    the element at e of a table of real numbers

and functions beyond sympy's own arithmetic, exp, log, tanh, Abs and sign:

    where(c, a, b)   a where c holds, else b; differentiable in a and b
    sigmoid(x)
    erf(x)           the error function
    log2(x), log10(x)
    floor(x), nearest(x)    a whole number, a real one; halves go to the even one
    div(a, b)        a / b, rounded once (sympy would multiply by a rounded 1 / b, and change a bucket's border)
    trunc(x)         the integer that a cast makes of x
    floordiv(a, b)   of integers, b > 0
    atleast(x, b), atmost(x, b)    clamped; written so in text only
    uniform(n, i, j)   a random number in [0, 1), a hash of a seed and a pair: what dropout draws
"""

import functools
import math
import re
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from sympy.core.function import UndefinedFunction
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from recompile.lowering import scalar
from recompile.lowering.scalar import floordiv as floordiv
from recompile.lowering.scalar import symbol as symbol
from recompile.lowering.scalar import trunc as trunc
from recompile.lowering.scalar import where as where

wide = sympy.Function("wide", real=True)  # an integer with 64 bits: of `score_bounds.widened`, in no text

S, I, J, M, N = map(symbol, ("s", "i", "j", "M", "N"))  # noqa: E741


class sigmoid(scalar.Real):
    """`1 / (1 + exp(-x))`."""

    nargs = 1

    @classmethod
    def eval(cls, x: Any) -> Any:
        return sympy.N(1 / (1 + sympy.exp(-x))) if x.is_number else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return self * (1 - self)


class erf(scalar.Real):
    """The error function."""

    nargs = 1

    @classmethod
    def eval(cls, x: Any) -> Any:
        return sympy.N(sympy.erf(x)) if x.is_number else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return sympy.Float(2 / math.sqrt(math.pi)) * sympy.exp(-(self.args[0] ** 2))


class _Logarithm(scalar.Real):
    """To a base of whose powers it is exact, unlike `log(x) / log(base)`."""

    nargs = 1
    BASE = 0

    @classmethod
    def eval(cls, x: Any) -> Any:
        if not x.is_number or not x >= 0:
            return None
        return sympy.N(sympy.log(x, cls.BASE)) if x > 0 else -sympy.oo

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        return 1 / (self.args[0] * sympy.Float(math.log(self.BASE)))


class log2(_Logarithm):
    """The logarithm to the base of 2."""

    BASE = 2


class log10(_Logarithm):
    """The logarithm to the base of 10."""

    BASE = 10


class _Whole(scalar.Real):
    """A whole number, real by its kind: it changes in steps."""

    nargs = 1

    def _eval_derivative(self, x: sympy.Symbol) -> sympy.Expr:
        return sympy.Integer(0)


class floor(_Whole):
    """The greatest one that is not above x."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        return sympy.floor(x) if x.is_number else None


class nearest(_Whole):
    """The nearest one, of two the even one."""

    @classmethod
    def eval(cls, x: Any) -> Any:
        return sympy.Integer(round(float(x))) if x.is_number and x.is_finite else None


class div(scalar.Real):
    """`a / b`."""

    nargs = 2

    @classmethod
    def eval(cls, a: Any, b: Any) -> Any:
        return a if b == 1 else None

    def fdiff(self, argindex: int = 1) -> sympy.Expr:
        a, b = self.args
        return 1 / b if argindex == 1 else -a / b**2


class atleast(scalar.Real):
    """`where(x < b, b, x)`: `clamp(x, min=b)`, short in text; `parse` spells it out."""

    nargs = 2

    @classmethod
    def eval(cls, x: Any, b: Any) -> Any:
        return sympy.Max(x, b) if x.is_number and b.is_number else None


class atmost(scalar.Real):
    """`where(x > b, b, x)`."""

    nargs = 2

    @classmethod
    def eval(cls, x: Any, b: Any) -> Any:
        return sympy.Min(x, b) if x.is_number and b.is_number else None


class uniform(scalar.Real):
    """`bits >> 8` over 2^24, with `bits = mix(mix(n + i * ROW) ^ mix(j * COLUMN))` in 32 bits and mix

        x ^= x >> 16;  x *= 0x7feb352d;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16

    which changes half of the result's bits for each bit of its argument. Every kernel computes the same numbers.
    """

    nargs = 3
    ROW, COLUMN, MIX = 0x9E3779B9, 0x85EBCA6B, ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))

    def _eval_derivative(self, x: sympy.Symbol) -> sympy.Expr:
        return sympy.Integer(0)


_CALLS: dict[str, Any] = {
    "where": where,
    "uniform": uniform,
    "sigmoid": sigmoid,
    "erf": erf,
    "log2": log2,
    "log10": log10,
    "floor": floor,
    "nearest": nearest,
    "div": div,
    "trunc": trunc,
    "floordiv": floordiv,
    "atleast": atleast,
    "atmost": atmost,
} | {
    name: getattr(sympy, name)
    for name in (
        "Eq", "Ne", "And", "Or", "Not", "Max", "Min", "Mod", "Integer", "Float", "true", "false",
        "exp", "log", "tanh", "Abs", "sign", "sqrt", "oo", "nan", "E",
    )
}  # fmt: skip
_REAL = (
    sympy.exp,
    sympy.log,
    sympy.tanh,
    sympy.Abs,
    sympy.sign,
    sympy.Pow,
    where,
    sigmoid,
    erf,
    log2,
    log10,
    floor,
    nearest,
    div,
    floordiv,
    uniform,
)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> sympy.Basic:
    """The expression that `text` (as printed by `scalar.text`) stands for.

    Raises:
        ValueError: the text holds something no printer knows.
    """
    names = set(re.findall(r"[A-Za-z_]\w*", text)) - _CALLS.keys() - {"e"}
    known = {name: table(name) if name[0] == "T" else symbol(name) for name in names}
    expr = sympy.sympify(text, locals=_CALLS | known)
    expr = expr.replace(atleast, lambda x, b: where(x < b, b, x)).replace(
        atmost, lambda x, b: where(x > b, b, x)
    )
    for part in sympy.preorder_traversal(expr):
        if not isinstance(part, (*_REAL, *scalar.WORDS, sympy.exp)) and not is_table(part):
            raise ValueError(f"{part} ({type(part).__name__}) is not part of the score language")
    return expr


def table(name: str) -> Any:
    """The table of this name: `table("T0")(i - j)` is a load from it."""
    return sympy.Function(name, real=True)


def is_table(expr: sympy.Basic) -> bool:
    """Whether it is a load from a table: `T0(...)`."""
    return isinstance(type(expr), UndefinedFunction) and bool(re.fullmatch(r"T\d+", type(expr).__name__))


def tables_in(expr: sympy.Basic) -> list[sympy.Basic]:
    """The loads from tables in `expr`, innermost first."""
    return list(dict.fromkeys(part for part in sympy.postorder_traversal(expr) if is_table(part)))


def diff(expr: sympy.Basic, by: sympy.Basic) -> sympy.Basic:
    """The derivative of `expr` by a symbol, or by a load from a table; what is cut to integers has none."""
    parts = [part for part in sympy.preorder_traversal(expr) if is_table(part) or isinstance(part, trunc)]
    stand_ins = {part: sympy.Dummy(real=True) for part in parts}
    found = expr.xreplace(stand_ins).diff(stand_ins.get(by, by))
    return found.xreplace({stand_in: part for part, stand_in in stand_ins.items()})


def times(factor: sympy.Basic, expr: sympy.Basic) -> sympy.Basic:
    """`factor * expr`, which is 0 where `expr` is a `where` that chose 0, also for an infinite factor."""
    if expr == 0:
        return sympy.Integer(0)
    if isinstance(expr, where):
        c, a, b = expr.args
        return where(c, times(factor, a), times(factor, b))
    if isinstance(expr, sympy.Mul) and any(isinstance(part, where) for part in expr.args):
        inner = next(part for part in expr.args if isinstance(part, where))
        return times(factor * sympy.Mul(*[part for part in expr.args if part is not inner]), inner)
    return factor * expr


def kind(expr: sympy.Basic) -> str:
    """What `expr` is: "truth", "integer" or "real"."""
    if scalar.is_truth(expr):
        return "truth"
    if isinstance(expr, sympy.Symbol):
        return "integer" if re.fullmatch(r"[ijMN]|n\d+(_low|_high)?|integer\d+", expr.name) else "real"
    if isinstance(expr, sympy.Number):
        return "integer" if expr.is_Integer else "real"
    if isinstance(expr, (trunc, floordiv, wide)):
        return "integer"
    whole = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.Mod, sympy.Abs, sympy.sign)
    if isinstance(expr, (atleast, atmost)):
        return "real"
    if isinstance(expr, where):
        return "integer" if all(kind(part) == "integer" for part in expr.args[1:]) else "real"
    if isinstance(expr, sympy.Pow):
        return kind(expr.base) if expr.exp.is_Integer and expr.exp > 0 else "real"
    return "integer" if isinstance(expr, whole) and all(kind(a) == "integer" for a in expr.args) else "real"


def evaluate(expr: sympy.Basic, env: Mapping[str, torch.Tensor]) -> Any:
    """The value of `expr`, with tensors for symbols, and for tables tensors whose last dim is read: the
    reference meaning."""
    if isinstance(expr, sympy.Symbol):
        return env[expr.name]
    if is_table(expr):
        return _read(env[type(expr).__name__], evaluate(expr.args[0], env))
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return bool(expr)
    if isinstance(expr, sympy.Number) or expr in (sympy.oo, -sympy.oo, sympy.nan, sympy.E):
        return int(expr) if expr.is_Integer else float(expr)
    args = [evaluate(arg, env) for arg in expr.args]
    if isinstance(expr, (*_REAL, sympy.Mod, Not, trunc)):
        return _applied(expr, *args)
    known = next((_JOINED[cls] for cls in _JOINED if isinstance(expr, cls)), None)
    if known is None:
        raise ValueError(f"{expr} ({type(expr).__name__}) is not part of the score language")
    return functools.reduce(known, args)


_JOINED: dict[Any, Any] = {
    sympy.Add: lambda a, b: a + b,
    sympy.Mul: lambda a, b: a * b,
    sympy.Max: lambda a, b: torch.maximum(*_pair(a, b)),
    sympy.Min: lambda a, b: torch.minimum(*_pair(a, b)),
    And: lambda a, b: torch.logical_and(*_pair(a, b)),
    Or: lambda a, b: torch.logical_or(*_pair(a, b)),
    sympy.Eq: lambda a, b: a == b,
    sympy.Ne: lambda a, b: a != b,
    sympy.StrictLessThan: lambda a, b: a < b,
    sympy.LessThan: lambda a, b: a <= b,
    sympy.StrictGreaterThan: lambda a, b: a > b,
    sympy.GreaterThan: lambda a, b: a >= b,
}


def _applied(expr: sympy.Basic, *args: Any) -> Any:
    if isinstance(expr, where):
        return torch.where(*map(_tensor, args))
    if isinstance(expr, div):
        return args[0] / args[1]
    if isinstance(expr, uniform):
        return _uniform(*map(_tensor, args))
    if isinstance(expr, sympy.Pow):
        return args[0] ** args[1] if args[1] > 0 else _one(args[0]) / args[0] ** -args[1]
    if isinstance(expr, floordiv):
        return torch.div(*args, rounding_mode="floor")
    if isinstance(expr, sympy.Mod):
        return torch.remainder(*args)
    if isinstance(expr, trunc):
        return _tensor(args[0]).to(torch.int64)
    if isinstance(expr, Not):
        return torch.logical_not(_tensor(args[0]))
    name = {"Abs": "abs", "nearest": "round"}.get(type(expr).__name__, type(expr).__name__)
    return getattr(torch, name)(_tensor(args[0]))


def _one(like: Any) -> Any:
    """A 1 that is divided by `like`: by integers in float64, which gives way to a real score's dtype."""
    return (
        torch.tensor(1.0, dtype=torch.float64)
        if torch.is_tensor(like) and not like.is_floating_point()
        else 1
    )


def _uniform(seed: torch.Tensor, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    bits = _mixed(_mixed(seed + i * uniform.ROW) ^ _mixed(j * uniform.COLUMN))
    return (bits >> 8).to(torch.float32) / 2**24


def _mixed(x: torch.Tensor) -> torch.Tensor:
    x = x.to(torch.int64) & 0xFFFFFFFF
    for shift, factor in uniform.MIX:
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x


def _read(table: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Element `index` of the last dim, for every batch index: `[*batch, T]`, `[*batch, M, N]`."""
    index = torch.atleast_2d(_tensor(index))  # type: ignore[no-untyped-call]
    batch = torch.broadcast_shapes(table.shape[:-1], index.shape[:-2])  # type: ignore[no-untyped-call]
    index = index.expand(*batch, *index.shape[-2:])
    rows = table.expand(*batch, table.shape[-1])
    return rows.gather(-1, index.flatten(-2)).view(index.shape)


def _pair(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = _tensor(a), _tensor(b)
    dtype = torch.result_type(a, b)
    return a.to(dtype), b.to(dtype)


def _tensor(value: Any) -> torch.Tensor:
    """Numbers are float64: they are exact, and with a tensor that has dims its dtype wins."""
    if isinstance(value, torch.Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)
