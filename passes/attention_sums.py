"""Sums around the contractions of an attention: of two scores, of two products that are one score, of two results."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from recompile.graph.order import erase
from recompile.rewrite import Builder, Effects, Refuse, replace, same

from .attention_cone import cone, products
from .attention_ends import Second
from .attention_products import Respelled, product
from .axes import Axes, arrange, atoms, shape
from .contractions import Contraction, contraction

aten = torch.ops.aten
_Term = tuple[Contraction, Any]  # a product and its factor
_Side = tuple[fx.Node, Axes]
_SUMS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}


def split_sum(second: Second, effects: Effects, rule: str) -> list[fx.Node] | None:
    """`(a - b) @ v` becomes `a @ v - b @ v`, where a and b are scores of their own; the two products."""
    weights, root = second.weights, second.found.node
    if weights.target not in _SUMS or len(weights.users) > 1 or second.found.added is not None:
        return None
    sides = weights.args[:2]
    if not all(isinstance(x, fx.Node) and same(shape(x), shape(weights)) for x in sides):
        return None
    first, other = (set(products(cone(x))) for x in sides)  # type: ignore[arg-type]
    if not first or not other or first & other or second.found.inner:
        return None
    places = [x for x in torch.utils._pytree.tree_leaves((root.args, root.kwargs)) if x is weights]
    if len(places) > 1:
        return None  # they are the values, too
    build = Builder(effects, root, rule)

    def multiplied(x: fx.Node) -> fx.Node:
        args = fx.node.map_arg(root.args, lambda n: x if n is weights else n)
        return build.call(root.target, *args, **root.kwargs)

    parts = [multiplied(x) for x in sides]  # type: ignore[arg-type]
    replace((root,), build.call(weights.target, *parts, **weights.kwargs), build)
    erase(root)
    return parts


def join_values(seconds: list[Second], effects: Effects, rule: str) -> list[Respelled]:
    """Makes `p (v + r)` of each `p v + p r`, which read the same weights p twice."""
    by_node, made = {second.found.node: second for second in seconds}, list[Respelled]()
    for node in sorted({user for one in by_node for user in one.users}):
        both = [by_node[x] for x in node.args if isinstance(x, fx.Node) and x in by_node]
        if node.target is not aten.add.Tensor or node.kwargs or len(both) < 2:
            continue
        one, two = both
        alike = one.weights is two.weights and (one.axes[0], one.axes[2]) == (two.axes[0], two.axes[2])
        lone = all(list(x.found.node.users) == [node] for x in (one, two))
        if one is two or not alike or not lone or not same(*(shape(x.found.node) for x in (one, two))):
            continue
        build = Builder(effects, node, rule)
        out, weights = (atoms(one.axes[k]) for k in (2, 0))
        held = {*atoms(one.axes[1]), *atoms(two.axes[1])}
        wanted = [x for x in (*one.batch, "j", "e") if x in held]
        try:
            values = [arrange(x.values, x.axes[1], wanted, x.sizes, build) for x in (one, two)]
            sides = [
                (arrange(one.weights, one.axes[0], weights, one.sizes, build), weights),
                (build.call(aten.add.Tensor, *values), wanted),
            ]
            new = product(sides, [x for x in out if x in (*weights, *wanted)], build)
            if not same(shape(new), shape(node)):
                new = build.call(aten.reshape.default, new, list(shape(node)))
            replace((node,), new, build)
        except Refuse:
            build.discard()
            continue
        made.append(Respelled(node, build))
    return made


def join_products(second: Second, effects: Effects, rule: str) -> list[Respelled]:
    """Makes one product of each sum of two, with constant factors, that the weights are computed from.

    `a q k^T + b r t^T` is `[a q, b r] [k, t]^T`.
    """
    nodes = cone(second.weights)
    found, made = set(products(nodes)), list[Respelled]()
    for node in sorted(nodes) if len(found) > 1 else ():
        terms = _terms(node, found)
        sides = terms and _sides(terms[0][0], terms[1][0])
        if not terms or not sides:
            continue
        build = Builder(effects, node, rule)
        try:
            new = _product(terms, sides, build)
            replace((node,), new, build)
        except Refuse:
            build.discard()
            continue
        found.add(new)
        made.append(Respelled(node, build))
    return made


def _terms(node: fx.Node, of: set[fx.Node]) -> list[_Term] | None:
    """The two products, if `node` is a sum of those and nobody else reads them."""
    if node.target not in _SUMS or node.kwargs or node.args[0] is node.args[1]:
        return None
    found = [_term(x, node) for x in node.args if isinstance(x, fx.Node) and same(shape(x), shape(node))]
    terms = [term for term in found if term is not None and term[0].node in of]
    if len(terms) < 2:
        return None
    return [terms[0], (terms[1][0], terms[1][1] * _SUMS[node.target])]


def _term(node: Any, reader: fx.Node) -> _Term | None:
    factor: Any = 1
    while isinstance(node, fx.Node) and list(node.users) == [reader]:
        if (found := contraction(node)) is not None:
            plain = found.added is None and type(found.terms) is int
            return (found, factor * found.scale / found.terms) if plain else None
        scaled = node.target in (aten.mul.Tensor, aten.div.Tensor)
        if not scaled or type(node.args[1]) not in (int, float):
            return None
        factor = factor * node.args[1] if node.target is aten.mul.Tensor else factor / node.args[1]
        node, reader = node.args[0], node
    return None


def _sides(one: Contraction, two: Contraction) -> list[list[_Side]] | None:
    """The left and the right sides of both, with the letters of `one` for axes; None if they do not go together."""
    out = one.letters[2]
    if "" in (*out, *two.letters[2]) or one.node.meta["val"].dtype is not two.node.meta["val"].dtype:
        return None
    names = dict(zip(two.letters[2], out, strict=True)) | {two.summed: one.summed}
    left, right = _named(one, {x: x for x in (*out, one.summed)})
    apart = [set(out).difference(atoms(axes)) for _, axes in (left, right)]
    for other in (_named(two, names), _named(two, names)[::-1]):
        sides = [[left, other[0]], [right, other[1]]]
        both = [set(out).difference(*(atoms(axes) for _, axes in side)) for side in sides]
        if [*map(bool, both)] == [*map(bool, apart)]:  # there are queries that no key has, and keys
            return sides
    return None


def _named(found: Contraction, names: dict[str, str]) -> list[_Side]:
    sides = zip((found.left, found.right), found.letters, strict=False)
    return [(node, tuple((names[x],) if x else () for x in letters)) for node, letters in sides]


def _product(terms: list[_Term], sides: list[list[_Side]], build: Builder) -> fx.Node:
    """The one product, of features that lie side by side; the factors go to the left ones."""
    one = terms[0][0]
    out, summed = one.letters[2], one.summed
    known = dict(zip(out, shape(one.node), strict=True))
    made, letters = [], []
    for side, factors in zip(sides, ([factor for _, factor in terms], (1, 1)), strict=True):
        wanted = [x for x in out if any((x,) in axes for _, axes in side)] + [summed]
        parts = []
        for (node, axes), factor in zip(side, factors, strict=True):
            sizes = known | {summed: shape(node)[axes.index((summed,))]}
            part = arrange(node, axes, wanted, sizes, build)
            part = build.call(aten.expand.default, part, [sizes[x] for x in wanted])
            parts.append(part if factor == 1 else build.call(aten.mul.Tensor, part, factor))
        made.append(build.call(aten.cat.default, parts, -1))
        letters.append(wanted)
    return product(list(zip(made, letters, strict=True)), out, build)
