"""Attention, however it is written, becomes one region op that never holds the scores of all pairs.

    s = matmul(q, k.transpose(-2, -1)) / sqrt(d)
    p = softmax(masked_fill(s, ~tril, -1e9), -1)
    y = matmul(p, v)
->
    y, _ = recompile.attention(q, k, v, [], "Attention(score='where(j <= i, s/8, -1e9)', softmax=True, ...)")

The region grows from the second contraction backwards to the first (`attention_region.py`): everything between is one
expression of the score, positions, tables and loads. What only masks pairs is told apart (`score_masks.py`), so that
kernels skip them. q, k, v and the loads are taken from as far up as views and copies of them reach, with one dim
for each of samples, heads, queries and keys.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.nodes import adds_in_any_order
from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.attention import Attention
from recompile.lowering.attention.op import op_for
from recompile.lowering.score import S, is_table, table, tables_in
from recompile.rewrite import (
    Builder,
    Context,
    Effects,
    Pass,
    Refuse,
    register,
    replace,
    same,
)
from recompile.torch_private.symbols import SYM

from .attention_cone import cone, has_softmax, is_layer, products
from .attention_ends import Second, Turn, delivered, furthest, seconds, uncast
from .attention_products import Respelled, is_plain, plain, respelled_einsum
from .attention_region import Region, is_dead
from .attention_row_sums import RowSums, row_sums
from .attention_softmax import SHIFT, TOTAL, P, factor, leaves_no_nan, logarithm, unshifted
from .attention_sums import join_products, join_values, split_sum
from .axes import Axes, Split, arrange, atoms, layout, shape
from .computed import is_computed
from .contractions import contraction
from .library_attention import ENCODER, LIBRARY, by_library, spell_out, take_back
from .looked_up import padding, without_padding
from .score_masks import divided, masks

aten = torch.ops.aten
_LAYER = "the keys are the same for all samples: it is a layer, no attention"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@register
@dataclass(frozen=True)
class RewriteAttention(Pass):
    """Replaces attention by the region op (see the module)."""

    after = ("canonicalize", "common-subexpressions", "dead-code")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        ctx.rule(self.name())
        spelled = self._spelled_out(graph, ctx)
        candidates, tried = self._respelled(graph, ctx)
        regions = {node for second in candidates for node in (*cone(second.weights), *second.nodes())}
        as_eager = ctx.options.inductor_setting("fallback_random")
        # Anew for each: what was replaced meanwhile may have been its weights, or its product.
        for second in (second for stale in candidates for second in _candidates([stale.found.node])):
            ctx.tried(self.name())
            try:
                ctx.begin(self.name(), second.found.node)
                _rewrite(second, Effects(graph), self.name(), regions, bool(as_eager))
                ctx.fired(self.name())
            except Refuse as refusal:
                ctx.refuse(self.name(), refusal.why, refusal.at or second.found.node)
        for made in reversed(tried):
            made.settle()
        for call, build in spelled.items():
            take_back(call, build)

    def _respelled(self, graph: fx.Graph, ctx: Context) -> tuple[list[Second], list[Respelled]]:
        """The second contractions, and all contractions that are written plainer for the while."""
        effects = Effects(graph)
        einsums = list(graph.find_nodes(op="call_function", target=aten.einsum.default))
        tried = [
            made for node in einsums if (made := respelled_einsum(node, effects, self.name())) is not None
        ]
        candidates = list(_candidates(graph.nodes))
        for second in [*candidates]:
            if (parts := split_sum(second, effects, self.name())) is not None:
                candidates.remove(second)
                candidates += _candidates(parts)
        for second in [x for x in candidates if not is_plain(x)]:
            candidates.remove(second)
            try:
                tried.append(plain(second, effects, self.name()))
                candidates += _candidates(tried[-1].build.made)
            except Refuse as refusal:
                ctx.tried(self.name())
                ctx.refuse(self.name(), refusal.why, refusal.at or second.found.node)
        joined = join_values(candidates, effects, self.name())
        candidates = [x for x in candidates if not is_dead(x.found.node)]
        candidates += _candidates(node for made in joined for node in made.build.made)
        tried += joined
        for second in candidates:
            tried += join_products(second, Effects(graph), self.name())
        return candidates, tried

    def _spelled_out(self, graph: fx.Graph, ctx: Context) -> dict[fx.Node, Builder]:
        """The calls of the library's attention, and what stands in their place for the while."""
        spelled = {}
        calls = [graph.find_nodes(op="call_function", target=target) for target in (LIBRARY, ENCODER)]
        for node in (node for found in calls for node in found):
            try:
                spelled[node] = spell_out(node, Effects(graph), self.name())
            except Refuse as refusal:
                ctx.tried(self.name())
                ctx.refuse(self.name(), refusal.why, node)
        return spelled


def _candidates(nodes: Iterable[fx.Node]) -> Iterator[Second]:
    for node in nodes:
        found = contraction(node) if node.users and not node._erased else None
        ways = seconds(found) if found is not None else ()
        chosen = next((way for way in ways if _may_be(way)), None)
        if chosen is not None:
            yield chosen


def _may_be(second: Second) -> bool:
    nodes = cone(second.weights)
    return bool(products(nodes)) and (has_softmax(nodes) or not is_layer(second.found))


def _rewrite(second: Second, effects: Effects, rule: str, regions: set[fx.Node], as_eager: bool) -> None:
    """Replaces the attention that ends in `second`.

    Raises:
        Refuse: it is none, or must be left alone.
    """
    sums: RowSums | None = None
    while True:
        try:
            return _Attempt(second, effects, rule, regions, as_eager, sums).replace()
        except Split as split:
            second.split(split.atom, split.sizes)
        except Turn as turn:
            second.turn(turn.atom)
        except Refuse:
            if sums is not None or (sums := row_sums(second)) is None:
                raise
            second = dataclasses.replace(second, weights=sums.weights)


class _Attempt:
    """One reading of an attention, with the batch axes known so far."""

    def __init__(
        self,
        second: Second,
        effects: Effects,
        rule: str,
        regions: set[fx.Node],
        as_eager: bool,
        sums: RowSums | None,
    ) -> None:
        self.second, self.effects, self.rule, self.sums = second, effects, rule, sums
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
            raise Refuse("the row's maximum is not just subtracted from the scores", self.root)
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
        for node, wall in self._walls(self.root):
            raise Refuse(f"{wall.name} stands between {node.name} and {self.root.name}", node)

    def _walls(self, place: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
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

    def replace(self) -> None:
        """Puts the op in."""
        target, axes = delivered(self.root, self.second.axes[2])
        if any(self._walls(target)):
            target, axes = self.root, self.second.axes[2]
        lies = layout(target.meta["val"]) or tuple(range(len(axes)))
        axes = tuple(axes[k] for k in lies)
        op = op_for(self.root.meta["val"].device.type)
        if op is None:
            raise Refuse(f"there is no kernel for {self.root.meta['val'].device.type}", self.root)
        build = Builder(self.effects, target, self.rule, target)
        batch = self.second.batch
        spec, loads = self._spec([*batch, "i", "e"], axes)
        dtype = self.root.meta["val"].dtype
        wanted = ([*batch, "i", "d"], [*batch, "j", "d"], [*batch, "j", "e"])
        try:
            given = [
                self._laid_out(*operand, atoms, dtype, build)
                for operand, atoms in zip((self.q, self.k, self.v), wanted, strict=True)
            ]
            if self.loaded:
                sizes = [self.second.sizes[x] if x in self.loaded else -1 for x in wanted[0]]
                given[0] = build.call(aten.expand.default, given[0], sizes)
            if self.sums is not None:
                given[2] = self.sums.with_ones(given[2], build)
            extras = [self._extra(name, *place, build) for name, place in loads.items()]
            how = by_library(spec, self.root.meta["val"].device.type, len(batch) + 2)
            if how is not None:
                out = build.call(LIBRARY, *given, None, 0.0, **how)
            else:
                out = build.call(operator.getitem, build.call(op, *given, extras, str(spec)), 0)
            out = self._divided(out, build)
            if self.sums is not None:
                out = self.sums.divide(out, build)
            if spec.order:
                out = build.call(aten.permute.default, out, list(spec.order))
            if not same(shape(out), [shape(target)[k] for k in lies]):
                out = build.call(aten.reshape.default, out, self._shape(axes))
            if lies != tuple(sorted(lies)):
                out = build.call(aten.permute.default, out, [lies.index(k) for k in range(len(lies))])
            replace((target,), out, build)
        finally:
            build.discard()
        erase(target)
        for node in sorted(self.region.covered, reverse=True):
            erase(node)
            if node.target is aten.dropout.default and not node.users:
                node.graph.erase_node(node)  # `erase` leaves what draws numbers

    def _shape(self, axes: Axes) -> list[Any]:
        """The sizes of these axes, -1 for one that is merged of several unknown ones."""
        sizes = [[self.second.sizes[atom] for atom in axis] for axis in axes]
        known = [math.prod(s) if len(s) < 2 or all(type(x) is int for x in s) else None for s in sizes]
        if known.count(None) > 1:
            raise Refuse("several dims of unknown size are merged in the result", self.root)
        return [-1 if size is None else size for size in known]

    def _divided(self, out: fx.Node, build: Builder) -> fx.Node:
        atoms, dtype = [*self.second.batch, "i", "1"], out.meta["val"].dtype
        for node, axes in self.divisors:
            by = self._loaded(node, axes, atoms, self.second.sizes, build)
            out = build.call(aten.div.Tensor, out, by)
        return out if out.meta["val"].dtype is dtype else build.call(aten.to.dtype, out, dtype)

    def _laid_out(self, node: fx.Node, axes: Axes, atoms: list[str], dtype: Any, build: Builder) -> fx.Node:
        if node.meta["val"].dtype is not dtype:
            node = build.call(aten.to.dtype, node, dtype)
        return arrange(node, axes, atoms, self.second.sizes, build)

    def _extra(self, name: str, node: fx.Node, axes: Axes, build: Builder) -> fx.Node:
        atoms = [*self.second.batch, *("t" if name[0] == "T" else "ij")]
        sizes = self.second.sizes
        if name[0] == "T":
            node = node if padding(node) is None else without_padding(node, build)
            sizes = {**sizes, "t": shape(node)[axes.index(("t",))]}
        return self._loaded(node, axes, atoms, sizes, build)

    def _loaded(
        self, node: fx.Node, axes: Axes, atoms: list[str], sizes: dict[str, Any], build: Builder
    ) -> fx.Node:
        value, device = node.meta["val"], self.root.meta["val"].device
        if node.target is aten.dropout.default:
            seeds = [sizes[atom] if (atom,) in axes else 1 for atom in atoms]
            return build.call(aten.randint.low, 0, 2**31, seeds, device=device)
        if isinstance(value, SYM):
            # A product: Inductor makes a tensor of a float in it, and a new graph for each float elsewhere.
            dtype = torch.float32 if isinstance(value, torch.SymFloat) else torch.int64
            one = build.call(aten.full.default, [1] * len(atoms), 1, dtype=dtype, device=device)
            return build.call(aten.mul.Tensor, one, node)
        return arrange(node, axes, atoms, sizes, build)

    def _spec(self, atoms: list[str], axes: Axes) -> tuple[Attention, dict[str, tuple[fx.Node, Axes]]]:
        masked = masks(self.score, self.softmax)
        exprs = [self.score, masked.kept, masked.keep, self.weight]
        used = {s.name for e in exprs for s in e.free_symbols} | {
            type(t).__name__ for e in exprs for t in tables_in(e)
        }
        loads = {name: place for name, place in self.region.loads.items() if name in used}
        names = {old: f"{old[0]}{k}" for k, old in enumerate(loads)}
        score, kept, keep, weight = (_renamed(e, names) for e in exprs)
        flat = [atom for axis in axes for atom in axis]
        flat += [atom for atom in atoms if atom not in flat]  # of size 1
        order = tuple(atoms.index(atom) for atom in flat)
        spec = Attention(
            score=scalar.text(score),
            softmax=self.softmax,
            extras=tuple(names.values()),
            keep=scalar.text(keep),
            kept="" if kept == score else scalar.text(kept),
            negligible=masked.negligible,
            safe=self.safe,
            weight="" if weight == 1 else scalar.text(weight),
            order=() if order == tuple(range(len(atoms))) else order,
        )
        return spec, {names[old]: place for old, place in loads.items()}


def _renamed(expr: sympy.Basic, names: dict[str, str]) -> sympy.Basic:
    symbols = {scalar.symbol(old): scalar.symbol(new) for old, new in names.items()}
    expr = expr.xreplace(symbols)
    return expr.replace(is_table, lambda t: table(names[type(t).__name__])(*t.args))


def _is_real(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _is_many(size: Any) -> bool:
    return isinstance(size, SYM) or size > 1
