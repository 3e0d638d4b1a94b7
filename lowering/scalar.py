"""Scalar code is sympy: what happens to one id, one row or one bag inside a generated kernel.

An expression is kept as text in a region's spec (`"Ne(x0, 0) & (l < x1)"`), parsed once, and printed for the
language at hand: PyTorch (the reference), C++ or Triton. Beyond sympy's own arithmetic, roots and comparisons are
`Mod` with Python's sign rule (that of `torch.remainder`), `floordiv(a, b)` of integers for b > 0, `where(c, a, b)`,
`trunc` (a float id cast to an integer, as `.long()` does), and the symbols that the region defines (`x0`, `l`,
`count`, ...).
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or
from sympy.printing.str import StrPrinter

trunc = sympy.Function("trunc", real=True)
floordiv = sympy.Function("floordiv", real=True)


class Real(sympy.Function):  # type: ignore[misc]
    """A function whose values are real numbers."""

    def _eval_is_real(self) -> bool:
        return True


class where(Real):
    """`where(c, a, b)`: a where c holds, else b."""

    nargs = 3

    @classmethod
    def eval(cls, c: Any, a: Any, b: Any) -> Any:
        if isinstance(c, BooleanTrue) or a == b:
            return a
        return b if isinstance(c, BooleanFalse) else None

    def _eval_derivative(self, x: sympy.Symbol) -> sympy.Expr:
        c, a, b = self.args
        return where(c, a.diff(x), b.diff(x))


OPERATORS = {
    sympy.Eq: "==",
    sympy.Ne: "!=",
    sympy.StrictLessThan: "<",
    sympy.LessThan: "<=",
    sympy.StrictGreaterThan: ">",
    sympy.GreaterThan: ">=",
}


_KNOWN = {
    name: getattr(sympy, name)
    for name in (
        "Eq", "Ne", "And", "Or", "Not", "Max", "Min", "Mod", "Integer", "Float", "sqrt", "true", "false",
    )
} | {"trunc": trunc, "floordiv": floordiv, "where": where}  # fmt: skip


@functools.cache
def symbol(name: str) -> sympy.Symbol:
    """The real-valued symbol of this name (`x0`: the first load of a bag)."""
    return sympy.Symbol(name, real=True)


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> sympy.Basic:
    """The expression that `text` (as printed by `str`) stands for.

    Raises:
        ValueError: the text holds something no printer knows.
    """
    names = set(re.findall(r"[A-Za-z_]\w*", text)) - _KNOWN.keys() - {"e"}
    expr = sympy.sympify(text, locals=_KNOWN | {name: symbol(name) for name in names})
    _reject_unknown(expr)
    return expr


def text(expr: sympy.Basic) -> str:
    """The text that `parse` reads."""
    shown: str = _Printer().doprint(expr)
    return shown.lower() if isinstance(expr, BooleanTrue | BooleanFalse) else shown


_LARGEST = (torch.finfo(torch.float32).max, torch.finfo(torch.float64).max)


class _Printer(StrPrinter):  # type: ignore[misc]
    """As `str`, whose 15 digits round the largest float and double up: masks' numbers, which no infinities are."""

    def _print_Float(self, expr: sympy.Float) -> str:
        shown: str = super()._print_Float(expr)
        too_large = any(abs(float(expr)) <= most < abs(float(shown)) for most in _LARGEST)
        return repr(float(expr)) if too_large else shown


WORDS = (  # what a printer knows
    sympy.Symbol, sympy.Number, sympy.Add, sympy.Mul, sympy.Mod, sympy.Max, sympy.Min,
    Relational, And, Or, Not, BooleanTrue, BooleanFalse, trunc, floordiv, where,
)  # fmt: skip


def _reject_unknown(expr: sympy.Basic) -> None:
    for part in sympy.preorder_traversal(expr):
        if isinstance(part, sympy.Pow) and part.exp in (-1, sympy.S.Half):
            continue
        if not isinstance(part, WORDS):
            raise ValueError(f"{part} ({type(part).__name__}) is not part of the scalar language")


def evaluate(expr: sympy.Basic, env: Mapping[str, torch.Tensor]) -> torch.Tensor | int | float | bool:
    """The value of `expr` with tensors for symbols, broadcast as PyTorch does: the reference meaning."""
    if isinstance(expr, sympy.Symbol):
        return env[expr.name]
    if isinstance(expr, BooleanTrue | BooleanFalse):
        return bool(expr)
    if isinstance(expr, sympy.Number):
        return int(expr) if expr.is_Integer else float(expr)
    args = [evaluate(arg, env) for arg in expr.args]
    return _apply(expr, args)


def _apply(expr: sympy.Basic, args: Sequence[object]) -> torch.Tensor:
    binary: dict[Any, Callable[..., torch.Tensor]] = {
        sympy.Add: torch.add,
        sympy.Mul: torch.mul,
        sympy.Mod: torch.remainder,
        sympy.Max: lambda a, b: torch.clamp(a, min=b),
        sympy.Min: lambda a, b: torch.clamp(a, max=b),
        And: torch.logical_and,
        Or: torch.logical_or,
        sympy.Eq: torch.eq,
        sympy.Ne: torch.ne,
        sympy.StrictLessThan: torch.lt,
        sympy.LessThan: torch.le,
        sympy.StrictGreaterThan: torch.gt,
        sympy.GreaterThan: torch.ge,
    }
    if isinstance(expr, Not):
        return torch.logical_not(_tensor(args[0]))
    if isinstance(expr, trunc):
        return _tensor(args[0]).to(torch.int64)
    if isinstance(expr, floordiv):
        return torch.div(*map(_tensor, args), rounding_mode="floor")
    if isinstance(expr, where):
        condition, a, b = map(_tensor, args)
        return torch.where(condition, a, b)
    if isinstance(expr, sympy.Pow):
        return (torch.sqrt if expr.exp == sympy.S.Half else torch.reciprocal)(_tensor(args[0]))
    op = binary[expr.func]
    first, *rest = sorted(args, key=lambda a: not isinstance(a, torch.Tensor)) if _commutes(expr) else args
    value = _tensor(first)
    for other in rest:
        value = op(value, other)
    return value


def _commutes(expr: sympy.Basic) -> bool:
    return isinstance(expr, sympy.Add | sympy.Mul | sympy.Max | sympy.Min | And | Or | sympy.Eq | sympy.Ne)


def _tensor(value: object) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value)


def to_cpp(expr: sympy.Basic) -> str:
    """`expr` as a C++ expression; symbols print as variables of the same name."""
    return _print(expr, _CPP)


def is_long(expr: sympy.Basic) -> bool:
    """Whether it costs less to load what `expr` computes: a chain of choices doubles with each."""
    return _parts(expr) > 400


@functools.lru_cache(maxsize=4096)
def _parts(expr: sympy.Basic) -> int:
    return 1 + sum(map(_parts, expr.args))


def is_truth(expr: sympy.Basic) -> bool:
    """Whether `expr` is a comparison, or made of comparisons: a boolean in every language."""
    return isinstance(expr, Relational | And | Or | Not | BooleanTrue | BooleanFalse)


def to_triton(expr: sympy.Basic) -> str:
    """`expr` as a Triton expression on blocks; symbols print as variables of the same name."""
    return _print(expr, _TRITON)


# Mod keeps the sign of the divisor; every divisor is a positive constant (checked where ids are read off the graph).
# What `where` chooses between are ids: 64 bits, however small its constants are.
_CPP = {
    "mod": "recompile_mod({0}, {1})",
    "max": "recompile_max({0}, {1})",
    "min": "recompile_min({0}, {1})",
    "and": " && ",
    "or": " || ",
    "not": "!({0})",
    "trunc": "static_cast<int64_t>({0})",
    "floordiv": "recompile_floordiv({0}, {1})",
    "where": "({0} ? int64_t({1}) : int64_t({2}))",
    "sqrt": "std::sqrt({0})",
    "true": "true",
    "false": "false",
}
_TRITON = {
    "mod": "((({0}) % {1} + {1}) % {1})",
    "max": "tl.maximum({0}, {1})",
    "min": "tl.minimum({0}, {1})",
    "and": " & ",
    "or": " | ",
    "not": "(~({0}))",
    "trunc": "({0}).to(tl.int64)",
    "floordiv": "((({0}) - ((({0}) % {1} + {1}) % {1})) // {1})",
    "where": "tl.where({0}, {1}, {2}).to(tl.int64)",
    "sqrt": "tl.sqrt({0})",
    "true": "True",
    "false": "False",
}


def _print(expr: sympy.Basic, words: Mapping[str, str]) -> str:
    if isinstance(expr, sympy.Symbol):
        return str(expr.name)
    if isinstance(expr, BooleanTrue | BooleanFalse):
        return words["true" if expr else "false"]
    if isinstance(expr, sympy.Number):
        return str(int(expr)) if expr.is_Integer else repr(float(expr))
    args = [_print(arg, words) for arg in expr.args]
    if isinstance(expr, Relational):
        return f"({args[0]} {OPERATORS[expr.func]} {args[1]})"
    if isinstance(expr, sympy.Add | sympy.Mul):
        return "(" + (" + " if isinstance(expr, sympy.Add) else " * ").join(args) + ")"
    if isinstance(expr, And | Or):
        return "(" + words["and" if isinstance(expr, And) else "or"].join(args) + ")"
    if isinstance(expr, sympy.Max | sympy.Min):
        form = words["max" if isinstance(expr, sympy.Max) else "min"]
        return functools.reduce(lambda a, b: form.format(a, b), args)
    if isinstance(expr, sympy.Pow):
        return words["sqrt"].format(*args) if expr.exp == sympy.S.Half else f"(1.0 / {args[0]})"
    name = {sympy.Mod: "mod", Not: "not"}.get(expr.func) or expr.func.__name__
    return words[name].format(*args)
