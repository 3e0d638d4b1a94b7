"""Which node of a graph under construction computes a given fake tensor or size."""

from __future__ import annotations

import operator
from collections import ChainMap
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils.weak import TensorWeakRef

from recompile.torch_private.symbols import SYM, compute, constant, expression
from recompile.verbatim import tensors

# What belongs to one node of Dynamo's graph and not to the nodes that take its place.
OWN_META = {"example_value", "unbacked_bindings", "opaque", "val"}


class Unknown(Exception):
    """No node computes a value; the message says which, in a sentence."""


class Known:
    """Nodes by the value they compute, with one level of undo.

    Args:
        graph: where `argument` adds nodes for sizes and `learn` those for parts of results.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        # Keys: id of a tensor, or expression of a size. The ids stay valid since meta["val"] holds the
        # tensors, except those in `lent`.
        self.nodes: ChainMap[int | sympy.Basic, fx.Node] = ChainMap({})
        self.lent: dict[int, TensorWeakRef] = {}
        self.sizes: dict[sympy.Basic, tuple[fx.Node, int, Any]] = {}  # symbol -> (tensor, dimension, size)
        self.spare: list[fx.Node] = []  # dropped in the end if nobody uses them

    def begin(self) -> fx.Node | None:
        """From here on everything can be undone. Returns the last node of the graph, for `undo`."""
        self.nodes = self.nodes.new_child()
        return self.last()

    def commit(self) -> None:
        """Keep what was learned since `begin`."""
        new, self.nodes = self.nodes.maps[0], self.nodes.parents
        self.nodes.update(new)

    def undo(self, last: fx.Node | None) -> None:
        """Forget what was learned since `begin`, and erase the nodes after `last`."""
        self.nodes = self.nodes.parents
        while (node := self.last()) is not last and node is not None:
            if self.spare and self.spare[-1] is node:
                self.spare.pop()
            self.graph.erase_node(node)

    def last(self) -> fx.Node | None:
        return next(iter(reversed(self.graph.nodes)), None)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a node computes `tensor`; its id may be that of a lent tensor that is gone."""
        lent = self.lent.get(id(tensor))
        return id(tensor) in self.nodes and (lent is None or lent() is tensor)

    def learn(self, node: fx.Node, value: Any) -> None:
        """From now on `node` computes `value`; parts of it get `getitem` nodes."""
        if value is not None:
            node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.nodes[id(value)] = node
            self.lent.pop(id(value), None)
        elif isinstance(value, SYM):
            self.nodes.setdefault(expression(value), node)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                if isinstance(part, (torch.Tensor, tuple, list, *SYM)):
                    self.learn(self._pick(node, i), part)

    def lend(self, node: fx.Node, made: torch.Tensor) -> None:
        """Learn the result of a factory without holding it.

        torch's binding of `arange` or `zeros_like` copies the result if somebody else holds it, and the copy
        would be another tensor.
        """
        node.meta["val"] = made.detach()
        self.nodes[id(made)] = node
        self.lent[id(made)] = TensorWeakRef(made)

    def learn_sizes(self, value: Any) -> None:
        """Where no node gives a size in a shape of `value`, the shape itself does from now on."""
        for tensor in tensors(value):
            for i, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(expression(size), (self.nodes[id(tensor)], i, size))

    def argument(self, value: Any) -> Any:
        """`value` with every tensor and size in it replaced by the node that computes it.

        Raises:
            Unknown: there is no such node.
        """
        if isinstance(value, torch.Tensor):
            if not self.knows(value):
                raise Unknown("it uses a tensor constant")
            return self.nodes[id(value)]
        if isinstance(value, SYM):
            return self._size(value)
        if isinstance(value, (tuple, list)):
            parts = [self.argument(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, dict):
            return {key: self.argument(part) for key, part in value.items()}
        return value

    def sweep(self) -> None:
        """Drop the spare nodes that nobody uses."""
        for node in reversed(self.spare):
            if not node.users:
                self.graph.erase_node(node)

    def _pick(self, node: fx.Node, i: int) -> fx.Node:
        new = self.graph.call_function(operator.getitem, (node, i))
        new.meta.update({key: value for key, value in node.meta.items() if key not in OWN_META})
        self.spare.append(new)
        return new

    def _size(self, value: Any) -> Any:
        """A number if it is known, else a node, made if need be."""
        if (number := constant(value)) is not None:
            return number
        expr = expression(value)
        if expr not in self.nodes:
            symbols = {symbol: self._symbol(symbol) for symbol in expr.free_symbols}
            node = symbols[expr] if expr in symbols else compute(self.graph, expr, symbols)
            self.nodes[expr] = node
            node.meta["val"] = value
        return self.nodes[expr]

    def _symbol(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.nodes:
            if symbol not in self.sizes:
                raise Unknown(f"no input and no verbatim node gives the size {symbol}")
            tensor, i, size = self.sizes[symbol]
            self.nodes[symbol] = self.graph.call_function(torch.ops.aten.sym_size.int, (tensor, i))
            self.nodes[symbol].meta["val"] = size
        return self.nodes[symbol]
