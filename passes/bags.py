"""Reading one table lookup off the graph: which table, which ids, pooled how."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.graph.nodes import adds_in_any_order
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, op
from recompile.rewrite import Refuse, arguments

aten = torch.ops.aten
CASTS = (
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
    aten.to.other,
    aten._cast_Long.default,
)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_TABLES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Found:
    """A lookup in the graph. `bag` counts its sources from 0, and its only table is 0."""

    value: fx.Node  # [B, ...]: what users see
    table: fx.Node  # [rows, dim]
    bag: Bag
    sources: tuple[fx.Node, ...]

    @property
    def device(self) -> torch.device:
        return self.table.meta["val"].device  # type: ignore[no-any-return]

    @property
    def is_sequence(self) -> bool:
        """Whether several rows of a sample stand side by side."""
        shape = self.sources[0].meta["val"].shape
        return self.bag.pooling == "none" and len(shape) == 2 and shape[1] != 1

    @property
    def batch(self) -> object:
        return self.value.meta["val"].shape[0]


def find(node: fx.Node) -> Found | None:
    """The lookup that `node` is the value of, or None if it is none.

    Raises:
        Refuse: a lookup that no kernel of ours computes.
    """
    if node.target is aten.embedding.default:
        return _embedding(node)
    if node.target in (aten.embedding_bag.default, aten.embedding_bag.padding_idx):
        return _embedding_bag(node)
    if op.is_lookup(node.target):
        return _pooled(node)
    return None


def table_name(node: fx.Node) -> str:
    """A table's name for people: `emb.C0.weight` for Dynamo's `l_self_modules_emb_modules_c0_parameters_weight_`.

    An exported program says it itself (see `recompile/exported.py`).
    """
    if "recompile_name" in node.meta:
        return str(node.meta["recompile_name"])
    name = re.sub(r"^[lL]_self_(modules_)?", "", node.name)
    return re.sub(r"_(modules|parameters|buffers)_", ".", name).strip("_").replace("__", ".")


def ids_of(node: fx.Node) -> tuple[fx.Node, sympy.Basic]:
    """What `node` computes from each element of another node: that node, and the row as an expression of `x0`.

    Casts to integers, sums with constants, `% n` and clamps are followed; anything else is taken as it is.
    """
    steps = []
    while (step := id_step(node)) is not None:
        node, apply = step
        steps.append(apply)
    expr: sympy.Basic = scalar.symbol("x0")
    if not _dtype(node).is_floating_point and not steps:
        return node, expr
    for apply in reversed(steps):
        expr = apply(expr)
    return node, expr


def id_step(node: fx.Node) -> tuple[fx.Node, Callable[[Any], Any]] | None:
    """(input, the function of one element that `node` is): casts to int64, arithmetic with constants; or None."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if (
        not isinstance(source, fx.Node)
        or not isinstance(node.target, OpOverload)
        or _dtype(node) is not torch.int64
    ):
        return None
    if node.target in CASTS:
        if _dtype(source) is torch.bool:
            return None
        return source, scalar.trunc if _dtype(source).is_floating_point else lambda x: x
    apply = _ON_IDS.get(node.target.overloadpacket)
    given = [value for name, value in arguments(node).items() if name != "self"]
    if (
        apply is None
        or _dtype(source) is not torch.int64
        or not all(type(v) in (int, type(None)) for v in given)
    ):
        return None
    if apply is sympy.Mod and given[0] <= 0:
        return None
    return source, lambda x: apply(x, *given)


def _clamp(x: sympy.Basic, low: int | None = None, high: int | None = None) -> sympy.Basic:
    x = x if low is None else sympy.Max(x, low)
    return x if high is None else sympy.Min(x, high)


# Arithmetic on ids: the operator's arguments after the first, all constants.
_ON_IDS: dict[Any, Callable[..., Any]] = {
    aten.add: lambda x, number, alpha: x + number * alpha,
    aten.sub: lambda x, number, alpha: x - number * alpha,
    aten.remainder: sympy.Mod,
    aten.clamp: _clamp,
    aten.clamp_min: _clamp,
    aten.clamp_max: lambda x, high: _clamp(x, None, high),
}


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def check_table(node: fx.Node) -> fx.Node:
    """The table of an `embedding` or `embedding_bag` node.

    Raises:
        Refuse: no kernel of ours reads it, or makes the gradient that it asks for.
    """
    given = arguments(node)
    table = given["weight"]
    assert isinstance(table, fx.Node)
    val = table.meta["val"]
    if op.op_for(val.device.type) is None:
        raise Refuse(f"no lookup kernel for device {val.device.type}", node)
    if _dtype(table) not in _TABLES:
        raise Refuse(f"tables of {_dtype(table)} have no lookup kernel", node)
    if not isinstance(val.shape[1], int) or val.stride(1) != 1:
        raise Refuse("the table's rows are not dense vectors of a fixed width", node)
    if given.get("scale_grad_by_freq"):
        raise Refuse("scale_grad_by_freq changes the gradient in a way no kernel of ours computes", node)
    if given.get("sparse") and val.requires_grad and torch.is_grad_enabled():
        raise Refuse("sparse=True asks for sparse gradients, which eager must make", node)
    if val.requires_grad and (why := adds_in_any_order(table)):
        raise Refuse(why, node)
    return table


def _embedding(node: fx.Node) -> Found:
    given = arguments(node)
    table = check_table(node)
    ids = given["indices"]
    assert isinstance(ids, fx.Node)
    source, row = ids_of(ids)
    shape = source.meta["val"].shape
    if len(shape) not in (1, 2):
        raise Refuse(f"ids with {len(shape)} dimensions are not one or several ids a sample", node)
    if len(shape) == 2 and not isinstance(shape[1], int):
        raise Refuse("an unpooled sequence of a changing length has no place of a fixed width", node)
    if _dtype(source) not in _INTEGERS and not _dtype(source).is_floating_point:
        raise Refuse(f"ids of {_dtype(source)}", node)
    padding = given["padding_idx"]
    assert isinstance(padding, int)
    return Found(node, table, Bag(0, (0,), row=str(row), frozen_row=padding), (source,))


def _embedding_bag(node: fx.Node) -> Found:
    given = arguments(node)
    table = check_table(node)
    values = [u for u in node.users if u.args[1:] == (0,)]
    if len(values) != 1 or len(node.users) != 1:
        raise Refuse("more than the pooled value of this embedding_bag is used", node)
    ids, offsets, weights = given["indices"], given["offsets"], given["per_sample_weights"]
    assert isinstance(ids, fx.Node) and isinstance(offsets, fx.Node)
    pooling = ("sum", "sum", "max")[int(given["mode"])]
    divisor = "Max(1, count)" if given["mode"] == 1 else ""
    padding = given["padding_idx"]
    sources, regular = _regular(ids, offsets)
    if not regular:
        sources = (ids, offsets)
    bag = Bag(0, (0,), pooling, divisor=divisor, offsets=-1 if regular else 1)
    bag = replace(bag, include_last_offset=bool(given["include_last_offset"]) and not regular)
    if padding is not None and padding != -1:
        rows = table.meta["val"].shape[0]
        if not isinstance(rows, int):
            raise Refuse("padding_idx in a table with a changing number of rows", node)
        bag = replace(bag, keep=f"Ne(x0, {padding % rows})")
    if isinstance(weights, fx.Node):
        if regular:
            sources, bag = (
                (ids, offsets),
                replace(bag, offsets=1, include_last_offset=bool(given["include_last_offset"])),
            )
        sources += (weights,)
        bag = replace(bag, loads=(0, len(sources) - 1), weight="x1")
    return Found(values[0], table, bag, sources)


def _regular(ids: fx.Node, offsets: fx.Node) -> tuple[tuple[fx.Node, ...], bool]:
    """The ids as `[B, L]` where the offsets are `arange(0, B * L, L)`: what `embedding_bag` makes of 2-D ids."""
    step = offsets.args[2] if offsets.target is aten.arange.start_step and len(offsets.args) > 2 else None
    if step is None or ids.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return (), False
    matrix = ids.args[0]
    assert isinstance(matrix, fx.Node)
    shape = matrix.meta["val"].shape
    if len(shape) != 2 or offsets.args[0] != 0 or not isinstance(step, int) or shape[1] != step:
        return (), False
    return (matrix,), True


def _pooled(node: fx.Node) -> Found | None:
    spec = Lookup.parse(str(node.args[2]))
    if len(spec.bags) != 1 or len(node.users) != 1:
        return None
    tables, sources = node.args[0], node.args[1]
    return Found(next(iter(node.users)), tables[0], spec.bags[0], tuple(sources))  # type: ignore[arg-type,index]
