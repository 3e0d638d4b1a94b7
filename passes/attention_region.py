"""Reads what stands between two contractions off the graph, as one expression of the score language.

    scores = einsum("bnhd,bmhd->bhnm", q, k) + table[j - i + N - 1]         silu(s + T0(j - i + N - 1)) / N
    p = silu(scores) / N * tril(ones(N, N))                       becomes   where j <= i, else 0

From the weights P of the second contraction it walks back to the first, whose element is `s`. What else is read on
the way is computed for each pair, or loaded: see `Region._bias`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.lowering import scalar
from recompile.lowering.score import S, atleast, atmost, kind, tables_in, trunc, uniform, where
from recompile.lowering.score import table as table_of
from recompile.rewrite import Refuse, arguments, is_pure, same
from recompile.rewrite.schema import op_name
from recompile.torch_private.symbols import SYM, expression

from . import score_ops
from .attention_cone import (
    CASTS,
    CONSTANTS,
    FILLED,
    LOG_SOFTMAX,
    SOFTMAX,
    VIEWS,
    cone,
    is_filled,
    is_known,
    path,
    products,
)
from .attention_softmax import IS_NAN, SHIFT, TOTAL, P, emptied, is_multiple, logarithm, row_sum, without_nan
from .axes import Axes, before_view, shape
from .contractions import Contraction, contraction

aten = torch.ops.aten
_ROW_MAX = (aten.amax.default, aten.max.dim)
_CHOOSING = (aten.where, aten.masked_fill, aten.tril, aten.triu)
_EXACT = frozenset("ijMN")


class Region:
    """One attempt at the region between `weights`, the first operand of the second contraction, and the first one.

    Args:
        weights: P.
        sizes: of the axes, by atom.
        regions: all nodes of which only this region and others like it are made.
        as_eager: whether dropout must draw the numbers that eager draws.
    """

    def __init__(
        self, weights: fx.Node, sizes: dict[str, Any], regions: set[fx.Node], as_eager: bool
    ) -> None:
        self.weights, self.sizes, self.regions, self.as_eager = weights, sizes, regions, as_eager
        self.cone = cone(weights)
        self.products = products(self.cone)
        self.path = path(self.cone, self.products)
        self.product: Contraction | None = None
        self.product_axes: Axes = ()
        self.softmax: sympy.Basic | None = None  # the score under it
        self.safe = False  # a row without keys is 0 in it
        self.filled: list[sympy.Basic] = []  # where a 0 takes the place of its result
        self.total: sympy.Basic | None = None  # the score under a logsumexp
        # Of a dropout its seeds, of a number that is not known a tensor of it.
        self.loads: dict[str, tuple[fx.Node, Axes]] = {}
        self.covered: dict[fx.Node, None] = {}
        self._known: dict[tuple[fx.Node, Axes], sympy.Basic] = {}

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

    def outside(self, last: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The scores that something beyond the region reads, and what reads them."""
        for node in self.covered:
            for user in node.users if node in self.path else ():
                if user not in last and not self._is_within(user):
                    yield node, user

    def _is_within(self, user: fx.Node) -> bool:
        """Whether nobody else reads the scores through `user`: a constant made of them reads their shape only."""
        if user in self.covered or is_filled(user):
            return True
        viewed = getattr(user.target, "overloadpacket", None) in VIEWS
        return viewed and all(self._is_within(n) for n in user.users)

    def _scored(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of a node that depends on the first contraction."""
        self.covered[node] = None
        found = contraction(node)
        if found is not None:
            return self._product(found, axes)
        if node.target in SOFTMAX:
            self.safe = node.target is aten._safe_softmax.default
            return self._softmax(node, arguments(node)["dim"], axes)
        if node.target is aten.dropout.default:
            return self._dropout(node, axes)
        for special in (self._row_max, self._by_hand, self._logarithmic, self._nan):
            if (found_one := special(node, axes)) is not None:
                return found_one
        expr = self._computed(node, axes)
        if expr is None:
            raise self._unsupported(node)
        if not isinstance(node.target, OpOverload) or node.target.overloadpacket not in _CHOOSING:
            return expr
        if (softened := without_nan(expr)) is not None:
            self.safe = True
            return softened
        if (zero := emptied(expr)) is not None:
            self.filled.append(zero)
        return expr

    def _unsupported(self, node: fx.Node) -> Refuse:
        """A refusal of `node`, or of the operator above it that nothing is known of."""
        between = sorted(n for n in self.path if n not in self.products)
        node = next((n for n in between if not is_known(n)), node)
        node = node.args[0] if node.target is operator.getitem else node  # type: ignore[assignment]
        return Refuse(f"{op_name(node.target)} between the scores and the values is not supported", node)

    def _product(self, found: Contraction, axes: Axes) -> sympy.Basic:
        if self.product is not None and (self.product.node, self.product_axes) != (found.node, axes):
            raise Refuse("the weights are made of two products", found.node)
        if ("j",) not in axes:
            raise Refuse("the product has no dim of keys of its own", found.node)
        self.product, self.product_axes = found, axes
        self.covered.update(dict.fromkeys(found.inner))
        expr = S * score_ops.number(found.scale)
        if found.added is None:
            return expr
        return expr + score_ops.number(found.beta) * self.element(found.added, aligned(found.added, axes))

    def _softmax(self, node: fx.Node, dim: int, axes: Axes) -> sympy.Basic:
        if axes[dim] == ("i",):
            raise Refuse("softmax runs over the query axis", node)
        if axes[dim] != ("j",):
            raise Refuse("softmax does not run over the keys", node)
        return self._normalized(node, self.element(node.args[0], axes))  # type: ignore[arg-type]

    def _normalized(self, node: fx.Node, score: sympy.Basic) -> sympy.Basic:
        if self.softmax not in (None, score) or P in score.free_symbols:
            raise Refuse("two softmaxes stand one after the other", node)
        self.softmax = score
        return P

    def _row_max(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """The row's maximum, which a softmax by hand subtracts: it drops out, also one that takes no gradient."""
        if node.target is aten.detach.default:
            return SHIFT if self.element(node.args[0], axes) == SHIFT else None  # type: ignore[arg-type]
        if node.target is operator.getitem and node.args[1] == 0 and node.args[0].target is aten.max.dim:  # type: ignore[union-attr]
            self.covered[node.args[0]] = None  # type: ignore[index]
            node = node.args[0]  # type: ignore[assignment]
        if node.target not in _ROW_MAX:
            return None
        self._over_keys(node, axes)
        return SHIFT

    def _logarithmic(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`logsumexp(score)`, `log_softmax(score)`, and their exponential, a softmax."""
        if node.target is aten.logsumexp.default:
            return self._totalled(node, self._over_keys(node, axes), TOTAL)
        if node.target in LOG_SOFTMAX:
            score = self.element(node.args[0], axes)  # type: ignore[arg-type]
            if axes[arguments(node)["dim"]] != ("j",):
                raise Refuse("softmax does not run over the keys", node)
            return self._totalled(node, score, score - TOTAL)
        if node.target is not aten.exp.default:
            return None
        score = self.element(node.args[0], axes)  # type: ignore[arg-type]
        if self.total is None or sympy.expand(score - self.total + TOTAL) != 0:
            return None
        return self._normalized(node, self.total)

    def _totalled(self, node: fx.Node, score: sympy.Basic, expr: sympy.Basic) -> sympy.Basic:
        if self.total not in (None, score):
            raise Refuse("two softmaxes stand one after the other", node)
        self.total = score
        return expr

    def _nan(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`isnan(p)`, `p != p`, `nan_to_num(p)` of a softmax' result, which is NaN in rows without keys."""
        given, same_twice = node.args[0], node.target is aten.ne.Tensor and node.args[0] is node.args[1]
        if node.target not in (aten.isnan.default, aten.nan_to_num.default) and not same_twice:
            return None
        expr = self.element(given, axes)  # type: ignore[arg-type]
        if not is_multiple(expr) or (arguments(node).get("nan") or 0) != 0:
            raise self._unsupported(node)
        if node.target is not aten.nan_to_num.default:
            return IS_NAN
        self.safe = True
        return expr

    def _dropout(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """Dropout: a random number for each pair, from a seed for each of the batch axes."""
        given = arguments(node)
        if self.as_eager:
            raise Refuse("dropout has to draw eager's numbers: Inductor's fallback_random is set", node)
        if not isinstance(given["p"], (int, float)):
            raise Refuse("how much dropout leaves out is known at run time only", node)
        if given["p"] >= 1:
            raise Refuse("dropout leaves nothing", node)
        seed = self._name("n", node, tuple((atom,) for axis in axes for atom in axis if atom[0] == "b"))
        i, j = (scalar.symbol(x) if (x,) in axes else sympy.Integer(0) for x in "ij")
        kept = uniform(scalar.symbol(seed), i, j) >= score_ops.number(given["p"])
        x = score_ops.real(self.element(given["input"], axes))
        return where(kept, x * sympy.Float(1 / (1 - given["p"])), sympy.Integer(0))

    def _over_keys(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """Checks that `node` reduces the keys of P's rows; the element of what it reduces."""
        given = arguments(node)
        dims = given["dim"] if isinstance(given["dim"], (list, tuple)) else [given["dim"]]
        rank = len(shape(given["self"]))
        if len(dims) != 1 or len(axes) != (rank if given["keepdim"] else rank - 1) or ("j",) in axes:
            raise Refuse(f"{node.name} is not over the keys", node)
        inner, dim = list(axes), dims[0] % rank
        if given["keepdim"]:
            del inner[dim]
        inner.insert(dim, ("j",))
        return self.element(given["self"], tuple(inner))

    def _by_hand(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`e / e.sum(-1, keepdim=True)` with e = exp(score): a softmax."""
        if node.target is not aten.div.Tensor or not isinstance(node.args[1], fx.Node):
            return None
        upper, lower = node.args
        if (total := row_sum(lower, upper)) is None:
            return None
        self.covered.update(dict.fromkeys(total))
        self._over_keys(total[-1], _without(aligned(lower, axes)))  # type: ignore[arg-type]
        return self._normalized(node, logarithm(self.element(upper, axes), node))  # type: ignore[arg-type]

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
        view = before_view(node, axes)
        if view is not None:
            return self.element(*view)
        return score_ops.apply(node, lambda x: self._operand(x, axes))

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
        return score_ops.product(inside, self.element(node.args[0], axes))  # type: ignore[arg-type]

    def _bias(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of a node that does not depend on the first contraction.

        Computed for each pair where that needs positions only, or is a mask, or where the node has a value for each
        pair that nobody else reads; else loaded.
        """
        axes = tuple(() if same(size, 1) else axis for axis, size in zip(axes, shape(node), strict=True))
        view = before_view(node, axes)
        if view is not None:
            self.covered[node] = None
            return self.element(*view)
        try:
            expr = self._inlined(node, axes)
        except Refuse:  # it is loaded as it is
            expr = None
        if expr is None or not self._is_worth(node, axes, expr):
            return self._load(node, axes)
        if not is_filled(node) or any(n in self.path for n in node.all_input_nodes):
            self.covered[node] = None
        return expr

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
        if packet is aten.index or packet is aten.embedding:
            return self._table(node, axes)
        return self._computed(node, axes)

    def _table(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`table[index]` and `embedding(table, index)`: rows of a table, one for each pair."""
        given = arguments(node)
        if node.target is aten.embedding.default:
            table, index = given["weight"], given["indices"]
            if given["padding_idx"] >= 0 or given["sparse"]:
                return None
        else:
            table, indices = given["self"], given["indices"]
            index = indices[0] if len(indices) == 1 else None
        if not isinstance(index, fx.Node) or index.meta["val"].dtype is torch.bool:
            return None
        if not table.meta["val"].is_floating_point():
            return None
        rank = len(shape(index))
        columns = axes[rank:]
        if {"i", "j"} & {atom for axis in columns for atom in axis}:
            return None
        place = self.element(index, axes[:rank])
        rows = shape(table)[0]
        if kind(place) != "integer":
            return None
        if node.target is aten.index.Tensor and not self._is_positive(place):
            if not isinstance(rows, int):
                return None
            place = where(place < 0, place + rows, place)  # as Python's indices, from the end
        return table_of(self._name("T", table, (("t",), *columns)))(place)

    def _is_positive(self, index: sympy.Basic) -> bool:
        """Whether an index is known not to be below 0."""
        if isinstance(index, sympy.Max):
            return any(self._is_positive(part) for part in index.args)
        if isinstance(index, (sympy.Min, where, atmost)):
            return all(self._is_positive(part) for part in index.args[-2:])
        if isinstance(index, atleast):
            return bool(index.args[1].is_nonnegative)
        if isinstance(index, trunc):
            return self._is_positive(index.args[0])
        if index.is_number:
            return bool(index.is_nonnegative)
        i, j = scalar.symbol("i"), scalar.symbol("j")
        if not index.free_symbols <= {i, j, scalar.symbol("N"), scalar.symbol("M")}:
            return False
        rows, keys = (self.size(self.sizes.get(atom, 1)) for atom in "ij")
        least = sympy.Symbol("least", nonnegative=True)
        corners = [index.subs({i: a, j: b}) for a in (0, rows - 1) for b in (0, keys - 1)]
        return all(c.subs(scalar.symbol("N"), least + 1).is_nonnegative for c in corners) and all(
            sympy.diff(index, x).is_number for x in (i, j)
        )

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


def _position(axis: tuple[str, ...]) -> sympy.Basic | None:
    return scalar.symbol(axis[0]) if axis in (("i",), ("j",)) else sympy.Integer(0) if axis == () else None


def _without(axes: Axes) -> Axes:
    return tuple(() if axis == ("j",) else axis for axis in axes)
