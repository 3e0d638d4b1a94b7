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
        raise Refuse("weights are divided by their sum, and are no exponentials", node)
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


def factor(weight: sympy.Basic, node: fx.Node) -> sympy.Basic:
    """What the softmax' result is multiplied by.

    Raises:
        Refuse: something else is done to it.
    """
    by = weight.xreplace({P: sympy.Integer(1)})
    linear = sympy.diff(weight, P) == by and weight.xreplace({P: sympy.Integer(0)}) == 0
    if not linear or S in by.free_symbols:
        raise Refuse(f"the softmax' result is not just multiplied: {weight}", node)
    return by
