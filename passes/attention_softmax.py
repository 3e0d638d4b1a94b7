"""Softmaxes over the keys: those written by hand, and what is done to their result."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from recompile.lowering import scalar
from recompile.lowering.score import S, where
from recompile.rewrite import Refuse

aten = torch.ops.aten
P = scalar.symbol("p")  # an element of the softmax' result
SHIFT = scalar.symbol("shift")  # what a softmax by hand subtracts from a row
TOTAL = scalar.symbol("total")  # the logarithm of a row's sum of exponentials
IS_NAN = sympy.Ne(scalar.symbol("nan"), 0)  # whether P is NaN, as in rows without keys


def row_sum(node: Any, of: Any) -> list[fx.Node] | None:
    """The nodes from `node` back to a sum of `of` over one dim, the sum last; None if it is no such sum."""
    chain: list[fx.Node] = []
    while isinstance(node, fx.Node) and node.op == "call_function":
        chain.append(node)
        if node.target is aten.sum.dim_IntList:
            return chain if node.args[0] is of else None
        if node.target not in (aten.unsqueeze.default, aten.expand.default):
            return None
        node = node.args[0]
    return None


def logarithm(expr: sympy.Basic, node: fx.Node) -> sympy.Basic:
    """The score of which `expr` is the exponential; masks by multiplication leave it -infinite.

    Raises:
        Refuse: it is no exponential.
    """
    if isinstance(expr, where) and expr.args[2] == 0:
        return where(expr.args[0], logarithm(expr.args[1], node), -sympy.oo)
    if not isinstance(expr, sympy.exp):
        raise Refuse("attention weights are divided by their sum, and are no exponentials", node)
    return expr.args[0]


def unshifted(score: sympy.Basic, node: fx.Node) -> sympy.Basic:
    """The score without what a softmax by hand subtracts from each row.

    Raises:
        Refuse: the row's maximum is used otherwise.
    """
    plain = sympy.expand(score).xreplace({SHIFT: sympy.Integer(0)}) if SHIFT in score.free_symbols else score
    if plain is not score and sympy.expand(score - plain + SHIFT) != 0:
        raise Refuse("the row's maximum is not just subtracted from the scores", node)
    return plain


def is_multiple(expr: sympy.Basic) -> bool:
    """Whether `expr` is P times numbers or masks: NaN where P is."""
    by = expr.xreplace({P: sympy.Integer(1)})
    numbers = isinstance(by, where) and all(part.is_number for part in by.args[1:])
    return P in expr.free_symbols and (by.is_number or numbers) and sympy.diff(expr, P) == by


def without_nan(expr: sympy.Basic) -> sympy.Basic | None:
    """The multiple of P of which `expr` is `where(isnan(P), 0, ...)`; None if it is something else."""
    if not isinstance(expr, where) or expr.args[0] not in (IS_NAN, sympy.Not(IS_NAN)):
        return None
    nan, other = expr.args[1:] if expr.args[0] == IS_NAN else expr.args[:0:-1]
    return other if nan == 0 and is_multiple(other) else None


def emptied(expr: sympy.Basic) -> sympy.Basic | None:
    """Where `where(...)` puts 0 in the place of the softmax' result, also of NaN; None if it does not."""
    if not isinstance(expr, where) or P not in expr.free_symbols:
        return None
    c, a, b = expr.args
    return sympy.Not(c) if b == 0 else c if a == 0 else None


def leaves_no_nan(score: sympy.Basic, filled: list[sympy.Basic], node: fx.Node) -> bool:
    """Whether rows without keys are 0: each pair whose score is -infinite is 0 after the softmax, too.

    Raises:
        Refuse: some may be 0 and some NaN.
    """
    if not filled:
        return False
    without = [
        c if side == 1 else sympy.Not(c)
        for c, *sides in (part.args for part in score.atoms(where))
        for side, value in enumerate(sides, 1)
        if value == -sympy.oo
    ]
    if all(_implies(condition, filled) for condition in without):
        return bool(without)
    raise Refuse("pairs are masked after the softmax that are not masked before it", node)


def _implies(condition: sympy.Basic, filled: list[sympy.Basic]) -> bool:
    """Whether one of `filled` surely holds where `condition` does."""
    if condition in filled or any(condition in sympy.Or.make_args(x) for x in filled):
        return True
    if isinstance(condition, sympy.Or):
        return all(_implies(part, filled) for part in condition.args)
    return isinstance(condition, sympy.And) and any(_implies(part, filled) for part in condition.args)


def factor(weight: sympy.Basic, node: fx.Node) -> sympy.Basic:
    """What the softmax' result is multiplied by.

    Raises:
        Refuse: something else is done to it.
    """
    by = weight.xreplace({P: sympy.Integer(1)})
    linear = sympy.diff(weight, P) == by and weight.xreplace({P: sympy.Integer(0)}) == 0
    if IS_NAN.free_symbols & weight.free_symbols:
        raise Refuse("isnan between the scores and the values is not supported", node)
    if not linear or S in by.free_symbols:
        raise Refuse(f"the softmax' result is not just multiplied: {weight}", node)
    return by
