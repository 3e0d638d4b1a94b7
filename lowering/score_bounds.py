"""What is known of an expression before it is computed: its interval, and which integers need 64 bits.

Positions and what is made of them are 32-bit integers in a kernel, since loops over them are twice as wide then.
`widened` finds where that is too little for what eager, with its 64 bits, computes.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import sympy

from recompile.lowering.score import (
    I,
    J,
    M,
    N,
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
    wide,
)

_POSITIONS = (I, J, M, N)
TILE = 256  # rows or keys of a tile at most
MOST = 2**30 - TILE  # queries or keys, where their number is not known
Interval = tuple[float, float]
EVERYTHING: Interval = (-math.inf, math.inf)


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
    if isinstance(expr, sympy.Mod) and kind(expr) == "integer":
        found = found[0], min(found[1], parts[1][1] - 1)
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
    wide: lambda parts: parts[0],
}


def positions(sizes: Mapping[sympy.Basic, int]) -> dict[str, Interval]:
    """The intervals of i, j, M and N, where `sizes` has those of M and N that are known."""
    found: dict[str, Interval] = {}
    for at, size in ((I, M), (J, N)):
        most = sizes.get(size, MOST)
        found |= {size.name: (sizes.get(size, 0), most), at.name: (0, most - 1)}
    return found


def widened(expr: sympy.Basic, known: Mapping[str, Interval], clamped: bool = False) -> sympy.Basic:
    """`expr`, with `wide` around positions and cut reals from which an integer of more than 32 bits is made.

    Args:
        known: the intervals of symbols that are computed with 32 bits; others have 64 already.
        clamped: it is between bounds of 32 bits before anything else is made of it, so that cutting may stop at theirs.
    """
    if not expr.args:
        return expr
    clamps = isinstance(expr, (sympy.Max, sympy.Min)) and (clamped or _fits(expr, known))
    args = [widened(arg, known, clamps) for arg in expr.args]
    new = expr if all(a is b for a, b in zip(args, expr.args, strict=True)) else expr.func(*args)
    if isinstance(expr, trunc):
        return new if clamped or _fits(expr, known) else wide(new)
    sums = isinstance(expr, (sympy.Add, sympy.Mul)) and {s.name for s in expr.free_symbols} <= known.keys()
    if sums and kind(expr) == "integer" and not _fits(expr, known):
        return new.xreplace({wide(at): at for at in _POSITIONS}).xreplace({at: wide(at) for at in _POSITIONS})
    return new


def _fits(expr: sympy.Basic, known: Mapping[str, Interval]) -> bool:
    """Whether 32 bits hold it, and of a sum what its terms add up to in any order, up to the end of a last tile."""
    if isinstance(expr, trunc) and kind(expr.args[0]) == "truth":
        return True
    tiled = {**known, **{at.name: (0, known[at.name][1] + TILE) for at in (I, J) if at.name in known}}
    parts = [interval(arg, tiled) for arg in sympy.Add.make_args(expr)]
    low, high = sum(min(lo, 0) for lo, _ in parts), sum(max(hi, 0) for _, hi in parts)
    return low >= -(2**31) and high < 2**31
