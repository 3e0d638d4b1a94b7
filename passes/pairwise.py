"""What a linear layer's concatenated input is made of: sums of tensors that were repeated over positions, or not.

    q = expand(unsqueeze(user, 1), [-1, N, -1])
    cat([q, k, q - k, 2 * q * k], 2)       parts    [u], [k], [u, -k], [2 * k by u]    with u = unsqueeze(user, 1)

*Positions* are the dims before the last of what the layer reads; [B * N, D] is read as [B, N, D] where a part of it
was repeated N times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, ops

from recompile.rewrite import Builder, Refuse, arguments, same
from recompile.torch_private.symbols import constant

aten = ops.aten
_COPIES = (aten.expand.default, aten.repeat.default, aten.tile.default, aten.repeat_interleave.self_int)
_SUMS = (aten.add.Tensor, aten.sub.Tensor)
_SCALES = (aten.mul.Tensor, aten.div.Tensor)


_DEPTH = 4  # how many sums within sums are looked into


@dataclass(frozen=True)
class Term:
    """`factor * value`, or `factor * scale * value * by` where several positions share each row of `by`."""

    value: fx.Node
    factor: float = 1.0
    by: fx.Node | None = None
    scale: float = 1.0
    product: fx.Node | None = None  # the node that is `scale * value * by`


@dataclass(frozen=True)
class Concatenation:
    """The `cat` that a layer reads, the sizes of its positions, and each part's width and terms."""

    cat: fx.Node
    positions: tuple[Any, ...]
    parts: tuple[tuple[int, tuple[Term, ...]], ...]


def read(x: fx.Node, builder: Builder) -> Concatenation | None:
    """What `x` is made of; None if it is no concatenation of features, or if nothing in it was repeated.

    Raises:
        Refuse: a width is not known, or something is written between the parts and the layer.
    """
    while x.target is aten.reshape.default and same(shape(x)[-1:], shape(x.args[0])[-1:]):
        x = x.args[0]  # type: ignore[assignment]
    given = arguments(x) if x.target is aten.cat.default else {}
    if not given or len(shape(x)) < 2 or given["dim"] != len(shape(x)) - 1:
        return None
    tensors = given["tensors"]
    reader = _Reader(builder, x, _unflattened(tensors) or tuple(shape(x)[:-1]))
    found = Concatenation(
        x, reader.positions, tuple((shape(part)[-1], reader.part(part)) for part in tensors)
    )
    terms = [term for _, part in found.parts for term in part]
    if not any(reader.is_shared(term.by or term.value) for term in terms):
        return None
    reader.check(tensors)
    return found


def shape(node: Any) -> list[Any]:
    """The sizes of a node's tensor: numbers where they are known."""
    sizes = node.meta["val"].shape if isinstance(node.meta.get("val"), Tensor) else ()
    return [size if isinstance(size, int) or (n := constant(size)) is None else n for size in sizes]


def count(size: Any) -> int:
    """A size; of a dynamic one, what it is as this graph is compiled, or 1. Adds no guard."""
    if isinstance(size, int):
        return size
    return int(size.node.hint) if size.node.has_hint() else 1


def shared_dims(node: fx.Node, positions: Sequence[Any]) -> list[Any]:
    """The sizes of the positions along which `node` is the same."""
    rows = [1] * (len(positions) + 1 - len(shape(node))) + shape(node)[:-1]
    return [size for size, own in zip(positions, rows, strict=True) if same(own, 1) and not same(size, 1)]


def copies(node: fx.Node, positions: Sequence[Any]) -> int:
    """How many positions share each row of `node`: 1 if it has a row for each of them."""
    return math.prod(map(count, shared_dims(node, positions)))


@dataclass(frozen=True)
class _Reader:
    builder: Builder
    cat: fx.Node
    positions: tuple[Any, ...]
    through: dict[fx.Node, None] = field(default_factory=dict)  # what was looked through
    bases: dict[fx.Node, fx.Node] = field(default_factory=dict)

    def is_shared(self, node: fx.Node) -> bool:
        """Whether several positions share each row of `node`."""
        return bool(shared_dims(node, self.positions))

    def part(self, node: fx.Node) -> tuple[Term, ...]:
        """A part as a sum of terms; as itself where that would bring in two tensors for one."""
        terms = tuple(self.terms(node))
        own = {self.base(x) for x in arguments(self.cat)["tensors"]}
        new = {term.value for term in terms if not self.is_shared(term.value)} - own
        return terms if len(new) < 2 else (Term(self.base(node)),)

    def terms(self, node: fx.Node, depth: int = _DEPTH) -> Iterator[Term]:
        """`node` as a sum of terms."""
        width, summands = shape(node)[-1], _summands(node)
        fits = bool(depth) and all(_fits(x, node) for x in node.all_input_nodes)
        if fits and summands:
            self.through[node] = None
            for x, factor in summands:
                found = self.terms(x, depth - 1)
                yield from (replace(term, factor=term.factor * factor) for term in found)
        elif fits and node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
            yield self._product(node, depth)
        elif self._is_flattened(node) and _is_reshape(node, [*self.positions, width]):
            yield from self.terms(node.args[0], depth)  # type: ignore[arg-type]
        else:
            yield Term(self.base(node))

    def _product(self, node: fx.Node, depth: int) -> Term:
        """A product of one value a position and one that is shared; any other is kept as it is."""
        whole, found = self.base(node), [list(self.terms(x, depth - 1)) for x in node.all_input_nodes]
        if any(len(terms) != 1 or terms[0].by is not None for terms in found):
            return Term(whole)
        value, by = sorted((terms[0] for terms in found), key=lambda term: self.is_shared(term.value))
        if self.is_shared(value.value) or not self.is_shared(by.value):
            return Term(whole)
        self.through[node] = None
        return Term(value.value, 1.0, by.value, value.factor * by.factor, whole)

    def base(self, node: fx.Node) -> fx.Node:
        """`node` before it was repeated: its rows fit the positions by broadcasting."""
        if node not in self.bases:
            source = _before_copies(node)
            self.bases[node] = self._row_by_row(node) if source is None else self.base(source)
            if self.bases[node] is not node:
                self.through[node] = None
        return self.bases[node]

    def _row_by_row(self, node: fx.Node) -> fx.Node:
        """The same for what was repeated along a dim that counts other things too."""
        width = shape(node)[-1]
        if self._is_flattened(node):
            if _is_reshape(node, [*self.positions, width]):
                return self.base(node.args[0])  # type: ignore[arg-type]
            rows = _repeated_rows(node)
            if rows is None or not same(shape(rows)[0], self.positions[0]):
                return self.builder.call(aten.reshape.default, node, [-1, *self.positions[1:], width])
        else:
            rows = _repeated_rows(node.args[0]) if node.target is aten.reshape.default else None
            if rows is None or not same(shape(node), [shape(rows)[0], shape(node)[1], shape(rows)[1]]):
                return node
        return self.builder.call(aten.unsqueeze.default, rows, 1)

    def _is_flattened(self, node: fx.Node) -> bool:
        """Whether its first dim counts all positions, which are several dims."""
        flat = shape(self.cat)[:-1]
        return len(flat) < len(self.positions) and same(shape(node)[:-1], flat)

    def check(self, tensors: Sequence[fx.Node]) -> None:
        """Raises Refuse if a width or a dtype does not fit, or something is written before the layer reads it."""
        layer = self.builder.after
        for x in tensors:
            if not isinstance(shape(x)[-1], int):
                raise Refuse(f"the width of {x.name} is dynamic", x)
            if x.meta["val"].dtype != layer.meta["val"].dtype:
                raise Refuse(f"the layer computes in another dtype than {x.name} has", x)
        for node in (self.cat, *self.through):
            wall = self.builder.effects.between(node, layer)
            if wall is not None:
                raise Refuse(f"{wall.name} stands between {node.name} and the layer", wall)


def _summands(node: fx.Node) -> list[tuple[fx.Node, float]]:
    """What `node` is the sum of, and how often; nothing if it is no sum."""
    args: Any = node.args
    if node.target is aten.neg.default:
        return [(args[0], -1.0)]
    if node.target in _SUMS and isinstance(args[1], fx.Node):
        alpha = arguments(node)["alpha"]
        return [(args[0], 1.0), (args[1], alpha if node.target is aten.add.Tensor else -alpha)]
    if node.target in _SCALES and isinstance(args[1], int | float) and args[1]:
        return [(args[0], float(args[1]) if node.target is aten.mul.Tensor else 1 / args[1])]
    return []


def _fits(x: fx.Node, node: fx.Node) -> bool:
    """Whether the operand `x` of `node` has its columns and its dtype."""
    sizes = shape(x)
    return (
        len(sizes) > 0 and same(sizes[-1], shape(node)[-1]) and x.meta["val"].dtype == node.meta["val"].dtype
    )


def _before_copies(node: fx.Node) -> fx.Node | None:
    """What `node` repeats along dims of size 1, and along new ones in front."""
    if node.target not in _COPIES:
        return None
    source: Any = node.args[0]
    old, new = shape(source), shape(node)
    pairs = list(zip(reversed(old), reversed(new), strict=False))
    kept = (
        len(old) <= len(new) and pairs and same(*pairs[0]) and all(same(a, b) or same(a, 1) for a, b in pairs)
    )
    return source if kept else None


def _repeated_rows(node: Any) -> fx.Node | None:
    """The [B, D] whose rows `node` repeats one by one: `repeat(x, [1, N])` or `repeat_interleave(x, N, 0)`."""
    if not isinstance(node, fx.Node) or node.target not in _COPIES[1:]:
        return None
    source: Any = node.args[0]
    given = arguments(node)
    if node.target is aten.repeat_interleave.self_int:
        found = given["dim"] == 0
    else:
        times: Any = given.get("repeats") or given.get("dims")
        found = all(n == 1 for n in times[:-1])
    return source if found and len(shape(source)) == 2 else None


def _is_reshape(node: fx.Node, old: Any) -> bool:
    return node.target is aten.reshape.default and same(shape(node.args[0]), list(old))


def _unflattened(tensors: Sequence[fx.Node]) -> tuple[Any, ...] | None:
    """(B, N), where one of these [B * N, D] was repeated N times for each of B rows."""
    if len(shape(tensors[0])) != 2:
        return None
    for node in [*tensors, *(inner for x in tensors for inner in x.all_input_nodes)]:
        if node.target is aten.repeat_interleave.self_int and _repeated_rows(node) is not None:
            times: Any = node.args[1]
            return shape(node.args[0])[0], times.meta["val"] if isinstance(times, fx.Node) else times
        source: Any = node.args[0] if node.target is aten.reshape.default else None
        if source is not None and _before_copies(source) is not None and len(shape(source)) == 3:
            return tuple(shape(source)[:-1])
    return None
