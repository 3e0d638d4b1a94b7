"""Reads the element of a node at a pair of a query and a key off the graph, as an expression of the score language.

It is computed for each pair where that is cheaper than loading it, or loaded: see `Elements._bias`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.lowering import scalar
from recompile.lowering.score import kind, tables_in, where
from recompile.lowering.score import table as table_of
from recompile.rewrite import Refuse, arguments, is_pure, same
from recompile.torch_private.symbols import SYM, expression

from . import score_ops
from .attention_cone import CASTS, CONSTANTS, FILLED, is_filled
from .axes import Axes, Split, before_view, shape
from .contractions import Contraction, contraction
from .index_bounds import is_nonnegative
from .looked_up import LOOKUPS, looked_up, padding
from .moved import moved

aten = torch.ops.aten
_EXACT = frozenset("ijMN")
_MANY_EDGES = 16  # of buckets: each is a comparison for every pair


class Elements(ABC):
    """Elements of the nodes of one region, and what is loaded for them.

    Args:
        weights: the weights of the second contraction, which the region ends in.
        path: the nodes that depend on the first contraction; a subclass reads them.
        sizes: of the axes, by atom.
        regions: all nodes of which only this region and others like it are made.
    """

    def __init__(
        self, weights: fx.Node, path: set[fx.Node], sizes: dict[str, Any], regions: set[fx.Node]
    ) -> None:
        self.weights, self.path, self.sizes, self.regions = weights, path, sizes, regions
        # Of a dropout its seeds, of a number that is not known a tensor of it, of an embedding with padding its table.
        self.loads: dict[str, tuple[fx.Node, Axes]] = {}
        self.covered: dict[fx.Node, None] = {}
        self._known: dict[tuple[fx.Node, Axes], sympy.Basic] = {}

    @abstractmethod
    def _scored(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of a node of `path`."""

    def element(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of `node` at a pair of a query and a key.

        Raises:
            Refuse: it cannot be expressed.
            Split: see `before_view`.
        """
        if (node, axes) not in self._known:
            read = self._scored if node in self.path else self._bias
            self._known[node, axes] = read(node, axes)
        return self._known[node, axes]

    def _computed(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`node` as an expression of its operands' elements; None if it is not elementwise, nor a view."""
        if not isinstance(node.target, OpOverload):
            return None
        packet = node.target.overloadpacket
        if packet in CASTS:
            return score_ops.cast(self.element(node.args[0], axes), node.meta["val"].dtype)  # type: ignore[arg-type]
        if packet in (aten.tril, aten.triu):
            return self._triangle(node, axes)
        if packet in (aten.select_scatter, aten.slice_scatter):
            return self._scattered(node, axes)
        view = self._view(node, axes)
        if view is not None:
            return self.element(*view)
        if (found := contraction(node)) is not None and found.is_elementwise():
            return self._outer(found, axes)
        return score_ops.apply(node, lambda x: self._operand(x, axes))

    def _view(self, node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
        """As `before_view`; None also for what repeats or joins the rows or keys of a smaller bias: it is loaded."""
        try:
            return before_view(node, axes)
        except Split as split:
            if node in self.path or split.atom not in ("i", "j"):
                raise
            return None

    def _outer(self, found: Contraction, axes: Axes) -> sympy.Basic | None:
        """The product of a column and a row, as a mask of queries times one of keys."""
        if found.added is not None or found.scale != 1:
            return None
        of = dict(zip(found.letters[2], axes, strict=True)) | {"": ()}
        sides = zip((found.left, found.right), found.letters, strict=False)
        left, right = (self.element(node, tuple(of.get(x, ()) for x in letters)) for node, letters in sides)
        return score_ops.product(left, right)

    def _scattered(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`x[:, 3:] = y`: y where a position is, x elsewhere; None where y has a value for each such position."""
        given = arguments(node)
        dim, src = given["dim"], given["src"]
        position, size = _position(axes[dim]), self.size(shape(node)[dim])
        if position is None:
            return None

        def place(name: str, default: sympy.Basic) -> sympy.Basic:
            at = default if given[name] is None else self.size(given[name])
            return at + size if at.is_negative else at

        if "index" in given:
            inside, rest = sympy.Eq(position, place("index", size)), axes[:dim] + axes[dim + 1 :]
        else:
            while src.target is aten.expand.default:
                src = src.args[0]
            rest = axes
            along = aligned(src, tuple(("j",) if k == dim else () for k in range(len(axes))))
            if given["step"] != 1 or ("j",) in along:
                return None
            inside = sympy.And(position >= place("start", sympy.Integer(0)), position < place("end", size))
        chosen, other = self.element(src, aligned(src, rest)), self.element(given["self"], axes)
        return score_ops.choose(inside, chosen, other)

    def _triangle(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        rows, columns = (_position(axis) for axis in axes[-2:])
        if rows is None or columns is None:
            return None
        apart = columns - rows - score_ops.number(arguments(node)["diagonal"])
        inside = apart <= 0 if node.target is aten.tril.default else apart >= 0
        given = self.element(node.args[0], axes)  # type: ignore[arg-type]
        return score_ops.choose(sympy.Not(inside), sympy.Integer(0), given)  # no product: 0 * -inf is NaN

    def _bias(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of a node that does not depend on the first contraction.

        Computed for each pair where that needs positions only, or is a mask, or where the node has a value for each
        pair that nobody else reads; else loaded.
        """
        axes = tuple(() if same(size, 1) else axis for axis, size in zip(axes, shape(node), strict=True))
        view = self._view(node, axes)
        if view is not None:
            self.covered[node] = None
            return self.element(*view)
        if self._is_wider(node):
            raise Refuse(f"{node.name} is of float64, and the scores are not", node)
        try:
            expr = self._inlined(node, axes)
        except Refuse:  # it is loaded as it is
            expr = None
        if expr is None or scalar.is_long(expr) or not self._is_worth(node, axes, expr):
            return self._load(node, axes)
        if not is_filled(node) or any(n in self.path for n in node.all_input_nodes):
            self.covered[node] = None
        return expr

    def _is_wider(self, node: fx.Node) -> bool:
        """Whether kernels would round `node` to compute with it, as times whose differences matter."""
        dtype = node.meta["val"].dtype
        return dtype is torch.float64 and dtype is not self.weights.meta["val"].dtype and len(shape(node)) > 0

    def _is_worth(self, node: fx.Node, axes: Axes, expr: sympy.Basic) -> bool:
        held = {atom for axis in axes for atom in axis}
        if {s.name for s in expr.free_symbols} <= _EXACT and not tables_in(expr):
            return True
        if not {"i", "j"} <= held:
            chosen = isinstance(expr, where) and all(part.is_number for part in expr.args[1:])
            mask = chosen or scalar.is_truth(expr)
            return mask and len(expr.free_symbols) <= 3 and not tables_in(expr)
        return all(user in self.regions for user in node.users) or scalar.is_truth(expr)

    def _inlined(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or not is_pure(node):
            return None
        packet = node.target.overloadpacket
        if packet in CONSTANTS:
            truth = node.meta["val"].dtype is torch.bool
            return sympy.true if truth and CONSTANTS[packet] else score_ops.number(CONSTANTS[packet])
        if packet in FILLED:
            fill = next((x for x in node.args[::-1] if isinstance(x, (int, float))), None)
            return None if fill is None else score_ops.number(fill)
        if packet is aten.arange:
            return _counted(node, axes)
        if packet is aten.eye:
            return _diagonal(node, axes)
        if packet in LOOKUPS:
            return self._table(node, axes)
        if packet is aten.bucketize:
            return self._bucket(node, axes)
        found = self._moved(node, axes)
        return self._computed(node, axes) if found is None else found

    def _moved(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """A table's elements, moved to where they are wanted: one look-up for each pair."""
        if not {("i",), ("j",)} <= {*axes} or not node.meta["val"].is_floating_point():
            return None
        if (found := moved(node, axes)) is None:
            return None
        self.covered.update(dict.fromkeys(found.steps))
        return table_of(self._name("T", found.table, found.axes))(found.position)

    def _table(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`table[:, index]` and `embedding(table, index)`: what a table has in one dim, one for each pair."""
        if (found := looked_up(node)) is None:
            return None
        table, dim, index = found
        if padding(table) is not None:  # one with a padding stands for its own table below
            return None
        if index.meta["val"].dtype in (torch.bool, torch.uint8) or not table.meta["val"].is_floating_point():
            return None
        end = dim + len(shape(index))
        before, after = axes[:dim], axes[end:]
        if {"i", "j"} & {atom for axis in before + after for atom in axis}:
            return None
        place, size = self.element(index, axes[dim:end]), shape(table)[dim]
        if kind(place) != "integer":
            return None
        if node.target is aten.index.Tensor and not is_nonnegative(place, *self._counts()):
            if not isinstance(size, int):
                return None
            place = where(place < 0, place + size, place)  # as Python's indices, from the end
        held = table if padding(node) is None else node
        return table_of(self._name("T", held, (*before, ("t",), *after)))(place)

    def _bucket(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`bucketize(x, edges)`: how many edges x is beyond, if they are few; all for NaN."""
        given = arguments(node)
        x, edges = given["self"], given["boundaries"]
        (count,) = shape(edges)
        if not isinstance(x, fx.Node) or not isinstance(count, int) or count > _MANY_EDGES:
            return None
        if edges.target is torch.tensor and edges.args:
            bounds = [score_ops.number(edge) for edge in edges.args[0]]
        elif edges.meta["val"].is_floating_point():
            table = table_of(self._name("T", edges, (("t",),)))
            bounds = [table(k) for k in range(count)]
        else:
            return None
        value = score_ops.real(self.element(x, axes))
        before = [value < edge if given["right"] else value <= edge for edge in bounds]
        return sympy.Add(*[where(part, sympy.Integer(0), sympy.Integer(1)) for part in before])

    def _counts(self) -> tuple[sympy.Basic, sympy.Basic]:
        """The numbers of queries and of keys."""
        queries, keys = (self.size(self.sizes.get(atom, 1)) for atom in "ij")
        return queries, keys

    def size(self, value: Any) -> sympy.Basic:
        """A size as an expression in M and N.

        Raises:
            Refuse: it is neither a number nor made of the numbers of queries and keys.
        """
        if not isinstance(value, SYM):
            return score_ops.number(value)
        expr = expression(value)
        for name, atom in (("N", "j"), ("M", "i")):
            if isinstance(self.sizes.get(atom), SYM):
                expr = expr.subs(expression(self.sizes[atom]), scalar.symbol(name))
        if not expr.free_symbols <= {scalar.symbol("M"), scalar.symbol("N")} or isinstance(
            value, torch.SymFloat
        ):
            raise Refuse(f"the scores depend on the size {expr}", self.weights)
        return expr

    def _operand(self, x: fx.Node, axes: Axes) -> sympy.Basic:
        value = x.meta.get("val")
        if isinstance(value, torch.Tensor):
            return self.element(x, aligned(x, axes))
        try:
            return self.size(value)
        except Refuse:  # it is loaded
            letter = "x" if isinstance(value, torch.SymFloat) else "n"
            return scalar.symbol(self._name(letter, x, ()))

    def _load(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        value = node.meta["val"]
        if value.is_complex():
            raise Refuse("complex scores are not supported", node)
        name = self._name("x" if value.is_floating_point() else "n", node, axes)
        expr = scalar.symbol(name)
        return sympy.Ne(expr, 0) if value.dtype is torch.bool else expr

    def _name(self, letter: str, node: fx.Node, axes: Axes) -> str:
        for name, place in self.loads.items():
            if place == (node, axes):
                return name
        name = f"{letter}{len(self.loads)}"
        self.loads[name] = node, axes
        return name


def aligned(x: fx.Node, axes: Axes) -> Axes:
    """The axes of an operand that is broadcast to `axes`."""
    sizes = shape(x)
    return tuple(
        () if same(size, 1) else axis
        for axis, size in zip(axes[len(axes) - len(sizes) :], sizes, strict=True)
    )


def _counted(node: fx.Node, axes: Axes) -> sympy.Basic | None:
    given = arguments(node)
    start, step, position = given.get("start", 0), given.get("step", 1), _position(axes[0])
    if position is None or type(start) is not int or type(step) is not int:
        return None
    return start + step * position


def _diagonal(node: fx.Node, axes: Axes) -> sympy.Basic | None:
    """`eye`: whether a row is a column."""
    row, column = (_position(axis) for axis in axes)
    if row is None or column is None:
        return None
    same_place = sympy.Eq(row, column)
    return same_place if node.meta["val"].dtype is torch.bool else score_ops.real(same_place)


def _position(axis: tuple[str, ...]) -> sympy.Basic | None:
    return scalar.symbol(axis[0]) if axis in (("i",), ("j",)) else sympy.Integer(0) if axis == () else None
