"""A linear layer over a concatenation of repeated tensors is split over its parts, each computed once a row.

    cat([q, k, q - k, q * k], 2) @ W.T + b        k [B, N, D], q [B, 1, D] repeated N times, W = [Wq Wk Wd Wp]
->
    bmm(k, (Wk - Wd + q * Wp).T)                  weights [B, H, D], one matrix a sample
        + q @ (Wq + Wd).T + b                     [B, 1, H], once a sample

which is equal since (q * k) @ Wp.T = k @ (q * Wp).T: the first layer of an attention unit (DIN, Zhou et al. 2018,
section 4.3) needs 2 B N D H operations instead of 8, and nothing of the size [B, N, 4 D]. The same splits a layer
that scores many candidates of one user, whose part is computed once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, ops

from recompile.graph.order import erase
from recompile.rewrite import Builder, Context, Effects, Pass, Refuse, arguments, register, replace, same

from .pairwise import Concatenation, copies, count, read, shape

aten = ops.aten
# A core of an AMD EPYC (AVX2) does some 50 G operations, or moves some 3 G floats, a second.
MOVE = 16.0  # operations that take as long as writing or reading one float
LEAST = 1e6  # operations that must be saved: some 20 us, about what the added kernels' calls cost
PAYS = 0.9  # of its old cost is the most that the layer may still cost

Slices = list[tuple[float, int, int]]  # factor, and which columns of the layer's weight


@register
@dataclass(frozen=True)
class FoldPairwiseLinear(Pass):
    """Splits linear layers over repeated parts (see the module).

    `min_rows`: a product becomes weights where this many positions share one of its factors; with fewer, it is
    computed and multiplied with the layer's weights, since products of matrices with few rows are slow. A unit that
    scores 25600 rows of 64 by 80 columns, least ms on one core of an AMD EPYC (AVX2), as weights / as a product /
    not split: forward, 24 rows a sample 18 / 17 / 32, 32: 15 / 17 / 32, 48: 17 / 23 / 38, 100: 15 / 25 / 42;
    with backward, 24: 160 / 101 / 161, 32: 125 / 96 / 128, 48: 94 / 95 / 128, 100: 75 / 90 / 120.
    """

    min_rows: int = 48
    after = ("canonicalize", "common-subexpressions", "dead-code")
    before = ("fuse-lookups", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        effects = Effects(graph)
        for node in list(graph.nodes):
            layer = None if node._erased or not node.users else _layer(node)
            if layer is None:
                continue
            builder = Builder(effects, node, self.name())
            try:
                found = read(layer.x, builder)
                if found is not None:
                    ctx.tried(self.name())
                    ctx.begin(self.name(), node)
                    replace((node,), self._fold(layer, found, builder), builder)
                    ctx.fired(self.name())
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or node)
            builder.discard()
            erase(node)

    def _fold(self, layer: Layer, found: Concatenation, builder: Builder) -> fx.Node:
        _check_dtypes(layer)
        split = _split(found, self.min_rows)
        _check_pays(layer, found, split)
        return _Writer(layer, found, builder).write(split)


@dataclass(frozen=True)
class Layer:
    """`node = x @ weight.T + bias`, or with the weight transposed."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    transposed: bool = True


def _layer(node: fx.Node) -> Layer | None:
    args: Any = node.args
    if node.target is aten.linear.default:
        return Layer(node, args[0], args[1], arguments(node)["bias"], False)
    if node.target in (aten.matmul.default, aten.mm.default):
        return Layer(node, *args) if len(shape(args[1])) == 2 else None
    given = arguments(node) if node.target in (aten.addmm.default, aten.tensordot.default) else {}
    plain = given.get("alpha") == given.get("beta") == 1
    if node.target is aten.addmm.default and plain and len(shape(args[0])) == 1:
        return Layer(node, args[1], args[2], args[0])
    if node.target is aten.tensordot.default and len(shape(args[1])) == 2:
        last = len(shape(args[0])) - 1
        return Layer(node, *args[:2]) if [given["dims_self"], given["dims_other"]] == [[last], [0]] else None
    return None


@dataclass
class Split:
    """The terms of all parts by what they multiply: tensors alone, and values by what they are multiplied with."""

    alone: dict[fx.Node, Slices]
    products: dict[fx.Node, dict[fx.Node, Slices]]

    def groups(self) -> list[list[fx.Node]]:
        """Those alone, together where they have the same rows."""
        found: dict[str, list[fx.Node]] = {}
        for node in self.alone:
            if node not in self.products:
                found.setdefault(str(tuple(shape(node)[:-1])), []).append(node)
        return list(found.values())


def _split(found: Concatenation, min_rows: int) -> Split:
    split, start = Split({}, {}), 0
    for width, terms in found.parts:
        for term in terms:
            rows = 0 if term.by is None else _rows(term.by, found.positions)
            by, scale = (term.by, term.scale) if rows >= min_rows else (None, 1.0)
            value = term.value if by is not None or term.product is None else term.product
            into = split.alone if by is None else split.products.setdefault(value, {})
            into.setdefault(by or value, []).append((term.factor * scale, start, start + width))
        start += width
    return split


def _rows(by: fx.Node, positions: Sequence[Any]) -> int:
    """How many positions share each row of `by`; 0 if they are not all those of a sample, or all there are."""
    sizes = [1] * (len(positions) + 1 - len(shape(by))) + shape(by)[:-1]
    once_a_sample = all(same(size, 1) for size in sizes[1:])
    return copies(by, positions) if once_a_sample else 0


def _check_dtypes(layer: Layer) -> None:
    dtype = layer.node.meta["val"].dtype
    if not dtype.is_floating_point:
        raise Refuse("the layer does not compute in floating point", layer.node)
    for x in (layer.weight, layer.bias):
        if x is not None and x.meta["val"].dtype != dtype:
            raise Refuse(f"the layer computes in another dtype than {x.name} has", x)


def _check_pays(layer: Layer, found: Concatenation, split: Split) -> None:
    """Compares operations and moved floats for each position.

    Raises:
        Refuse: the split layer costs nearly as much, or all of it next to nothing.
    """
    width, out = shape(found.cat)[-1], shape(layer.node)[-1]
    if not isinstance(out, int):
        raise Refuse("the number of the layer's columns is dynamic", layer.node)
    is_built = len(found.cat.users) > 1
    old = 2 * width * out + (0 if is_built else 2 * width * MOVE)
    new = 0.0
    for group in split.groups():
        columns = sum(shape(x)[-1] for x in group)
        moved = out + (2 * columns if len(group) > 1 else 0)
        new += (2 * columns * out + moved * MOVE) / copies(group[0], found.positions)
    for value, by in split.products.items():
        matrix = shape(value)[-1] * out
        new += 2 * matrix + out * MOVE + sum(2 * matrix * MOVE / copies(x, found.positions) for x in by)
    if new > PAYS * old:
        raise Refuse(
            f"split over its parts, the layer would cost {new / old:.0%} of what it costs now", layer.node
        )
    positions = math.prod(map(count, found.positions))
    if positions * (old - new) < LEAST:
        raise Refuse("the layer is too small to gain from being split over its parts", layer.node)


class _Writer:
    def __init__(self, layer: Layer, found: Concatenation, builder: Builder) -> None:
        self.layer, self.found, self.call = layer, found, builder.call
        self.bias = layer.bias
        self.weight = layer.weight
        if layer.transposed:
            permuted = self.weight.target is aten.permute.default and arguments(self.weight)["dims"] == [1, 0]
            flipped: Any = (
                self.weight.args[0] if permuted else self.call(aten.permute.default, self.weight, [1, 0])
            )
            self.weight = flipped

    def write(self, split: Split) -> fx.Node:
        """The layer as a sum, in the layer's shape. What has the fewest rows is given the bias."""
        groups = sorted(split.groups(), key=lambda group: -copies(group[0], self.found.positions))
        sums = [self._together(split, group) for group in groups]
        sums += [self._product(split, value) for value in split.products]
        total, *others = [*reversed(sums), *([] if self.bias is None else [self.bias])]
        for other in others:
            total = self.call(aten.add.Tensor, total, other)
        sizes, wanted = [*self.found.positions, shape(self.layer.node)[-1]], shape(self.layer.node)
        if not same(shape(total), sizes):
            total = self.call(aten.expand.default, total, sizes)
        return total if same(sizes, wanted) else self.call(aten.reshape.default, total, [-1, *wanted[1:]])

    def _together(self, split: Split, group: list[fx.Node]) -> fx.Node:
        """One layer for tensors with the same rows."""
        joined: list[Slices] = []
        for slices in (split.alone[node] for node in group):
            if joined and len(joined[-1]) == len(slices) == 1 and _meet(joined[-1][0], slices[0]):
                joined[-1] = [(slices[0][0], joined[-1][0][1], slices[0][2])]
            else:
                joined.append(slices)
        return self._linear(self._cat(group), self._cat([self._sum(slices) for slices in joined]))

    def _product(self, split: Split, value: fx.Node) -> fx.Node:
        """`value` times the weights: those of what multiplies it are one matrix for all, or one a sample."""
        weight = self._sum(split.alone[value]) if value in split.alone else None
        for by, slices in split.products[value].items():
            scaled = self.call(aten.mul.Tensor, self._row(by), self._sum(slices))
            weight = scaled if weight is None else self.call(aten.add.Tensor, weight, scaled)
        assert weight is not None
        if len(shape(weight)) == 2:
            return self._linear(value, weight)
        sizes = shape(value)
        rows = value if len(sizes) == 3 else self.call(aten.reshape.default, value, [sizes[0], -1, sizes[-1]])
        out = self.call(aten.bmm.default, rows, self.call(aten.permute.default, weight, [0, 2, 1]))
        if len(sizes) == 3:
            return out
        return self.call(aten.reshape.default, out, [*self.found.positions, shape(out)[-1]])

    def _row(self, by: fx.Node) -> fx.Node:
        """`by` as [B, 1, D], or [D] if there is one for all."""
        sizes = shape(by)
        if all(same(size, 1) for size in sizes[:-1]):
            return by if len(sizes) == 1 else self.call(aten.reshape.default, by, [sizes[-1]])
        return by if len(sizes) == 3 else self.call(aten.reshape.default, by, [sizes[0], 1, sizes[-1]])

    def _linear(self, x: fx.Node, weight: fx.Node) -> fx.Node:
        bias, self.bias = self.bias, None
        return self.call(aten.linear.default, x, weight, *([] if bias is None else [bias]))

    def _cat(self, nodes: list[fx.Node]) -> fx.Node:
        return nodes[0] if len(nodes) == 1 else self.call(aten.cat.default, nodes, len(shape(nodes[0])) - 1)

    def _sum(self, slices: Slices) -> fx.Node:
        """The columns of the weight that belong to one tensor, added up."""
        total: fx.Node | None = None
        for factor, start, stop in sorted(slices, key=lambda part: -part[0]):
            columns = self.call(aten.slice.Tensor, self.weight, 1, start, stop)
            if total is None:
                total = columns if factor == 1 else self.call(aten.mul.Tensor, columns, factor)
            else:
                target = aten.sub.Tensor if factor < 0 else aten.add.Tensor
                alpha = {} if abs(factor) == 1 else {"alpha": abs(factor)}
                total = self.call(target, total, columns, **alpha)
        assert total is not None
        return total


def _meet(a: tuple[float, int, int], b: tuple[float, int, int]) -> bool:
    return a[0] == b[0] and a[2] == b[1]
