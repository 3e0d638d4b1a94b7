"""The score language as Triton: one statement a value, on blocks of queries times keys.

Symbols print as variables of the same name, whose shapes broadcast: i is `[BLOCK_M, 1]` and j `[1, BLOCK_N]`, or the
other way round. What occurs in several places is computed once, as `t0`, `t1`, ... It is found by structure, not by
`sympy.cse`: that would put symbols without a kind (`score.kind`) into expressions.

Infinities, NaN and rounding are those of eager where it matters: Max and Min pass NaN on, `div` is correctly rounded.
exp and log are the hardware's approximations, as in Inductor's own kernels.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import sympy
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from recompile.lowering import scalar
from recompile.lowering.score import (
    div,
    erf,
    floor,
    floordiv,
    is_table,
    kind,
    log2,
    log10,
    nearest,
    sigmoid,
    trunc,
    uniform,
    where,
    wide,
)

LOG2E = 1 / math.log(2)

# The statements that read a table, and the text of the value: `(table, index, its text) -> (lines, text)`.
ReadTable = Callable[[str, sympy.Basic, str], tuple[list[str], str]]
# Whether an expression of reals surely fits into 32 bits once truncated, or one of integers is never negative.
Known = Callable[[sympy.Basic], bool]


class Statements:
    """Statements for several expressions, which share what they have in common.

    Args:
        exprs: all that will be asked for.
        read: how a table is read.
        small: whether a real number's integer part surely fits into 32 bits.
        positive: whether an integer is surely not negative.
    """

    def __init__(self, exprs: Iterable[sympy.Basic], read: ReadTable, small: Known, positive: Known) -> None:
        self._read, self._small, self._positive = read, small, positive
        self._shared = _occurring_twice(exprs)
        self._names: dict[sympy.Basic, str] = {}
        self._lines: list[str] = []

    def define(self, name: str, expr: sympy.Basic) -> list[str]:
        """The statements that set `name` to the value of `expr`."""
        text = self._text(expr)
        lines, self._lines = [*self._lines, f"{name} = {bare(text)}"], []
        return lines

    def value(self, expr: sympy.Basic) -> tuple[list[str], str]:
        """The statements that compute `expr`, and the text of its value, in parentheses where it needs them."""
        text = self._text(expr)
        lines, self._lines = self._lines, []
        return lines, text

    def _text(self, expr: sympy.Basic) -> str:
        if expr not in self._names:
            text = self._fresh(expr)
            if expr not in self._shared:
                return text
            self._names[expr] = f"t{len(self._names)}"
            self._lines.append(f"{self._names[expr]} = {bare(text)}")
        return self._names[expr]

    def _fresh(self, expr: sympy.Basic) -> str:
        if is_table(expr):
            lines, text = self._read(type(expr).__name__, expr.args[0], self._text(expr.args[0]))
            self._lines += lines
            return text
        constant = _constant(expr)
        if constant is not None:
            return constant
        if isinstance(expr, sympy.Symbol):
            return str(expr.name)
        return _printer(expr)(self, expr)

    def real(self, expr: sympy.Basic) -> str:
        """The text of `expr` as a real number."""
        text = self._text(expr)
        if isinstance(expr, sympy.Integer):
            return f"{text}.0"
        return text if kind(expr) == "real" else f"tl.cast({bare(text)}, tl.float32)"

    def truth(self, expr: sympy.Basic) -> str:
        """The text of `expr` as a truth."""
        return self._text(expr) if kind(expr) == "truth" else f"({self._text(expr)} != 0)"

    def sum(self, expr: sympy.Basic) -> str:
        first, *rest = sorted(expr.args, key=_is_negative)
        text = self._text(first)
        for term in rest:
            text += f" - {self._text(-term)}" if _is_negative(term) else f" + {self._text(term)}"
        return f"({text})"

    def product(self, expr: sympy.Basic) -> str:
        over = [arg for arg in expr.args if isinstance(arg, sympy.Pow) and _is_negative(arg.exp)]
        factors = [self._text(arg) for arg in expr.args if arg not in over]
        if len(factors) > 1 and factors[0] == "-1":
            factors = ["-" + factors[1], *factors[2:]]
        text = " * ".join(factors) or "1.0"
        for arg in over:
            text += f" / {self._text(1 / arg)}"
        return f"({text})"

    def power(self, expr: sympy.Basic) -> str:
        base, exponent = expr.args
        if _is_negative(exponent):
            return f"(1.0 / {self._text(1 / expr)})"
        if exponent == sympy.Rational(1, 2):
            return f"tl.sqrt({self.real(base)})"
        if exponent.is_Integer and exponent <= 4:
            return "(" + " * ".join([self._text(base)] * int(exponent)) + ")"
        return f"tl.exp({self.real(exponent)} * tl.log({self.real(base)}))"

    def compare(self, expr: sympy.Basic) -> str:
        a, b = (self._text(arg) for arg in expr.args)
        return f"({a} {scalar.OPERATORS[expr.func]} {b})"

    def joined(self, expr: sympy.Basic) -> str:
        sign = " & " if isinstance(expr, And) else " | "
        return "(" + sign.join(self.truth(arg) for arg in expr.args) + ")"

    def inverted(self, expr: sympy.Basic) -> str:
        return f"(~{self.truth(expr.args[0])})"

    def extreme(self, expr: sympy.Basic) -> str:
        name = "tl.maximum" if isinstance(expr, sympy.Max) else "tl.minimum"
        real = kind(expr) == "real"
        args = sorted(expr.args, key=lambda arg: (bool(arg.is_number), str(arg)))
        texts = [self.real(arg) if real else self._text(arg) for arg in args]
        form = name + ("({}, {}, tl.PropagateNan.ALL)" if real else "({}, {})")
        return functools.reduce(form.format, texts)

    def remainder(self, expr: sympy.Basic) -> str:
        """Python's, with the sign of the divisor."""
        a, b = (self._text(arg) for arg in expr.args)
        if kind(expr) == "real":
            return f"({a} - {b} * tl.floor({a} / {b}))"
        return f"({a} % {b})" if self._positive(expr.args[0]) else f"(({a} % {b} + {b}) % {b})"

    def quotient(self, expr: sympy.Basic) -> str:
        """Rounded down; b > 0."""
        a, b = (self._text(arg) for arg in expr.args)
        return (
            f"({a} // {b})" if self._positive(expr.args[0]) else f"(({a} - ({a} % {b} + {b}) % {b}) // {b})"
        )

    def divided(self, expr: sympy.Basic) -> str:
        return f"tl.div_rn({bare(self.real(expr.args[0]))}, {bare(self.real(expr.args[1]))})"

    def truncated(self, expr: sympy.Basic) -> str:
        (arg,) = expr.args
        if kind(arg) == "integer":
            return self._text(arg)
        width = "tl.int32" if kind(arg) == "truth" or self._small(arg) else "tl.int64"
        return f"tl.cast({bare(self._text(arg))}, {width})"

    def widened(self, expr: sympy.Basic) -> str:
        (whole,) = expr.args
        return self._text(whole) if isinstance(whole, trunc) else f"tl.cast({self._text(whole)}, tl.int64)"

    def chosen(self, expr: sympy.Basic) -> str:
        c, a, b = expr.args
        texts = [self.real(x) if kind(expr) == "real" else self._text(x) for x in (a, b)]
        return f"tl.where({bare(self.truth(c))}, {', '.join(map(bare, texts))})"

    def sign(self, expr: sympy.Basic) -> str:
        text = self._text(expr.args[0])
        one, zero = ("1.0", "0.0") if kind(expr) == "real" else ("1", "0")
        return f"tl.where({text} > 0, {one}, tl.where({text} < 0, -{one}, {zero}))"

    def magnitude(self, expr: sympy.Basic) -> str:
        return f"tl.abs({bare(self._text(expr.args[0]))})"

    def random(self, expr: sympy.Basic) -> str:
        """See `uniform`."""
        seed, i, j = (f"tl.cast({bare(self._text(arg))}, tl.uint32)" for arg in expr.args)
        row = self._mixed("row", f"tl.add({seed}, {_times(i, uniform.ROW)}, sanitize_overflow=False)")
        column = self._mixed("column", _times(j, uniform.COLUMN))
        bits = self._mixed("bits", f"{row} ^ {column}")
        return f"(tl.cast({bits} >> 8, tl.float32) * {2.0**-24!r})"

    def _mixed(self, name: str, text: str) -> str:
        name = f"{name}{len(self._lines)}"
        self._lines.append(f"{name} = {text}")
        for shift, factor in uniform.MIX:
            shifted = f"{name} ^ ({name} >> {shift})"
            self._lines.append(f"{name} = {_times(shifted, factor) if factor != 1 else shifted}")
        return name

    def called(self, expr: sympy.Basic) -> str:
        return f"{_CALLED[expr.func]}({bare(self.real(expr.args[0]))})"

    def decimal(self, expr: sympy.Basic) -> str:
        return f"({math.log10(2)!r} * tl.log2({bare(self.real(expr.args[0]))}))"

    def rounded(self, expr: sympy.Basic) -> str:
        """Of the two around a half the even one."""
        x = self.real(expr.args[0])
        low = f"tl.floor({bare(x)})"
        beyond = f"tl.where({x} - {low} > 0.5, {low} + 1.0, 2.0 * tl.floor(0.5 * {x} + 0.25))"
        return f"tl.where({x} - {low} < 0.5, {low}, {beyond})"

    def tanh(self, expr: sympy.Basic) -> str:
        """2 sigmoid(2 x) - 1, which neither infinity breaks."""
        return f"(2.0 * tl.sigmoid(2.0 * {self.real(expr.args[0])}) - 1.0)"


_PRINTERS: list[tuple[Any, Callable[[Statements, sympy.Basic], str]]] = [
    (sympy.Add, Statements.sum),
    (sympy.Mul, Statements.product),
    (sympy.Pow, Statements.power),
    (tuple(scalar.OPERATORS), Statements.compare),
    ((And, Or), Statements.joined),
    (Not, Statements.inverted),
    ((sympy.Max, sympy.Min), Statements.extreme),
    (sympy.Mod, Statements.remainder),
    (floordiv, Statements.quotient),
    (div, Statements.divided),
    (trunc, Statements.truncated),
    (wide, Statements.widened),
    (where, Statements.chosen),
    (sympy.sign, Statements.sign),
    (sympy.Abs, Statements.magnitude),
    (sympy.tanh, Statements.tanh),
    (uniform, Statements.random),
    (log10, Statements.decimal),
    (nearest, Statements.rounded),
    ((sympy.exp, sympy.log, log2, floor, sigmoid, erf), Statements.called),
]
_CALLED = {
    sympy.exp: "tl.exp", sympy.log: "tl.log", log2: "tl.log2", floor: "tl.floor", sigmoid: "tl.sigmoid", erf: "tl.erf",
}  # fmt: skip


def _times(text: str, factor: int) -> str:
    """A product that may wrap around."""
    return f"tl.mul({text}, {factor:#x}, sanitize_overflow=False)"


def _printer(expr: sympy.Basic) -> Callable[[Statements, sympy.Basic], str]:
    for classes, printer in _PRINTERS:
        if isinstance(expr, classes):
            return printer
    raise ValueError(f"{expr} ({type(expr).__name__}) is not part of the score language")


def in_powers_of_two(expr: sympy.Basic) -> sympy.Basic:
    """`expr * log2(e)`, whose exp2 is exp(expr), with the factor inside constants: `where(c, s/8, 1)` needs none."""
    if isinstance(expr, where):
        c, a, b = expr.args
        return where(c, in_powers_of_two(a), in_powers_of_two(b))
    if isinstance(expr, sympy.Add):
        return sympy.Add(*[in_powers_of_two(term) for term in expr.args])
    constant, rest = expr.as_coeff_Mul()
    return sympy.Float(float(constant) * LOG2E, 17) * rest if constant.is_finite else expr


def _occurring_twice(exprs: Iterable[sympy.Basic]) -> set[sympy.Basic]:
    """The expressions, other than names and numbers, that several others (or one several times) are made of."""
    uses: Counter[sympy.Basic] = Counter()
    pending: list[sympy.Basic] = list(exprs)
    uses.update(pending)
    seen: set[sympy.Basic] = set()
    while pending:
        expr = pending.pop()
        if expr in seen:
            continue
        seen.add(expr)
        parts = _parts(expr)
        uses.update(parts)
        pending += parts
    return {expr for expr, n in uses.items() if n > 1 and not _is_simple(expr)}


def _parts(expr: sympy.Basic) -> Sequence[sympy.Basic]:
    """The expressions whose texts the text of `expr` holds."""
    if isinstance(expr, sympy.Add):
        return [-term if _is_negative(term) and k else term for k, term in _sorted(expr)]
    if isinstance(expr, sympy.Mul):
        return [1 / arg if isinstance(arg, sympy.Pow) and _is_negative(arg.exp) else arg for arg in expr.args]
    if isinstance(expr, sympy.Pow):
        if _is_negative(expr.exp):
            return [1 / expr]
        return [expr.base] * (int(expr.exp) if expr.exp.is_Integer and expr.exp <= 4 else 1)
    if isinstance(expr, (sympy.Mod, floordiv, nearest, sympy.sign)) and kind(expr) != "truth":
        return [arg for arg in expr.args for _ in range(2)]
    return list(expr.args)


def _sorted(expr: sympy.Basic) -> list[tuple[int, sympy.Basic]]:
    return list(enumerate(sorted(expr.args, key=_is_negative)))


def _is_negative(expr: sympy.Basic) -> bool:
    return bool(expr.as_coeff_Mul()[0].is_negative)


def _is_simple(expr: sympy.Basic) -> bool:
    return not expr.args or _constant(expr) is not None or (expr.is_Mul and -expr in expr.args)


def _constant(expr: sympy.Basic) -> str | None:
    """The text of a number, or of an expression of numbers."""
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return "True" if expr else "False"
    if scalar.is_truth(expr) or isinstance(expr, sympy.Symbol) or expr.free_symbols or not expr.is_number:
        return None
    if any(map(is_table, sympy.preorder_traversal(expr))):
        return None
    if expr.is_Integer:
        return str(int(expr))
    value = float(_evaluated(expr))
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _evaluated(expr: sympy.Basic) -> sympy.Basic:
    """Our own functions of numbers do not evaluate themselves."""
    expr = expr.replace(div, lambda a, b: a / b).replace(sigmoid, lambda x: 1 / (1 + sympy.exp(-x)))
    return expr.replace(trunc, lambda x: sympy.Integer(int(x)))


def bare(text: str) -> str:
    """Without parentheses around the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth = 0
    for k, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and k < len(text) - 1:
            return text
    return text[1:-1]
