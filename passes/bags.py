"""Reading one table lookup off the graph: which table, which ids, pooled how."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.graph.nodes import adds_in_any_order
from recompile.lowering import scalar
from recompile.lowering.lookup import Bag, Lookup, op
from recompile.rewrite import Refuse, arguments

from .computed import learns
from .ids import CASTS, INTEGERS, bounds, ids_of

aten = torch.ops.aten
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
    if node.target is aten.index.Tensor:
        return _indexed(node)
    if node.target in (aten.matmul.default, aten.mm.default):
        return _one_hot(node)
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


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = node.meta["val"].dtype
    return dtype


def check_table(node: fx.Node, table: fx.Node) -> fx.Node:
    """The table that `node` looks up, checked.

    Raises:
        Refuse: no kernel of ours reads it, or makes the gradient that it asks for, or it is not worth writing out.
    """
    val = table.meta["val"]
    if op.op_for(val.device.type) is None:
        raise Refuse(f"no lookup kernel for device {val.device.type}", node)
    if _dtype(table) not in _TABLES:
        raise Refuse(f"tables of {_dtype(table)} have no lookup kernel", node)
    if not isinstance(val.shape[1], int) or val.stride(1) != 1:
        raise Refuse("the table's rows are not dense vectors of a fixed width", node)
    if _is_read_by_rows(table):
        raise Refuse("the table is computed elementwise: Inductor computes only the rows that are read", node)
    given = arguments(node)
    if given.get("scale_grad_by_freq"):
        raise Refuse("scale_grad_by_freq changes the gradient in a way no kernel of ours computes", node)
    if given.get("sparse") and learns(table):
        raise Refuse("sparse=True asks for sparse gradients, which eager must make", node)
    if learns(table) and (why := adds_in_any_order(table)):
        raise Refuse(why, node)
    return table


def _is_read_by_rows(table: fx.Node) -> bool:
    """Whether Inductor computes elements of `table` where they are read, not all of them: for lookups alone."""
    if any(user.target is not aten.embedding.default for user in table.users):
        return False
    while isinstance(table.target, OpOverload):
        if table.target in CASTS or torch.Tag.pointwise in table.target.tags:
            return True
        if not table.target.is_view:
            return False
        table = table.args[0]  # type: ignore[assignment]
    return False


def _rows(ids: fx.Node, node: fx.Node) -> tuple[fx.Node, sympy.Basic]:
    """What the kernel loads for the ids of the lookup `node`, and the row that it reads for each."""
    source, row = ids_of(ids)
    if _dtype(source) not in INTEGERS and not _dtype(source).is_floating_point:
        raise Refuse(f"ids of {_dtype(source)}", node)
    return source, row


def _embedding(node: fx.Node) -> Found:
    given = arguments(node)
    check_table(node, given["weight"])
    source, row = _rows(given["indices"], node)
    shape = source.meta["val"].shape
    if len(shape) not in (1, 2):
        raise Refuse(f"ids with {len(shape)} dimensions are not one or several ids a sample", node)
    if len(shape) == 2 and not isinstance(shape[1], int):
        raise Refuse("an unpooled sequence of a changing length has no place of a fixed width", node)
    if len(shape) == 2 and shape[1] == 0:
        raise Refuse("there are no positions to look up", node)
    bag = Bag(0, (0,), row=scalar.text(row), frozen_row=int(given["padding_idx"]))
    return Found(node, given["weight"], bag, (source,))


def _indexed(node: fx.Node) -> Found | None:
    """`table[ids]`, one id a sample of a table that is an input: ids below 0 count from its end."""
    table, indices = arguments(node).values()
    if table.op != "placeholder" or len(indices) != 1 or not isinstance(indices[0], fx.Node):
        return None
    (rows, *columns), val = table.meta["val"].shape, indices[0].meta["val"]
    one_id = len(columns) == val.dim() == 1 and val.dtype in (torch.int64, torch.int32)
    if not one_id or not isinstance(rows, int):
        return None
    check_table(node, table)
    source, row = _rows(indices[0], node)
    if bounds(row)[0] < 0:
        row = scalar.where(row < 0, row + rows, row)
    return Found(node, table, Bag(0, (0,), row=scalar.text(row)), (source,))


def _one_hot(node: fx.Node) -> Found | None:
    """`one_hot(ids, rows).float() @ table`, one id a sample: its row, and an error for ids outside, as in eager."""
    hot, table = arguments(node).values()
    ones = hot.args[0] if hot.target is aten.to.dtype else hot
    if ones.target is not aten.one_hot.default:
        return None
    ids, val = ones.args[0], table.meta["val"]
    if ids.meta["val"].dim() != 1 or val.dim() != 2 or val.dtype != node.meta["val"].dtype:
        return None
    check_table(node, table)
    source, row = _rows(ids, node)
    return Found(node, table, Bag(0, (0,), row=scalar.text(row)), (source,))


def _embedding_bag(node: fx.Node) -> Found:
    given = arguments(node)
    table = given["weight"]
    check_table(node, table)
    values = [u for u in node.users if u.args[1:] == (0,)]
    if len(values) != 1 or len(node.users) != 1:
        raise Refuse("more than the pooled value of this embedding_bag is used", node)
    ids, offsets, weights = given["indices"], given["offsets"], given["per_sample_weights"]
    assert isinstance(ids, fx.Node) and isinstance(offsets, fx.Node)
    matrix = _matrix(ids, offsets) if weights is None else None
    source, row = _rows(ids if matrix is None else matrix, node)
    bag = Bag(0, (0,), ("sum", "sum", "max")[int(given["mode"])], row=scalar.text(row))
    bag = replace(bag, divisor="Max(1, count)" if given["mode"] == 1 else "")
    sources: tuple[fx.Node, ...] = (source,)
    if matrix is None:
        sources = (source, offsets)
        bag = replace(bag, offsets=1, include_last_offset=bool(given["include_last_offset"]))
    padding, from_the_end = given["padding_idx"], node.target is aten.embedding_bag.padding_idx
    if padding is not None and (padding != -1 or from_the_end):  # -1 is none to the other operators
        rows = table.meta["val"].shape[0]
        if not isinstance(rows, int):
            raise Refuse("padding_idx in a table with a changing number of rows", node)
        bag = replace(bag, keep=scalar.text(sympy.Ne(row, padding % rows)))
    if isinstance(weights, fx.Node):
        sources += (weights,)
        bag = replace(bag, loads=(0, 2), weight="x1")
    return Found(values[0], table, bag, sources)


def _matrix(ids: fx.Node, offsets: fx.Node) -> fx.Node | None:
    """The ids as `[B, L]` where the offsets are `arange(0, B * L, L)`: what `embedding_bag` makes of 2-D ids."""
    step = offsets.args[2] if offsets.target is aten.arange.start_step and len(offsets.args) > 2 else None
    if step is None or ids.target not in (aten.view.default, aten.reshape.default, aten._unsafe_view.default):
        return None
    matrix = ids.args[0]
    assert isinstance(matrix, fx.Node)
    shape = matrix.meta["val"].shape
    if len(shape) != 2 or offsets.args[0] != 0 or not isinstance(step, int) or shape[1] != step:
        return None
    return matrix


def _pooled(node: fx.Node) -> Found | None:
    spec = Lookup.parse(str(node.args[2]))
    if len(spec.bags) != 1 or len(node.users) != 1:
        return None
    tables, sources = node.args[0], node.args[1]
    return Found(next(iter(node.users)), tables[0], spec.bags[0], tuple(sources))  # type: ignore[arg-type,index]
