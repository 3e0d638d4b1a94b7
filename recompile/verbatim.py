"""Which nodes of Dynamo's graph mean more than the ATen operators they call, and which graphs are refused."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from recompile.errors import CaptureError
from recompile.report import user_line
from recompile.torch_private.symbols import SYM

ENTER_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._enter_autocast
EXIT_AUTOCAST: Callable[..., Any] = torch.amp.autocast_mode._exit_autocast
# May give back an argument, or a part of one, without calling an operator.
SELECTS = {operator.getitem, getattr, "contiguous"}
# Left out. Modules made in forward() call the first; torch.export notes with the second what a cast is given, and
# Inductor drops that.
NO_EFFECT = {torch._C._log_api_usage_once, torch.ops.aten._assert_tensor_metadata.default}

_SWITCHES = {ENTER_AUTOCAST, EXIT_AUTOCAST, torch._C._set_grad_enabled}
_NO_USER_CODE = {
    "torch",
    "_operator",
    "math",
    "builtins",
}  # the packages of functions that hold no user's code
_FUNCTORCH = ("torch._functorch.", "torch._C._functorch.", "torch.func.")


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in `value`, through tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)
    elif isinstance(value, dict):
        yield from tensors(list(value.values()))


def why_opaque(node: fx.Node, values: dict[fx.Node, Any]) -> str | None:
    """Why `node` must be copied verbatim: a sentence, or "" where a copy is its normal form, or None.

    Args:
        values: the value of each node before `node`.
    """
    if node.op in ("placeholder", "output", "get_attr"):
        return ""
    if node.op == "call_module":
        return "it calls a module"
    if isinstance(node.target, HigherOrderOperator):
        return "it is a higher-order operator, with graphs or a backward of its own"
    if node.target in _SWITCHES:
        return "it switches autocast or grad mode"
    if "unbacked_bindings" in node.meta:
        return "its shape or value depends on data"
    if node.op == "call_function" and not _is_torch(node.target):
        return "it calls a function that is not torch's, which may have a backward of its own"
    return _why_by_values(node, values)


def refuse(node: fx.Node) -> None:
    """Raise CaptureError if no graph with `node` in it can be captured."""
    if node.op == "placeholder":
        _refuse_input(node)
    elif not isinstance(node.target, HigherOrderOperator) and f"{_owner(node.target)}.".startswith(
        _FUNCTORCH
    ):
        raise blame(
            node, "the graph holds the state of a vmap, grad or jvp, which no ATen operator expresses"
        )


def blame(node: fx.Node, why: str) -> CaptureError:
    """The error for a graph that cannot be captured because of `node`."""
    return CaptureError(why, node.name, user_line(node))


def describe(target: Any) -> str:
    """A target of a node for people, such as `relu` or `x.t_`."""
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _why_by_values(node: fx.Node, values: dict[fx.Node, Any]) -> str | None:
    """Calls that are never made: nested tensors have operators of their own, and those without a tensor compute a size
    or change torch's state.
    """
    given = [values[source] for source in node.all_input_nodes]
    made = node.meta.get("example_value")
    if any(tensor.is_nested for tensor in tensors([given, made])):
        return "it works on a nested tensor"
    if node.target in SELECTS or next(tensors([given, made]), None) is not None:
        return None
    return "" if isinstance(made, (int, float, *SYM)) else "it reads or changes something that is no tensor"


def _refuse_input(node: fx.Node) -> None:
    if "example_value" not in node.meta:
        raise blame(node, "an input has no example_value: this is no graph from Dynamo")
    value = node.meta["example_value"]
    if isinstance(value, torch.Tensor) and type(value) is not FakeTensor and not value.is_nested:
        raise blame(
            node, f"the input is a {type(value).__name__}, a subclass of Tensor with its own operators"
        )


def _is_torch(target: Any) -> bool:
    """Whether calling `target` runs nothing but torch's code, and no autograd.Function."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        return True
    owner = getattr(target, "__self__", None)
    if isinstance(owner, type) and issubclass(owner, torch.autograd.Function):
        return False
    return _owner(target).split(".")[0] in _NO_USER_CODE


def _owner(target: Any) -> str:
    """The module that `target` comes from; for methods the module of their class. "" if unknown."""
    owner = getattr(target, "__self__", None)
    if isinstance(owner, ModuleType):
        return owner.__name__
    if owner is not None:
        return (owner if isinstance(owner, type) else type(owner)).__module__
    return getattr(target, "__module__", None) or ""
