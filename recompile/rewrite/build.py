"""New nodes: values on fake tensors, sizes as nodes, and the place in the user's model they stand for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from recompile.errors import RecompileError
from recompile.rewrite.base import Refuse
from recompile.rewrite.effects import Effects, autocast_at
from recompile.rewrite.schema import op_name
from recompile.torch_private.overloads import overload_for
from recompile.torch_private.symbols import SYM, constant, expression

# What describes a node's own value; everything else tells where in the model it comes from.
_OWN_META = {
    "val", "tensor_meta", "example_value", "opaque", "unbacked_bindings", "eager_input_vals",
    "recompile_replaced_by",
}  # fmt: skip


class Builder:
    """Adds nodes to a graph right after one of its nodes.

    Args:
        after: new nodes follow it, in the order in which they are made.
        like: the node whose place in the user's model they take; `after` unless said.
        rule: the name of the rule, noted in `meta["recompile_rule"]`.
    """

    def __init__(self, effects: Effects, after: fx.Node, rule: str = "", like: fx.Node | None = None) -> None:
        self.effects, self.after, self.rule = effects, after, rule
        self.like = after if like is None else like
        self.made: list[fx.Node] = []

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new node that calls `target`, an operator, an overload of one, or a function on sizes.

        Arguments are nodes, constants, sizes (SymInts) of nodes that are arguments too, or lists of those.

        Raises:
            RecompileError: the operator does not take these arguments.
            Refuse: a SymInt is no dimension of a tensor at hand.
        """
        node = self._add(target, args, kwargs)
        self.refresh(node)
        return node

    def equal(self, target: OpOverload, *args: Any) -> fx.Node:
        """The same for a call whose value is known to be that of `like`, in layout and memory too.

        It costs nothing, where running an operator on dynamic sizes takes milliseconds.
        """
        node = self._add(target, args, {})
        node.meta["val"] = self.like.meta["val"]
        self.effects.learn(node)
        return node

    def refresh(self, node: fx.Node) -> None:
        """Compute `node.meta["val"]` from its arguments' values."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        with ambient((args, kwargs, self.like.meta.get("val"))), autocast_at(self.effects.autocasts[node]):
            try:
                node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]
            except (TypeError, RuntimeError, ValueError, IndexError) as error:
                given = ", ".join(map(_show, args))
                raise RecompileError(f"{op_name(node.target)}({given}) fails: {error}") from error
        self.effects.learn(node)

    def _add(self, target: Any, args: Any, kwargs: Any) -> fx.Node:
        tensors = list(_nodes((args, kwargs)))
        args, kwargs = self._sizes((args, kwargs), tensors)
        if isinstance(target, OpOverloadPacket):
            values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
            target = overload_for(target, *values[0], **values[1])
        graph, last = self.after.graph, self.made[-1] if self.made else self.after
        with graph.inserting_after(last):
            node = graph.create_node("call_function", target, args, kwargs, name=op_name(target))
        self.made.append(node)
        node.meta.update({key: value for key, value in self.like.meta.items() if key not in _OWN_META})
        if self.rule:
            node.meta["recompile_rule"] = self.rule
        self.effects.adopt(node, self.after)
        return node

    def discard(self) -> None:
        """Erase the new nodes that nobody uses."""
        for node in reversed(self.made):
            if not node.users:
                node.graph.erase_node(node)

    def _sizes(self, value: Any, tensors: list[fx.Node]) -> Any:
        """`value` with every SymInt in it as a number or a node."""
        if isinstance(value, SYM):
            number = constant(value)
            return self._size(value, tensors) if number is None else number
        if isinstance(value, dict):
            return {key: self._sizes(part, tensors) for key, part in value.items()}
        if isinstance(value, (tuple, list)):
            parts = [self._sizes(part, tensors) for part in value]
            return parts if isinstance(value, list) else tuple(parts)
        return value

    def _size(self, size: Any, tensors: list[fx.Node]) -> fx.Node:
        expr = expression(size)
        if expr in self.effects.sizes:
            known: fx.Node = self.effects.sizes[expr]
            return known
        for tensor in [*tensors, *self.like.all_input_nodes]:
            for i, other in enumerate(getattr(tensor.meta.get("val"), "shape", ())):
                if isinstance(other, SYM) and expression(other) == expr:
                    return self.call(torch.ops.aten.sym_size.int, tensor, i)
        raise Refuse(f"no tensor at hand has a dimension of the size {expr}", self.like)


@contextmanager
def ambient(values: Any) -> Iterator[None]:
    """What operators on these fake tensors need around them: their fake mode, and no autograd."""
    mode = next((t.fake_mode for t in _leaves(values) if isinstance(t, FakeTensor)), None)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if mode is not None:
            stack.enter_context(mode)
            if mode.shape_env is not None:
                stack.enter_context(mode.shape_env.ignore_fresh_unbacked_symbols())
        yield


def _leaves(value: Any) -> Iterator[Any]:
    parts: Iterable[Any] = value.values() if isinstance(value, dict) else value
    if isinstance(value, (dict, tuple, list)) and not isinstance(value, torch.Size):
        for part in parts:
            yield from _leaves(part)
    else:
        yield value


def _nodes(value: Any) -> Iterator[fx.Node]:
    return (leaf for leaf in _leaves(value) if isinstance(leaf, fx.Node))


def _show(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return f"[{', '.join(map(_show, value))}]" if isinstance(value, (list, tuple)) else repr(value)
