"""Dynamo's graph -> a normalized ATen graph, before autograd.

    Dynamo                                  captured
    x = l_ids_[slice(None), 3]              slice_1 = aten.slice.Tensor(l_ids_, 0, 0, ...)
                                            x = aten.select.int(slice_1, 1, 3)
    e = F.embedding(x, l_weight_)           e = aten.embedding.default(l_weight_, x)
    torch._C._set_grad_enabled(False)       torch._C._set_grad_enabled(False)            (verbatim: a wall)

Every node of Dynamo's graph is called once on Dynamo's own fake tensors; the ATen operators it calls, heard
above autograd and above decompositions, take its place. A node that has a meaning beyond its ATen calls is
copied verbatim. `docs/capture.md` tells which ones, and why this is not `make_fx`.
"""

from __future__ import annotations

import logging
import operator
import time
from collections import ChainMap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.weak import TensorWeakRef

from recompile.torch_private.predispatch import listening
from recompile.torch_private.symbols import SYM, compute, constant, expression
from recompile.verbatim import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    SELECTS,
    blame,
    describe,
    refuse,
    tensors,
    why_opaque,
)

log = logging.getLogger(__name__)

# What belongs to one node of Dynamo's graph and not to the operators that take its place.
_OWN_META = {"example_value", "unbacked_bindings", "val"}


@dataclass
class Captured:
    """A captured graph.

    Args:
        gm: nodes are ATen operators or verbatim; every tensor node has a FakeTensor in `meta["val"]`.
        opaque: how many nodes were copied verbatim, arithmetic on sizes not counted; each has the reason, a
            sentence, in `meta["opaque"]`.
        ms: time taken, milliseconds.
    """

    gm: fx.GraphModule
    opaque: int
    ms: float


def capture(gm: fx.GraphModule) -> Captured:
    """Turn Dynamo's graph into a pre-dispatch ATen graph with the same inputs and outputs.

    `gm` stays as it is: the result shares its submodules and fake tensors but no nodes. No symbol is
    specialized and no guard is added. Safe to call from several threads, which take turns.

    Raises:
        CaptureError: the graph holds state of vmap, grad or jvp; an input is a tensor subclass; a node
            changes a tensor's shape in place.
    """
    start = time.perf_counter()
    copier = _Copier(gm)
    with _stage(gm), copier.closing(), listening(copier.record):
        for node in gm.graph.nodes:
            copier.add(node)
    copier.sweep()
    captured = _module(gm, copier.graph)
    return Captured(captured, copier.opaque, (time.perf_counter() - start) * 1e3)


class _Opaque(Exception):
    """This node is to be copied verbatim; the message is the reason."""


class _Copier:
    """Builds the captured graph, one node of Dynamo's graph after the other."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.opaque = 0
        self.values: dict[fx.Node, Any] = {}  # Dynamo's node -> its value: fake tensors, sizes, ...
        self.copies: dict[fx.Node, fx.Node] = {}  # Dynamo's node -> its verbatim copy
        # id of a fake tensor, or expression of a size -> the node that computes it. A child map holds what
        # the node at hand adds, until it is known to succeed. `values` and meta["val"] keep the ids alive,
        # but for the results of factories such as `arange`: see `lend`.
        self.known: ChainMap[int | sympy.Basic, fx.Node] = ChainMap({})
        self.lent: dict[int, TensorWeakRef] = {}
        self.sizes: dict[sympy.Basic, tuple[fx.Node, int, Any]] = {}  # symbol -> (tensor, dimension, size)
        self.spare: list[fx.Node] = []  # dropped in the end if nobody uses them
        self.meta: dict[str, Any] = {}  # of the node at hand, for the operators that it calls
        self.autocasts: list[Any] = []  # those that are open at the node at hand

    def add(self, node: fx.Node) -> None:
        """Add what stands for `node`: a copy, or the operators that it calls."""
        refuse(node)
        self.meta = {key: value for key, value in node.meta.items() if key not in _OWN_META}
        why = why_opaque(node, self.values)
        if why is None:
            why = self.expand(node)
        if why is not None:
            self.copy(node, why)

    def expand(self, node: fx.Node) -> str | None:
        """Call `node` and record its operators. If that fails, undo it and say why."""
        last = _last(self.graph)
        parent, self.known = self.known, self.known.new_child()
        try:
            self.values[node] = _call(node, self.values)
            self.check(node, last)
        except _ShapeWrite as write:
            raise blame(node, f"{write} changes the shape of a tensor in place") from None
        except Exception as error:  # nothing is lost: the node stays as it is, with the reason
            self.undo(last)
            self.known = parent
            return f"{describe(node.target)} cannot be expanded: {error}"
        parent.update(self.known.maps[0])
        self.known = parent
        return None

    def check(self, node: fx.Node, last: fx.Node | None) -> None:
        """Raise _Opaque unless the recorded operators are all that `node` does."""
        value = self.values[node]
        made = list(tensors(value))
        if not all(self.knows(tensor) for tensor in made):
            raise _Opaque("it makes a tensor without an ATen operator")
        silent = _last(self.graph) is last and node.target not in SELECTS
        if silent and (made or value is None):
            raise _Opaque("it has an effect that is no ATen operator")

    def undo(self, last: fx.Node | None) -> None:
        """Erase the nodes after `last`."""
        for node in reversed(self.graph.nodes):
            if node is last:
                break
            self.graph.erase_node(node)
        self.spare = [node for node in self.spare if not node._erased]

    def record(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append a node for one call of an ATen operator; return the call's result."""
        if torch.Tag.inplace_view in op.tags:
            raise _ShapeWrite(op)
        new_args, new_kwargs = self.argument(args), self.argument(kwargs)
        name = op.overloadpacket.__name__
        node = self.graph.create_node("call_function", op, new_args, new_kwargs, name=name)
        node.meta.update(self.meta)
        result = op(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or op._schema.is_mutable:
            self.learn(node, result)
        elif self.knows(result):
            self.spare.append(node)  # such as a cast to the dtype that its argument has: it gave the argument
        elif next(tensors([args, kwargs]), None) is None:
            self.lend(node, result)
        else:
            self.learn(node, result)
        return result

    def lend(self, node: fx.Node, made: torch.Tensor) -> None:
        """Learn the result of a factory without holding it.

        torch's binding copies the result if somebody else holds it, and the copy would be another tensor.
        """
        node.meta["val"] = made.detach()
        self.known[id(made)] = node
        self.lent[id(made)] = TensorWeakRef(made)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether a node computes `tensor`; its id may be that of a lent tensor that is gone."""
        lent = self.lent.get(id(tensor))
        return id(tensor) in self.known and (lent is None or lent() is tensor)

    def copy(self, node: fx.Node, why: str) -> None:
        """Copy `node` verbatim."""
        try:
            new = self.copies[node] = self.graph.node_copy(node, self.argument_of)
        except _Opaque as missing:
            raise blame(node, f"an argument cannot be found: {missing}") from None
        if why:
            log.debug("%s is copied verbatim: %s", node.name, why)
            new.meta["opaque"] = why
            self.opaque += 1
        if hasattr(node, "_dynamo_source"):  # AOTAutograd looks for it on placeholders
            new._dynamo_source = node._dynamo_source
        self.values[node] = self.switch(node) or self.value_of(node)
        if "example_value" in node.meta:
            self.learn(new, self.values[node])
            self.learn_sizes(self.values[node])

    def value_of(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and "example_value" not in node.meta:
            return operator.attrgetter(str(node.target))(self.gm)
        return node.meta.get("example_value")

    def switch(self, node: fx.Node) -> Any:
        """Autocast decides the dtypes of what follows, so it is switched here as well; grad mode is not."""
        if node.target is ENTER_AUTOCAST:
            mode = ENTER_AUTOCAST(*node.args)
            torch.set_autocast_cache_enabled(False)  # it would keep our fake tensors
            self.autocasts.append(mode)
            return mode
        if node.target is EXIT_AUTOCAST:
            EXIT_AUTOCAST(self.autocasts.pop())
        return None

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Close what is still open when an error ends the capture."""
        try:
            yield
        finally:
            while self.autocasts:
                EXIT_AUTOCAST(self.autocasts.pop())

    def learn(self, node: fx.Node, value: Any) -> None:
        """From now on `value`, or each part of it, is computed by `node`."""
        if value is not None:
            node.meta["val"] = value
        if isinstance(value, torch.Tensor):
            self.known[id(value)] = node
            self.lent.pop(id(value), None)
        elif isinstance(value, SYM):
            self.known.setdefault(expression(value), node)
        elif isinstance(value, (tuple, list)):
            for i, part in enumerate(value):
                if isinstance(part, (torch.Tensor, tuple, list, *SYM)):
                    self.learn(self.pick(node, i), part)

    def pick(self, node: fx.Node, i: int) -> fx.Node:
        new = self.graph.call_function(operator.getitem, (node, i))
        new.meta.update(self.meta)
        self.spare.append(new)
        return new

    def learn_sizes(self, value: Any) -> None:
        for tensor in tensors(value):
            for i, size in enumerate(tensor.shape):
                if isinstance(size, torch.SymInt):
                    self.sizes.setdefault(expression(size), (self.known[id(tensor)], i, size))

    def argument_of(self, node: fx.Node) -> Any:
        """What to pass where Dynamo's graph passes `node`."""
        value = self.values[node]
        # An in-place operator gives a tensor a newer node than the copy of the one that made it.
        if node in self.copies and not isinstance(value, torch.Tensor):
            return self.copies[node]
        return self.argument(value)

    def argument(self, value: Any) -> Any:
        """`value` with every tensor and size in it replaced by the node that computes it."""
        if isinstance(value, torch.Tensor):
            if not self.knows(value):
                raise _Opaque("it uses a tensor constant")
            return self.known[id(value)]
        if isinstance(value, SYM):
            return self.size(value)
        if isinstance(value, (tuple, list)):
            parts = [self.argument(part) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, dict):
            return {key: self.argument(part) for key, part in value.items()}
        return value

    def size(self, value: Any) -> Any:
        """The node that computes the size `value`, made if need be; a number if it is known."""
        if (number := constant(value)) is not None:
            return number
        expr = expression(value)
        if expr not in self.known:
            symbols = {symbol: self.symbol(symbol) for symbol in expr.free_symbols}
            node = symbols[expr] if expr in symbols else compute(self.graph, expr, symbols)
            node.meta["val"] = value
            self.known[expr] = node
        return self.known[expr]

    def symbol(self, symbol: sympy.Symbol) -> fx.Node:
        if symbol not in self.known:
            if symbol not in self.sizes:
                raise _Opaque(f"no input and no verbatim node gives the size {symbol}")
            tensor, i, size = self.sizes[symbol]
            self.known[symbol] = self.graph.call_function(torch.ops.aten.sym_size.int, (tensor, i))
            self.known[symbol].meta["val"] = size
        return self.known[symbol]

    def sweep(self) -> None:
        """Drop the spare nodes that nobody uses."""
        for node in reversed(self.spare):
            if not node.users:
                self.graph.erase_node(node)


class _ShapeWrite(Exception):
    """An operator that changes a tensor's shape in place: earlier nodes' fake tensors show it already."""


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _last(graph: fx.Graph) -> fx.Node | None:
    return next(reversed(graph.nodes), None)


@contextmanager
def _stage(gm: fx.GraphModule) -> Iterator[None]:
    """What calling Dynamo's nodes on its fake tensors needs, and what keeps that without consequences."""
    # Dynamo's own fake mode: the mode that the backend is given is another one, and mixing them raises.
    values = (node.meta.get("example_value") for node in gm.graph.nodes)
    fake_mode = next((t.fake_mode for t in tensors(list(values)) if isinstance(t, FakeTensor)), None)
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if fake_mode is not None:
                stack.enter_context(fake_mode)
            if fake_mode is not None and fake_mode.shape_env is not None:
                stack.enter_context(fake_mode.shape_env.ignore_fresh_unbacked_symbols())
            yield
    finally:
        torch.set_autocast_cache_enabled(cached)


def _module(gm: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    """`graph` with the submodules of `gm`, and what Dynamo notes on `gm` for AOTAutograd and Inductor."""
    captured = fx.GraphModule(gm, graph)
    captured.meta = dict(gm.meta)
    for name, value in vars(gm).items():
        vars(captured).setdefault(name, value)
    for name, module in gm.named_children():
        if not hasattr(captured, name):  # hooks on saved tensors: no node names them
            captured.add_module(name, module)
    return captured
