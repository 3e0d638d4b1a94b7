"""Comparisons as expressions of the score language, taken apart into what kernels can decide for a whole tile.

where(c, 1, 0) < 0.5                  not c
Min(i, n0) - Min(j, n0) > 0           (i > j) & (j < n0)
"""

from __future__ import annotations

from typing import Any

import sympy

from recompile.lowering.score import kind, where


def related(relation: Any, a: sympy.Basic, b: sympy.Basic) -> sympy.Basic:
    """`relation(a, b)` of numbers."""
    if isinstance(a, where) and all(part.is_number for part in (*a.args[1:], b)):
        c, x, y = a.args
        return sympy.Or(sympy.And(c, relation(x, b)), sympy.And(sympy.Not(c), relation(y, b)))
    greater, less = (a, b) if relation in (sympy.Gt, sympy.Le) else (b, a)
    apart = None if relation in (sympy.Eq, sympy.Ne) else _clamped_alike(greater, less)
    if apart is None:
        return relation(a, b)
    return apart if relation in (sympy.Gt, sympy.Lt) else sympy.Not(apart)


def _clamped_alike(a: sympy.Basic, b: sympy.Basic) -> sympy.Basic | None:
    """`a > b` of integers that have a bound in common, as positions clamped to a length; None if they have not."""
    terms = sympy.Add.make_args(a - b)
    if len(terms) != 2 or kind(a - b) != "integer":
        return None
    for x, y in ((terms[0], -terms[1]), (terms[1], -terms[0])):
        for extreme in (sympy.Min, sympy.Max):
            if not (isinstance(x, extreme) and isinstance(y, extreme)):
                continue
            common = {*x.args} & {*y.args}
            if not common:
                return None
            bound = extreme(*common)
            x, y = (extreme(*({*side.args} - common)) for side in (x, y))
            reached = related(sympy.Lt, y, bound) if extreme is sympy.Min else related(sympy.Gt, x, bound)
            return sympy.And(related(sympy.Gt, x, y), reached)
    return None
