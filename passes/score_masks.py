"""Which pairs of a score need not be computed: the conditions that are provably a mask.

where(j <= i, s / 8, -1e9)      under a softmax:  keep j <= i, score s / 8
s / 8 + where(Ne(n0, 0), 0, -10000)               keep Ne(n0, 0), score s / 8
where(j <= i, silu(s), 0) / N   without:          keep j <= i, score silu(s) / N
silu(where(j <= i, s, -1e4))                      the same: silu(-1e4) is 0
x0*silu(s)                      without:          keep Ne(x0, 0), if x0 takes no gradient
s / 8 + (1 - x0)*-1e9           under a softmax:  keep (1 - x0)*-1e9 > -1000, likewise
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from typing import NamedTuple

import sympy

from recompile.lowering.score import where

LARGE = 1e3  # exp(-1e3) is 0 beside any score that is not of that size itself


class Masked(NamedTuple):
    """Where `keep` is false, a pair has no weight; where it holds, the score is `kept`.

    Under a softmax that is so only in rows with a kept score above `negligible`.
    """

    keep: sympy.Basic
    kept: sympy.Basic
    negligible: float


def masks(score: sympy.Basic, softmax: bool, constants: Set[str] = frozenset()) -> Masked:
    """The masks in `score`; `constants` are its loads that take no gradient, and have a value for each key."""
    keep: sympy.Basic = sympy.true
    negligible = float("-inf")
    score = score.replace(where, _merged)
    for condition in _conditions(score):
        sides = [chosen(score, condition, which) for which in (True, False)]
        for kept, left_out, mask in ((*sides, condition), (*sides[::-1], sympy.Not(condition))):
            drop = _drop(kept, left_out) if softmax else _vanishes(left_out)
            if drop is not None:
                score, keep = kept, sympy.And(keep, mask)
                negligible = max(negligible, drop / 2)
                break
    for mask in _of_constants(score, softmax, constants):
        keep, negligible = sympy.And(keep, mask), max(negligible, -LARGE / 2)
    return Masked(keep, score, negligible if softmax else float("-inf"))


def _merged(condition: sympy.Basic, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """A choice between a number and a choice of the same number is one choice, as of a mask that is made in steps."""
    for outer, x, other in ((condition, a, b), (sympy.Not(condition), b, a)):
        if isinstance(other, where):
            inner, *sides = other.args
            for chosen_by, same_side, rest in ((inner, *sides), (sympy.Not(inner), *sides[::-1])):
                if same_side == x:
                    return where(sympy.Or(outer, chosen_by), x, rest)
    return where(condition, a, b)


def _of_constants(score: sympy.Basic, softmax: bool, constants: Set[str]) -> Iterator[sympy.Basic]:
    """Where a factor of the score, made of constants, is not 0; under a softmax, where its terms are not very low."""
    every = (sympy.Add if softmax else sympy.Mul).make_args(score)
    parts = [part for part in every if _is_linear_in(part, constants)]
    if softmax and parts:
        yield sympy.Add(*parts, *(part for part in every if part.is_number)) > -LARGE
    elif parts:
        yield from (sympy.Ne(part, 0) for part in parts)


def _is_linear_in(part: sympy.Basic, constants: Set[str]) -> bool:
    names = {symbol.name for symbol in part.free_symbols}
    made = all(
        isinstance(x, (sympy.Add, sympy.Mul, sympy.Symbol, sympy.Number))
        for x in sympy.preorder_traversal(part)
    )
    return bool(names) and names <= constants and made


def _conditions(expr: sympy.Basic) -> list[sympy.Basic]:
    return sorted({part.args[0] for part in expr.atoms(where)}, key=str)


def chosen(expr: sympy.Basic, condition: sympy.Basic, holds: bool) -> sympy.Basic:
    """`expr` where `condition` is known."""
    of = {part: part.args[1 if holds else 2] for part in expr.atoms(where) if part.args[0] == condition}
    while of:  # a where may stand inside another's branch
        expr = expr.xreplace(of)
        of = {part: part.args[1 if holds else 2] for part in expr.atoms(where) if part.args[0] == condition}
    return expr


def _drop(kept: sympy.Basic, left_out: sympy.Basic) -> float | None:
    """The score of a pair that is left out, if the softmax makes it 0: large and negative, or that much lower."""
    for value in (left_out, left_out - kept if left_out != -sympy.oo else left_out):
        if value.is_number and value.is_extended_real and value <= -LARGE:
            return float(value)
    return None


def _vanishes(value: sympy.Basic) -> float | None:
    """0.0 if `value` is 0 in float32 whatever else it is a multiple of; 0 / x is not, where x may be 0."""
    if not isinstance(value, sympy.Expr):
        return None
    factor, _ = value.as_coeff_Mul()
    return 0.0 if factor.is_extended_real and abs(float(factor)) < 1e-38 else None


def divided(score: sympy.Basic) -> tuple[sympy.Basic, list[sympy.Symbol]]:
    """`score` without the loads by which all of it is divided, and those.

    They are no part of what a mask makes 0: 0 / 0 is NaN.
    """
    parts = sympy.Mul.make_args(score)
    below = [part for part in parts if isinstance(part, sympy.Pow) and part.exp == -1 and _is_load(part.base)]
    return sympy.Mul(*[part for part in parts if part not in below]), [part.base for part in below]


def _is_load(expr: sympy.Basic) -> bool:
    return isinstance(expr, sympy.Symbol) and expr.name[0] in "xn"
