"""Reads what stands between two contractions off the graph, as one expression of the score language.

    scores = einsum("bnhd,bmhd->bhnm", q, k) + table[j - i + N - 1]         silu(s + T0(j - i + N - 1)) / N
    p = silu(scores) / N * tril(ones(N, N))                       becomes   where j <= i, else 0

From the weights P of the second contraction it walks back to the first, whose element is `s`. What else is read on
the way is computed for each pair, or loaded (`attention_elements.py`).
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
from recompile.lowering.score import S, uniform, where
from recompile.rewrite import Refuse, arguments, is_pure
from recompile.rewrite.schema import op_name

from . import score_ops
from .attention_cone import LOG_SOFTMAX, SOFTMAX, VIEWS, cone, is_filled, is_known, path, products
from .attention_elements import Elements, aligned
from .attention_softmax import IS_NAN, SHIFT, TOTAL, P, emptied, is_multiple, logarithm, row_sum, without_nan
from .axes import Axes, shape
from .contractions import Contraction, contraction

aten = torch.ops.aten
_ROW_MAX = (aten.amax.default, aten.max.dim)
_CHOOSING = (aten.where, aten.masked_fill, aten.tril, aten.triu)


class Region(Elements):
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
        self.cone = cone(weights)
        self.products = products(self.cone)
        super().__init__(weights, path(self.cone, self.products), sizes, regions)
        self.as_eager = as_eager
        self.product: Contraction | None = None
        self.product_axes: Axes = ()
        self.softmax: sympy.Basic | None = None  # the score under it
        self.safe = False  # a row without keys is 0 in it
        self.filled: list[sympy.Basic] = []  # where a 0 takes the place of its result
        self.total: sympy.Basic | None = None  # the score under a logsumexp

    def outside(self, last: set[fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
        """The scores that something beyond the region reads, and what reads them."""
        for node in self.covered:
            for user in node.users if node in self.path else ():
                if user not in last and not self._is_within(user):
                    yield node, user

    def _is_within(self, user: fx.Node) -> bool:
        """Whether nobody else reads the scores through `user`: a constant made of them reads their shape only."""
        if user in self.covered or is_filled(user) or is_dead(user):
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
            raise Refuse("the attention weights are made of two products", found.node)
        if ("j",) not in axes:
            raise Refuse("the product has no dim of keys of its own", found.node)
        self.product, self.product_axes = found, axes
        self.covered.update(dict.fromkeys(found.inner))
        expr = S * score_ops.number(found.scale) / self.size(found.terms)
        if found.added is None:
            return expr
        return expr + score_ops.number(found.beta) * self.element(found.added, aligned(found.added, axes))

    def _softmax(self, node: fx.Node, dim: int, axes: Axes) -> sympy.Basic:
        if axes[dim] == ("i",):
            raise Refuse("softmax runs over the query axis", node)
        if axes[dim] != ("j",):
            raise Refuse(f"softmax runs over dim {dim}, not over the keys", node)
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
            if axes[dim := arguments(node)["dim"]] != ("j",):
                raise Refuse(f"softmax runs over dim {dim}, not over the keys", node)
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


def is_dead(node: fx.Node) -> bool:
    """Whether nobody reads `node`: it stands for something that is tried, see `attention_products.py`."""
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        if node.op != "call_function" or not is_pure(node):
            return False
        new = [user for user in node.users if user not in seen]
        seen.update(new)
        left += new
    return True


def _without(axes: Axes) -> Axes:
    return tuple(() if axis == ("j",) else axis for axis in axes)
