"""What nodes cost by their shapes: bytes moved and operations, as numbers or as expressions in dynamic sizes.

Each node counts as if it ran by itself: it reads its inputs and writes its result. A view costs nothing; a lookup reads
the rows it takes, each anew. So a region's cost before is more than what Inductor, which fuses pointwise nodes, moves.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils._pytree import tree_leaves

from .lowering.lookup import Lookup
from .rewrite.effects import storages
from .torch_private.symbols import SYM, expression

aten = torch.ops.aten
_PRODUCTS = {  # by packet: which argument's last dim is summed over
    aten.mm: 0, aten.bmm: 0, aten.matmul: 0, aten.linear: 0, aten.addmm: 1, aten.baddbmm: 1,
}  # fmt: skip
_REDUCTIONS = {
    aten.sum, aten.mean, aten.amax, aten.amin, aten.max, aten.min, aten.prod, aten.var, aten.std, aten.logsumexp,
    aten.norm, aten.linalg_vector_norm,
}  # fmt: skip
_GATHERS = (aten.embedding, aten.index, aten.index_select, aten.gather, aten.embedding_bag)


class Cost(NamedTuple):
    """Bytes moved and floating-point operations: ints, or sympy expressions in dynamic sizes."""

    bytes: Any = 0
    flops: Any = 0

    def __add__(self, other: Any) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)


def numel(value: Any) -> Any:
    """Elements of a tensor, or of several."""
    return sum(math.prod(map(_size, x.shape)) for x in _tensors(value))


def moved(value: Any) -> Any:
    """The bytes of a tensor, or of several; what a stride of 0 repeats counts once."""
    return sum(x.element_size() * _apart(x) for x in _tensors(value))


def _apart(x: Tensor) -> Any:
    sizes = zip(x.shape, x.stride(), strict=True)
    return math.prod(_size(n) for n, step in sizes if not (isinstance(step, int) and step == 0))


def cost(node: fx.Node, args: Any = None, kwargs: Any = None) -> Cost:
    """The cost of a node; of a lookup or an attention, by its spec.

    Args:
        args, kwargs: the node's arguments where it has lost them, as an erased node has.
    """
    args, kwargs = (node.args, node.kwargs) if args is None else (args, kwargs)
    value = node.meta.get("val")
    if node.op != "call_function" or not isinstance(value, (Tensor, tuple, list)):
        return Cost()
    inputs = [leaf.meta.get("val") for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, fx.Node)]
    if is_region(node):
        return _region(node, args, inputs, value)
    packet = getattr(node.target, "overloadpacket", None)
    if packet is None or not set(storages(value)).isdisjoint(s for x in inputs for s in storages(x)):
        return Cost()
    if packet in _GATHERS:
        return _gathered(packet, inputs, value)
    return Cost(moved(inputs) + moved(value), _flops(packet, args, inputs, value))


def _flops(packet: Any, args: Any, inputs: list[Any], value: Any) -> Any:
    """Two operations for each product; else one for each element of the result, or of what is reduced."""
    if packet in _PRODUCTS:
        return 2 * numel(value) * _last(args[_PRODUCTS[packet]])
    if packet is aten.scaled_dot_product_attention:
        q, k, v = inputs[:3]
        return _attention(q, k, v, [], value).flops
    if packet is aten.einsum:
        return _einsum(args[0], inputs)
    return numel(inputs[0] if packet in _REDUCTIONS else value)


def _einsum(equation: str, operands: list[Tensor]) -> Any:
    """One product for each index of all letters, as of two operands."""
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes = {"": 1}
    for term, x in zip(terms, operands, strict=True):
        head, dots, tail = term.partition("...")
        named = (*head, *[f"...{k}" for k in range(x.dim() - len(head + tail), 0, -1)] * bool(dots), *tail)
        sizes |= {name: _size(n) for name, n in zip(named, x.shape, strict=True) if sizes.get(name, 1) == 1}
    return 2 * math.prod(sizes.values())


def is_region(node: fx.Node) -> bool:
    """Whether a node is a region operator."""
    return isinstance(node.target, OpOverload) and node.target.namespace == "recompile"


def _region(node: fx.Node, args: Any, inputs: list[Any], value: Any) -> Cost:
    spec = args[-1] if isinstance(args[-1], str) else ""
    if spec.startswith("Attention("):
        q, k, v, extras = _vals(args[:4])
        return _attention(q, k, v, extras, value[0])
    if spec.startswith("Lookup("):
        tables, sources = _vals(args[:2])
        return _lookup(tables, sources, Lookup.parse(spec), value)
    return Cost(moved(inputs) + moved(value))  # a user's: see `regions.py`


def _attention(q: Tensor, k: Tensor, v: Tensor, extras: list[Tensor], out: Tensor) -> Cost:
    """Everything once; two products for each pair, also for those that are skipped."""
    rows = math.prod(map(_size, out.shape[:-1]))
    widths = _size(q.shape[-1]) + _size(v.shape[-1])
    return Cost(moved([q, k, v, extras, out]), 2 * rows * _size(k.shape[-2]) * widths)


def _lookup(tables: list[Tensor], sources: list[Tensor], spec: Lookup, outs: Any) -> Cost:
    """Every source once, a row for each id, the outputs; an addition for each element that is pooled or summed."""
    read: Any = 0
    flops: Any = 0
    for bag in spec.bags:
        elements = numel(sources[bag.loads[0]]) * spec.tables[bag.table].dim
        read += elements * tables[bag.table].element_size()
        flops += 0 if bag.pooling == "none" else elements
    for out, value in zip(spec.outputs, outs, strict=True):
        widths = sum(_width(part, tables, sources, spec) for part in out.parts)
        flops += {"concat": 0, "sum": 1, "sum_of_squares": 2}[out.kind] * widths * _size(value.shape[0])
    return Cost(read + moved(sources) + moved(outs), flops)


def _width(part: int, tables: list[Tensor], sources: list[Tensor], spec: Lookup) -> Any:
    """Of one part of an output: a bag, whose rows may lie side by side, or a source."""
    if part < 0:
        return math.prod(map(_size, sources[~part].shape[1:]))
    bag = spec.bags[part]
    length = math.prod(map(_size, sources[bag.loads[0]].shape[1:])) if bag.pooling == "none" else 1
    return length * _size(tables[bag.table].shape[-1])


def _vals(value: Any) -> Any:
    return fx.node.map_arg(value, lambda node: node.meta["val"])


def _gathered(packet: Any, inputs: list[Any], value: Any) -> Cost:
    """A row for each id: pooled rows are read one by one, too."""
    table, *ids = _tensors(inputs)
    out = next(iter(_tensors(value)))
    rows = numel(out)
    if packet is aten.embedding_bag:
        rows = numel(ids[0]) * _size(table.shape[-1])
    read = rows * table.element_size()
    return Cost(read + moved(ids) + moved(out), rows if packet is aten.embedding_bag else 0)


def _last(node: fx.Node) -> Any:
    return _size(node.meta["val"].shape[-1])


def _size(n: Any) -> Any:
    return expression(n) if isinstance(n, SYM) else n


def _tensors(value: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(value) if isinstance(x, Tensor))
