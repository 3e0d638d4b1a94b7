"""What is known of an expression before it is computed: its interval, and which keys `keep` can hold for at all.

    keep: (j <= i) & (i - j < 3)     queries first..last  ->  keys from first - 2 to last
    keep: (j <= i) | (j < 2)                              ->  keys to max(last, 1)
    keep: j < n0                     n0: one a sample     ->  keys to n0 - 1

Only conditions that are linear in i and j, with factors of one for what is asked, bound anything.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Or

from recompile.lowering.score import (
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

Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)
Bound: TypeAlias = sympy.Basic | None


def interval(expr: sympy.Basic, known: Mapping[str, Interval]) -> Interval:
    """The smallest and largest value that `expr` can have, given its symbols' intervals.

    Reals are those of float32: the logarithm of a finite one is at most 89.
    """
    if isinstance(expr, sympy.Symbol):
        return known.get(expr.name, EVERYTHING)
    if isinstance(expr, sympy.Number):
        return float(expr), float(expr)
    if isinstance(expr, where):
        parts = [interval(arg, known) for arg in expr.args[1:]]
        return min(lo for lo, _ in parts), max(hi for _, hi in parts)
    parts = [interval(arg, known) for arg in expr.args]
    rule = next((_RULES[cls] for cls in _RULES if isinstance(expr, cls)), None)
    found = rule(parts) if rule else EVERYTHING
    return EVERYTHING if any(map(math.isnan, found)) else found


def _product(parts: list[Interval]) -> Interval:
    lo, hi = 1.0, 1.0
    for a, b in parts:
        corners = [0.0 if 0 in (x, y) else x * y for x in (lo, hi) for y in (a, b)]
        lo, hi = min(corners), max(corners)
    return lo, hi


def _quotient(parts: list[Interval]) -> Interval:
    (lo, hi), (a, b) = parts
    return (lo / a, hi / a) if a == b and a > 0 else EVERYTHING


def _remainder(parts: list[Interval]) -> Interval:
    (lo, hi), (_, b) = parts
    return (lo, hi) if lo >= 0 and hi < b else (0, b)


def _whole(parts: list[Interval]) -> Interval:
    """One to spare: what becomes a whole number was rounded."""
    ((lo, hi),) = parts
    return lo - 1, hi + 1


def _magnitude(parts: list[Interval]) -> Interval:
    ((lo, hi),) = parts
    return max(lo, -hi, 0), max(-lo, hi)


def _logarithm(parts: list[Interval], of: Callable[[float], float] = math.log) -> Interval:
    ((lo, hi),) = parts
    most = math.ceil(of(2.0**128))
    return of(lo) if lo > 0 else -math.inf, min(of(hi), most) if 0 < hi < math.inf else most


_RULES: dict[Any, Callable[[list[Interval]], Interval]] = {
    sympy.Add: lambda parts: (sum(lo for lo, _ in parts), sum(hi for _, hi in parts)),
    sympy.Mul: _product,
    sympy.Max: lambda parts: (max(lo for lo, _ in parts), max(hi for _, hi in parts)),
    sympy.Min: lambda parts: (min(lo for lo, _ in parts), min(hi for _, hi in parts)),
    sympy.Mod: _remainder,
    sympy.Abs: _magnitude,
    sympy.log: _logarithm,
    log2: lambda parts: _logarithm(parts, math.log2),
    log10: lambda parts: _logarithm(parts, math.log10),
    sigmoid: lambda parts: (0.0, 1.0),
    erf: lambda parts: (-1.0, 1.0),
    sympy.tanh: lambda parts: (-1.0, 1.0),
    div: _quotient,
    **dict.fromkeys((trunc, floor, nearest), _whole),
    floordiv: lambda parts: (_quotient(parts)[0] - 1, _quotient(parts)[1]),
}


@dataclass(frozen=True)
class Reach:
    """Which `of` a condition can hold for, where `given` runs from `first` to `last`; `constants` are the other
    symbols that a bound may be made of."""

    of: sympy.Symbol
    given: sympy.Symbol
    first: sympy.Symbol
    last: sympy.Symbol
    constants: frozenset[sympy.Symbol]

    def bounds(self, keep: sympy.Basic) -> tuple[Bound, Bound]:
        """The smallest and the largest; None where nothing is known."""
        if isinstance(keep, And):
            lows, highs = zip(*map(self.bounds, keep.args), strict=True)
            return _extreme(sympy.Max, lows), _extreme(sympy.Min, highs)
        if isinstance(keep, Or):
            lows, highs = zip(*map(self.bounds, keep.args), strict=True)
            return _extreme(sympy.Min, lows, every=True), _extreme(sympy.Max, highs, every=True)
        low: list[Bound] = []
        high: list[Bound] = []
        for expr in _not_positive(keep):
            factor = expr.coeff(self.of)
            bound = self._solved(factor, sympy.expand(expr - factor * self.of))
            (high if factor > 0 else low).append(bound)
        return _extreme(sympy.Max, low), _extreme(sympy.Min, high)

    def _solved(self, factor: sympy.Basic, rest: sympy.Basic) -> Bound:
        """From factor * of + slope * given + base <= 0."""
        slope = rest.coeff(self.given)
        base = sympy.expand(rest - slope * self.given)
        if abs(factor) != 1 or not slope.is_Integer or base.free_symbols - self.constants:
            return None
        # factor = 1: of <= -slope given - base; factor = -1: of >= slope given + base
        end = self.last if slope < 0 else self.first
        bound: Bound = -factor * (slope * end + base)
        return bound


def _not_positive(condition: sympy.Basic) -> list[sympy.Basic]:
    """Integers that are <= 0 where `condition` holds."""
    if not isinstance(condition, Relational) or isinstance(condition, sympy.Ne):
        return []
    low, high = condition.args
    if isinstance(condition, (sympy.StrictGreaterThan, sympy.GreaterThan)):
        low, high = high, low
    strict = isinstance(condition, (sympy.StrictLessThan, sympy.StrictGreaterThan))
    apart = sympy.expand(low - high + int(strict))
    if kind(apart) != "integer":
        return []
    found = [apart, sympy.expand(-apart)] if isinstance(condition, sympy.Eq) else [apart]
    return [sympy.expand(part) for expr in found for part in _without_magnitude(expr)]


def _without_magnitude(expr: sympy.Basic) -> list[sympy.Basic]:
    """|a| + b <= 0 is a + b <= 0 and b - a <= 0."""
    magnitude = next((part for part in sympy.Add.make_args(expr) if isinstance(part, sympy.Abs)), None)
    if magnitude is None:
        return [expr]
    rest, (inner,) = expr - magnitude, magnitude.args
    return [rest + inner, rest - inner]


def _extreme(join: Callable[..., sympy.Basic], bounds: Sequence[Bound], every: bool = False) -> Bound:
    """The one bound that follows from several, all of which must be known if `every`."""
    known = [b for b in bounds if b is not None]
    return None if not known or (every and len(known) < len(bounds)) else join(*known)
