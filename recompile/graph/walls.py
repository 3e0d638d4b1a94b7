"""Walls: nodes that no rewrite may move another node across."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

# Copied verbatim from Dynamo's graph, but pure: they read their arguments and make a new value.
_PURE = {
    operator.getitem,
    torch.tensor,
    torch.as_tensor,
    torch.BoolTensor,
    torch.DoubleTensor,
    torch.FloatTensor,
    torch.IntTensor,
    torch.LongTensor,
}
_SYMBOLIC = (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)


def is_wall(node: fx.Node) -> bool:
    """Whether `node` writes to a tensor, changes torch's state, checks something, or hides what it does.

    Walls are in-place and other mutating operators, assertions, grad-mode and autocast switches, higher-order
    operators, modules, and calls that capture copied verbatim, except those known to be pure.
    Views and random operators are no walls: see `is_random` before moving, merging or removing the latter.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.op != "call_function" or isinstance(node.target, HigherOrderOperator):
        return True
    if isinstance(node.target, OpOverload):
        return node.target._schema.is_mutable or _checks(node)
    return node.target not in _PURE and not _computes_a_size(node)


def is_random(node: fx.Node) -> bool:
    """Whether `node` draws random numbers: such nodes keep their number and their order."""
    return isinstance(node.target, OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags


def _checks(node: fx.Node) -> bool:
    """Assertions: operators that return nothing are called for their effect."""
    target: Any = node.target
    return not target._schema.returns


def _computes_a_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), _SYMBOLIC)
