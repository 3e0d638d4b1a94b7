"""Sizes as sympy expressions, and expressions as nodes.

Tried with torch 2.13: `SymInt.node.expr`, `torch.utils._sympy.interp.sympy_interp`,
`torch.utils._sympy.reference.PythonReferenceAnalysis`, `ShapeEnv.optimization_hint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

SYM = (torch.SymInt, torch.SymFloat, torch.SymBool)
_PYTHON = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}


def expression(value: Any) -> sympy.Basic:
    """The sympy expression of a SymInt, SymFloat or SymBool, with equal symbols already unified."""
    expr: sympy.Basic = value.node.expr
    return expr


def constant(value: Any) -> int | float | bool | None:
    """The number behind `value` if it is known, else None. Adds no guard."""
    expr = expression(value)
    known = not expr.free_symbols
    return _PYTHON[type(value)](expr) if known else None


def example(expr: Any, like: Any) -> int:
    """The value of `expr` (an int, or an expression in sizes) for the sizes that were compiled first.

    Args:
        like: a fake tensor of the same compilation.
    """
    if isinstance(expr, int) or not expr.free_symbols:
        return int(expr)
    sizes = like.fake_mode.shape_env
    if hasattr(sizes, "optimization_hint"):
        return int(sizes.optimization_hint(expr, fallback=0))
    return int(sizes.size_hint(expr, allow_none=True) or 0)  # torch 2.11


def compute(graph: fx.Graph, expr: sympy.Basic, symbols: dict[sympy.Symbol, fx.Node]) -> fx.Node:
    """Append nodes to `graph` that compute `expr`; every symbol of it must be in `symbols`.

    Each new node has `meta["val"]`.
    """
    proxies = {symbol: fx.Proxy(node) for symbol, node in symbols.items()}
    before = next(iter(reversed(graph.nodes)))
    node: fx.Node = sympy_interp(PythonReferenceAnalysis, proxies, expr).node
    for new in _after(before):
        args = fx.node.map_arg(new.args, lambda n: n.meta["val"])
        new.meta["val"] = new.target(*args)  # type: ignore[operator]
    return node


def _after(node: fx.Node) -> Iterator[fx.Node]:
    while (node := node.next).op != "root":
        yield node
