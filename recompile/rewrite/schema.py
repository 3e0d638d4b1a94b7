"""A node's arguments by the names of its operator's schema, so that all spellings of a call read the same."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._ops import OpOverload

from recompile.torch_private.symbols import SYM, expression

_DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim"}
_ADDS_A_DIM = {"unsqueeze", "stack"}
_COMMUTATIVE = {
    "add", "mul", "maximum", "minimum", "eq", "ne",
    "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
}  # fmt: skip


class _Required:
    def __repr__(self) -> str:
        return "nothing"


REQUIRED = _Required()


class Argument(NamedTuple):
    """One argument of an operator. `default` is REQUIRED where the schema has none."""

    name: str
    default: Any
    positional: bool
    is_list: bool


@cache
def schema(op: OpOverload) -> tuple[Argument, ...]:
    """The arguments of `op`, in order."""
    return tuple(
        Argument(
            arg.name,
            arg.default_value if arg.has_default_value() else REQUIRED,
            not arg.kwarg_only,
            "List" in str(arg.type),
        )
        for arg in op._schema.arguments
    )


@cache
def _names(op: OpOverload) -> tuple[list[str], set[str]]:
    """The positional arguments of `op`, and all of them."""
    return [arg.name for arg in schema(op) if arg.positional], {arg.name for arg in schema(op)}


def op_name(target: Any) -> str:
    """The name of an operator without namespace and overload, such as `sum`."""
    if isinstance(target, OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


def is_commutative(op: OpOverload) -> bool:
    """Whether the first two operands of `op` may change places."""
    return op.namespace == "aten" and op_name(op) in _COMMUTATIVE


_OPERATORS = {"__iand__": "bitwise_and", "__ior__": "bitwise_or", "__ixor__": "bitwise_xor"}


@cache
def out_of_place(op: OpOverload) -> OpOverload | None:
    """The operator that computes what `op` writes into its first argument: `add` of `add_`; None if there is none."""
    name = op_name(op)
    if op.namespace != "aten" or not (name in _OPERATORS or name.endswith("_")):
        return None
    packet = getattr(torch.ops.aten, _OPERATORS.get(name, name[:-1]), None)
    overloads = [getattr(packet, overload) for overload in packet.overloads()] if packet else []
    return next((found for found in overloads if _types(found) == _types(op)), None)


def _types(op: OpOverload) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in op._schema.arguments]


def bind(op: OpOverload, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """The given arguments by schema name, or None if `op` cannot be called like this."""
    positional, names = _names(op)
    if len(args) > len(positional) or not kwargs.keys() <= names:
        return None
    given = dict(zip(positional, args, strict=False))
    return None if given.keys() & kwargs.keys() else {**given, **kwargs}


def arguments(node: fx.Node) -> dict[str, Any]:
    """All arguments of a node that calls an ATen or custom operator, by schema name.

    Defaults are filled in, an int given for a list is a list, and dimensions count from the front.
    """
    op = node.target
    if not isinstance(op, OpOverload):
        raise TypeError(f"{node.name} calls {op}, which has no schema")
    given = bind(op, node.args, node.kwargs) or {}
    return {arg.name: normal(node, arg, given.get(arg.name, arg.default)) for arg in schema(op)}


def normal(node: fx.Node, arg: Argument, value: Any) -> Any:
    """`value` of the argument `arg` as `arguments(node)` writes it."""
    if arg.is_list and type(value) is int:
        value = [value]
    if arg.name not in _DIMS or getattr(node.target, "namespace", "") != "aten":
        return value
    rank = _rank(node)
    if type(value) is int:
        return value + rank if value < 0 else value
    if isinstance(value, (list, tuple)):
        return [d + rank if type(d) is int and d < 0 else d for d in value]
    return value


def count_from_front(node: fx.Node) -> None:
    """Write the dimensions among the arguments of `node` from the front: `sum(x, [-1])` as `sum(x, [2])`."""
    op = node.target
    if not isinstance(op, OpOverload) or op.namespace != "aten":
        return
    for place, arg in enumerate(schema(op)):
        if arg.name in _DIMS and place < len(node.args):
            node.update_arg(place, normal(node, arg, node.args[place]))
        elif arg.name in _DIMS and arg.name in node.kwargs:
            node.update_kwarg(arg.name, normal(node, arg, node.kwargs[arg.name]))


def _rank(node: fx.Node) -> int:
    """How many dimensions the `dim` of this operator counts; 0 if that is unknown, which changes nothing."""
    first = node.args[0] if node.args else None
    first = first[0] if isinstance(first, (list, tuple)) and first else first
    value = first.meta.get("val") if isinstance(first, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return 0
    return value.ndim + 1 if op_name(node.target) in _ADDS_A_DIM else max(value.ndim, 1)


def is_size(value: Any) -> bool:
    """Whether `value` is a number or a node that computes one."""
    if isinstance(value, fx.Node):
        value = value.meta.get("val")
    return isinstance(value, (int, float, bool, *SYM))


def same(a: Any, b: Any) -> bool:
    """Whether two arguments or sizes are known to be equal. Adds no guard."""
    if a is b:
        return True
    if type(a) is type(b) is int:
        return bool(a == b)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    a, b = _number(a), _number(b)
    if isinstance(a, fx.Node) or isinstance(b, fx.Node):
        return a is b
    if isinstance(a, SYM) or isinstance(b, SYM):
        return is_size(a) and is_size(b) and bool(_expr(a) == _expr(b))
    return bool(a == b)


def differ(a: Any, b: Any) -> bool:
    """Whether two sizes are known to be different. Adds no guard."""
    return isinstance(_number(a), int) and isinstance(_number(b), int) and not same(a, b)


def _number(value: Any) -> Any:
    return value.meta["val"] if isinstance(value, fx.Node) and is_size(value) else value


def _expr(value: Any) -> Any:
    return expression(value) if isinstance(value, SYM) else value
