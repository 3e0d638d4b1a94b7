"""Which keys, or queries, `keep` can hold for at all.

    keep: (j <= i) & (i - j < 3)     queries first..last  ->  keys from first - 2 to last
    keep: (j <= i) | (j < 2)                              ->  keys to max(last, 1)
    keep: j < n0                     n0: one a sample     ->  keys to n0 - 1

Only conditions that are linear in i and j, with factors of one for what is asked, bound anything.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, Or

from recompile.lowering.score import kind

Bound: TypeAlias = sympy.Basic | None


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
