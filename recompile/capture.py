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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from recompile.known import OWN_META, Known, Unknown
from recompile.rewrite.schema import out_of_place
from recompile.torch_private import checkpoint
from recompile.torch_private.predispatch import listening
from recompile.verbatim import (
    ENTER_AUTOCAST,
    EXIT_AUTOCAST,
    NO_EFFECT,
    SELECTS,
    blame,
    describe,
    refuse,
    tensors,
    why_opaque,
)

log = logging.getLogger(__name__)


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
            changes, in place, the shape of a verbatim node's result.
    """
    start = time.perf_counter()
    copier = _Copier(gm)
    with _stage(gm), copier.closing(), listening(copier.record):
        for node in gm.graph.nodes:
            copier.add(node)
    copier.known.sweep()
    captured = _module(gm, copier.graph)
    return Captured(captured, copier.opaque, (time.perf_counter() - start) * 1e3)


class _ShapeWrite(Exception):
    """It changes in place the shape of a verbatim node's result, whose fake tensor shows it already.

    Dynamo breaks the graph where an input would change its shape.
    """


class _Copier:
    """Builds the captured graph, one node of Dynamo's graph after the other."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.graph = fx.Graph()
        self.known = Known(self.graph)
        self.opaque = 0
        self.values: dict[fx.Node, Any] = {}  # Dynamo's node -> its value: fake tensors, sizes, ...
        self.copies: dict[fx.Node, fx.Node] = {}  # Dynamo's node -> its verbatim copy
        self.meta: dict[str, Any] = {}  # of the node at hand, for the operators that it calls
        self.autocasts: list[Any] = []  # those that are open at the node at hand

    def add(self, node: fx.Node) -> None:
        """Add what stands for `node`: a copy, or the operators that it calls."""
        refuse(node)
        if node.target in NO_EFFECT:
            return
        self.meta = {key: value for key, value in node.meta.items() if key not in OWN_META}
        why = None if checkpoint.body(node, self.values) else why_opaque(node, self.values)
        if why is None:
            why = self.expand(node)
        if why is not None:
            self.copy(node, why)
        if node.op == "get_attr":
            self.known.spare.append(self.copies[node])  # nobody reads the graph of a checkpoint any more

    def expand(self, node: fx.Node) -> str | None:
        """Call `node` and record its operators. If that fails, undo it and say why."""
        last = self.known.begin()
        try:
            self.call(node)
            self.check(node, last)
        except _ShapeWrite as write:
            raise blame(node, f"{write} changes the shape of the result of a verbatim node") from None
        except Exception as error:  # nothing is lost: the node stays as it is, with the reason
            self.known.undo(last)
            return f"{describe(node.target)} cannot be expanded: {error}"
        self.known.commit()
        return None

    def call(self, node: fx.Node) -> None:
        """Call `node`, and of a checkpoint each node that is inside it."""
        body = checkpoint.body(node, self.values)
        self.values[node] = _call(node, self.values) if body is None else self.inline(node, body)

    def inline(self, node: fx.Node, body: fx.GraphModule) -> Any:
        """Call what is in the checkpoint `node`, and return its result.

        Raises:
            Unknown: something in it must be copied verbatim.
        """
        marks, given = checkpoint.marks(self.meta), iter(node.args[1:])
        for inner in body.graph.nodes:
            if inner.op == "placeholder":
                self.values[inner] = fx.node.map_arg(next(given), self.values.__getitem__)
            elif inner.op == "get_attr":
                self.values[inner] = operator.attrgetter(str(inner.target))(body)
            elif inner.op == "output":
                return fx.node.map_arg(inner.args[0], self.values.__getitem__)
            elif inner.target not in NO_EFFECT:
                self.meta = {key: value for key, value in inner.meta.items() if key not in OWN_META} | marks
                if not checkpoint.body(inner, self.values) and (why := why_opaque(inner, self.values)):
                    raise Unknown(f"{describe(inner.target)} is in it: {why}")
                last = self.known.last()
                self.call(inner)
                self.check(inner, last)
        raise AssertionError("a graph without an output")

    def check(self, node: fx.Node, last: fx.Node | None) -> None:
        """Raise Unknown unless the operators recorded after `last` are all that `node` does."""
        value = self.values[node]
        made = list(tensors(value))
        if not all(self.known.knows(tensor) for tensor in made):
            raise Unknown("it makes a tensor without an ATen operator")
        silent = self.known.last() is last and node.target not in SELECTS
        if silent and (made or value is None):
            raise Unknown("it has an effect that is no ATen operator")

    def record(self, op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Append a node for one call of an ATen operator; return the call's result."""
        target = self.rename(op, args[0]) if torch.Tag.inplace_view in op.tags else op
        new_args, new_kwargs = self.known.argument(args), self.known.argument(kwargs)
        name = target.overloadpacket.__name__
        node = self.graph.create_node("call_function", target, new_args, new_kwargs, name=name)
        node.meta.update(self.meta)
        result = op(*args, **kwargs)
        if not isinstance(result, torch.Tensor) or op._schema.is_mutable:
            self.known.learn(node, result)
        elif self.known.knows(result):
            self.known.spare.append(node)  # such as a cast to the dtype that its argument has already
        elif name.endswith("_like") or next(tensors([args, kwargs]), None) is None:
            self.known.lend(node, result)
        else:
            self.known.learn(node, result)
        return result

    def rename(self, op: OpOverload, written: torch.Tensor) -> OpOverload:
        """`x.t_()` gives the name x to the view `x.t()`: return the operator that makes the view."""
        node = self.known.argument(written)
        view = out_of_place(op)
        if view is None or not view.is_view or "example_value" in node.meta:
            raise _ShapeWrite(op)
        before = written.detach()
        while isinstance(node, fx.Node) and node.meta["val"] is written:  # through other in-place operators
            node.meta["val"] = before
            node = node.args[0]
        return view

    def copy(self, node: fx.Node, why: str) -> None:
        """Copy `node` verbatim."""
        try:
            new = self.copies[node] = self.graph.node_copy(node, self.argument)
        except Unknown as missing:
            raise blame(node, f"an argument cannot be found: {missing}") from None
        if why:
            log.debug("%s is copied verbatim: %s", node.name, why)
            new.meta["opaque"] = why
            self.opaque += 1
        if hasattr(node, "_dynamo_source"):  # AOTAutograd looks for it on placeholders
            new._dynamo_source = node._dynamo_source
        self.values[node] = self.switch(node) or self.value(node)
        if "example_value" in node.meta:
            self.known.learn(new, self.values[node])
            self.known.learn_sizes(self.values[node])

    def value(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and "example_value" not in node.meta:
            return operator.attrgetter(str(node.target))(self.gm)
        return node.meta.get("example_value")

    def argument(self, node: fx.Node) -> Any:
        """What to pass where Dynamo's graph passes `node`."""
        value = self.values[node]
        # An in-place operator gives a tensor a newer node than the copy of the one that made it.
        if node in self.copies and not isinstance(value, torch.Tensor):
            return self.copies[node]
        return self.known.argument(value)

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


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args: Any
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    if node.target is operator.setitem and isinstance(args[2], (bool, int, float)):
        # A number would become a tensor where the listener does not hear it.
        args = (*args[:2], torch.full((), args[2], dtype=args[0].dtype, device=args[0].device))
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)  # type: ignore[operator]


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
        # No node names hooks on saved tensors, nor the graphs of checkpoints: they tell torch's caches a graph with
        # checkpoints from one without, since marks on nodes are in no cache's key.
        if not hasattr(captured, name):
            captured.add_module(name, module)
    return captured
