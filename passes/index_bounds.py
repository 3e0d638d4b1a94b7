"""What is known of the values of an index that is computed from positions."""

from __future__ import annotations

import sympy

from recompile.lowering import scalar
from recompile.lowering.score import atleast, atmost, div, floor, floordiv, log2, log10, nearest, trunc, where


def is_nonnegative(index: sympy.Basic, queries: sympy.Basic, keys: sympy.Basic) -> bool:
    """Whether an index is known not to be below 0, for positions i below `queries` and j below `keys`."""
    if isinstance(index, sympy.Max):
        return any(is_nonnegative(part, queries, keys) for part in index.args)
    if isinstance(index, (sympy.Min, where, atmost)):
        return all(is_nonnegative(part, queries, keys) for part in index.args[-2:])
    if isinstance(index, atleast):
        return bool(index.args[1].is_nonnegative)
    if isinstance(index, (trunc, floor, nearest)):
        return is_nonnegative(index.args[0], queries, keys)
    if isinstance(index, (div, floordiv)):
        return bool(index.args[1].is_positive) and is_nonnegative(index.args[0], queries, keys)
    if isinstance(index, (sympy.log, log2, log10)):
        return isinstance(index.args[0], sympy.Max) and any(
            part.is_number and part >= 1 for part in index.args[0].args
        )
    if isinstance(index, sympy.Abs) or (isinstance(index, sympy.Mod) and index.args[1].is_positive):
        return True
    if isinstance(index, sympy.Add) and all(is_nonnegative(part, queries, keys) for part in index.args):
        return True
    if index.is_number:
        return bool(index.is_nonnegative)
    i, j, n = (scalar.symbol(x) for x in "ijN")
    if not index.free_symbols <= {i, j, n, scalar.symbol("M")}:
        return False
    least = sympy.Symbol("least", nonnegative=True)
    corners = [index.subs({i: a, j: b}) for a in (0, queries - 1) for b in (0, keys - 1)]
    return all(c.subs(n, least + 1).is_nonnegative for c in corners) and all(
        sympy.diff(index, x).is_number for x in (i, j)
    )
