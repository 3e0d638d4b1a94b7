"""Reads one attention: its score as an expression, its operands, and whether it may be replaced.

The region (`attention_region.py`) is what lies between the two contractions. Of the first come queries and keys, of the
second the values, each taken from as far up as views and copies reach. All refusals that need the whole are here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import adds_in_any_order
from recompile.lowering.score import S
from recompile.rewrite import Effects, Refuse
from recompile.torch_private.symbols import SYM

from .attention_cone import has_softmax
from .attention_ends import Second, Turn, furthest, uncast
from .attention_region import Region
from .attention_row_sums import RowSums, row_sums
from .attention_softmax import SHIFT, TOTAL, P, factor, leaves_no_nan, logarithm, unshifted
from .axes import Axes, atoms, shape
from .computed import is_computed
from .contractions import contraction
from .score_masks import divided

_LAYER = "the keys are the same for all samples: it is a layer, no attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Reading:
    """One attention, with the batch axes known so far.

    Raises:
        Refuse: it is none, or must be left alone.
        Split: an axis stands for several; read again with these.
        Turn: the queries have another axis than assumed; read again with it.
    """

    def __init__(
        self,
        second: Second,
        effects: Effects,
        regions: set[fx.Node],
        as_eager: bool,
        sums: RowSums | None,
    ) -> None:
        self.second, self.effects, self.sums = second, effects, sums
        self.region = Region(second.weights, second.sizes, regions, as_eager)
        if len(self.region.products) > 1:
            raise Refuse("the attention weights are made of two products", self.region.products[0])
        self.root = second.found.node
        if self._is_layer():
            raise Refuse(_LAYER, self.root)
        weight = self.region.element(second.weights, second.axes[0])
        if sums is None:
            self.root, weight = self._normalized_later(weight)
        else:
            self.root = sums.root
            self.region.covered.update(dict.fromkeys((*sums.nodes(), second.found.node)))
        self.softmax = self.region.softmax is not None
        self.score = unshifted(self.region.softmax, self.root) if self.softmax else weight
        if SHIFT in self.score.free_symbols:
            changed = "the weights' sum is changed before it divides, and the row's maximum tells by how much"
            why = "the row's maximum is not just subtracted from the scores"
            raise Refuse(why if sums is None else changed, self.root)
        if TOTAL in (weight + self.score).free_symbols:
            raise Refuse("logsumexp between the scores and the values is not supported", self.root)
        self.weight = factor(weight, self.root) if self.softmax else sympy.Integer(1)
        self.safe = self.region.safe or leaves_no_nan(self.score, self.region.filled, self.root)
        self.divisors: list[tuple[fx.Node, Axes]] = []
        if not self.softmax:
            self._divide_later()
        self.q, self.k, self.v = self._operands()
        # The axes of the scores that only loads or positions have: q is repeated along them.
        own = {*atoms(self.q[1]), *atoms(self.k[1])}
        self.loaded = {x for _, axes in self.region.loads.values() for x in atoms(axes)}.difference(
            own, "ijt"
        )
        if "i" not in own and _is_many(self.second.sizes.get("i", 1)):
            self.loaded.add("i")
        self._check()

    def _is_layer(self) -> bool:
        """Whether keys and values are parameters, as in a perceptron with weights for each token."""
        found = [c for c in map(contraction, self.region.products) if c is not None and c.common()]
        keys = any(is_computed(c.left) != is_computed(c.right) for c in found)
        return keys and not is_computed(self.second.values) and not has_softmax(self.region.cone)

    def _normalized_later(self, weight: sympy.Basic) -> tuple[fx.Node, sympy.Basic]:
        """`(e @ v) / e.sum(-1, keepdim=True)`: the softmax' division stands after the second contraction."""
        sums = row_sums(self.second) if self.region.softmax is None else None
        if sums is None or sums.root is self.root or not sums.is_plain():
            return self.root, weight
        self.region.covered.update(dict.fromkeys((*sums.nodes(), self.root)))
        self.region.softmax = logarithm(weight, sums.root)
        return sums.root, P

    def _divide_later(self) -> None:
        """Takes divisors that are the same for all keys of a row out of the score: the output is divided."""
        rest, below = divided(self.score)
        places = [self.region.loads[load.name] for load in below]
        if below and not any(("j",) in axes for _, axes in places):
            self.score, self.divisors = rest, places

    def _operands(self) -> tuple[tuple[fx.Node, Axes], ...]:
        """q, k and v, as far up as they are views or copies."""
        product, axes = self.region.product, self.region.product_axes
        if product is None:
            raise Refuse("the attention weights are made of no product of queries and keys", self.root)
        of = dict(zip(product.letters[2], axes, strict=True)) | {product.summed: ("d",)}
        nodes = zip((product.left, product.right), product.letters, strict=False)
        sides = [(node, tuple(of.get(x, ()) for x in letters)) for node, letters in nodes]
        self.second.sizes["d"] = shape(sides[0][0])[sides[0][1].index(("d",))]
        keys = [("j",) in furthest(*side, "d")[1] for side in sides]  # one may be repeated for each key
        if keys.count(True) != 1:
            raise Refuse("the scores are no product of a query and a key", product.node)
        q, k = sides[::-1] if keys[0] else sides
        k, v = furthest(*k, "jd"), furthest(self.second.values, self.second.axes[1], "je")
        own = [x for x in atoms(furthest(*q, "d")[1]) if x not in (*atoms(k[1]), *atoms(v[1]), "d")]
        if ("i",) in k[1] and not own:
            raise Refuse("each pair of a query and a key has features of its own", product.node)
        if own and (("i",) in k[1] or self.second.is_longer(self.second.longest(own))):
            raise Turn(self.second.longest(own))
        dtype = self.root.meta["val"].dtype
        q, k = uncast(*furthest(*q, "id"), "id", dtype), uncast(*k, "jd", dtype)
        if ("j",) in q[1] or "i" in (*atoms(k[1]), *atoms(v[1])):
            raise Refuse("the scores are no product of a query and a key", product.node)
        return q, k, v

    def _check(self) -> None:
        """Raises Refuse where the region must be left as it is."""
        region = self.region
        for node in (*(n for n in region.covered if n in region.path), self.root):
            if self.effects.is_written(node):
                raise Refuse("the scores are written in place", node)
        last = {*self.second.nodes(), self.root}
        for node, user in region.outside(last):
            who = "returned to the caller" if user.op == "output" else f"read by {user.name}"
            raise Refuse(f"scores are also {who}", node)
        assert region.product is not None
        dtype = self.root.meta["val"].dtype
        exact = all(node.meta["val"].dtype is dtype for node, _ in (self.q, self.k))
        dtypes = {dtype, dtype if exact else region.product.node.meta["val"].dtype}
        if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
            raise Refuse(f"the contractions are of {', '.join(sorted(map(str, dtypes)))}", self.root)
        shared = not any(axis and axis[0][0] == "b" for axis in self.k[1]) and not is_computed(self.k[0])
        if shared and not (self.softmax and ("i",) in self.q[1]):
            raise Refuse(_LAYER, self.root)
        if {*atoms(self.v[1])}.difference(atoms(self.q[1]), atoms(self.k[1]), self.loaded, "je"):
            raise Refuse(
                "the attention weights are the same for all samples, or heads: they are computed once",
                self.root,
            )
        if not self.softmax and sympy.diff(self.score, S).is_number:
            raise Refuse("the scores are used as they are: it is a chain of products", self.root)
        if not _is_many(self.second.sizes["j"]):
            raise Refuse("there is one key at most", self.root)
        for name, (node, _) in region.loads.items():
            if name[0] in "xT" and (why := adds_in_any_order(node)):
                raise Refuse(why, node)
        for node, wall in self.walls(self.root):
            raise Refuse(f"{wall.name} stands between {node.name} and {self.root.name}", node)

    def walls(self, place: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What keeps the region from being computed at `place`: a node, and the wall or write behind it.

        What is read there must not be written before. What is computed there must be so in the grad mode that it was
        in, unless gradients have no way through it, as through a mask.
        """
        if (wall := self.effects.between(self.root, place)) is not None:
            yield self.root, wall
        free: set[fx.Node] = set()
        for node in sorted(self.region.covered):
            if not _is_real(node) or not any(n not in free and _is_real(n) for n in node.all_input_nodes):
                free.add(node)
        loads = (node for node, _ in self.region.loads.values())
        for node in (*self.region.covered, self.q[0], self.k[0], self.v[0], *loads):
            if node not in self.effects.order:
                continue
            computed = node in self.region.covered and node not in free
            wall = (self.effects.between if computed else self.effects.overwritten)(node, place)
            if wall is not None:
                yield node, wall


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_many(size: Any) -> bool:
    return isinstance(size, SYM) or size > 1
