"""Contractions written plainer for the while, so that attention is found: what has not become one is taken back.

einsum("bnd,de,bme->bnm", q, w, k)         two products, as torch computes it
einsum("bnhd,bmhd->bnm", q, k)             one of features that are merged
einsum("bnm,bmhd->bnhd", p, v)             one of values whose heads are merged
baddbmm(x, p, v), (p * v).mean(2)          einsum(p, v) + x, einsum(p, v) / N
"""

from __future__ import annotations

import math
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from recompile.graph.order import erase
from recompile.rewrite import Builder, Effects, Refuse, arguments, replace, same

from .attention_ends import Second
from .axes import arrange, atoms, shape
from .contractions import einsum_letters

aten = torch.ops.aten
_Side = tuple[fx.Node, Sequence[str]]  # a tensor and a name for each of its dims


@dataclass(frozen=True)
class Respelled:
    """`old` stands without users until it is known whether what `build` has made for it becomes attention."""

    old: fx.Node
    build: Builder

    def settle(self) -> None:
        """Keeps what was made if a part of it is gone, else `old`; the last one made comes first."""
        made = self.build.made
        if not any(node._erased for node in made):
            made[-1].replace_all_uses_with(self.old)
            self.build.discard()
        erase(self.old)


def product(sides: Sequence[_Side], out: Sequence[str], build: Builder) -> fx.Node:
    """The einsum of two tensors whose dims have names."""
    names = dict.fromkeys([*sides[0][1], *sides[1][1]])
    short = dict(zip(names, string.ascii_letters, strict=False))
    left, right, result = ("".join(short[x] for x in term) for term in (sides[0][1], sides[1][1], out))
    return build.call(aten.einsum.default, f"{left},{right}->{result}", [node for node, _ in sides])


def respelled_einsum(node: fx.Node, effects: Effects, rule: str) -> Respelled | None:
    """An einsum as products of two tensors over one dim each; None if it is one, or none is made of it."""
    letters = einsum_letters(node)
    if letters is None or len(letters) < 3:
        return None
    *terms, out = letters
    if len(terms) == 2 and len(_summed(terms, out)) < 2:
        return None
    sides: list[_Side] = list(zip(arguments(node)["tensors"], terms, strict=True))
    sizes: dict[str, Any] = {}
    for x, size in ((x, size) for side in sides for x, size in zip(side[1], shape(side[0]), strict=True)):
        if not same(sizes.setdefault(x, size), size):
            return None
    path = arguments(node)["path"] or [0, 1] * (len(sides) - 1)
    build = Builder(effects, node, rule)
    try:
        for pair in zip(path[::2], path[1::2], strict=True):
            both = [sides[k] for k in pair]
            rest = [side for k, side in enumerate(sides) if k not in pair]
            read = {*out}.union(*(names for _, names in rest))
            kept = [x for x in dict.fromkeys(x for _, names in both for x in names) if x in read]
            kept = kept if rest else list(out)
            sides = [*rest, (_over_one(both, kept, sizes, build), kept)]
        replace((node,), sides[0][0], build)
    except Refuse:
        build.discard()
        return None
    return Respelled(node, build)


def _summed(names: Sequence[Sequence[str]], out: Sequence[str]) -> list[str]:
    return [x for x in names[0] if x in names[1] and x not in out]


def _over_one(sides: list[_Side], out: Sequence[str], sizes: dict[str, Any], build: Builder) -> fx.Node:
    """The product of two tensors; several dims that are summed become one."""
    summed = _summed([names for _, names in sides], out)
    if len(summed) > 1:
        sides = [_merged(*side, summed, sizes, build) for side in sides]
    return product(sides, out, build)


def _merged(
    node: fx.Node, names: Sequence[str], last: list[str], sizes: dict[str, Any], build: Builder
) -> _Side:
    """The tensor with some of its dims as one, the last, which has the last one's name."""
    kept = [x for x in names if x not in last]
    node = arrange(node, tuple((x,) for x in names), [*kept, *last], sizes, build)
    merged = [sizes[x] for x in last]
    size = math.prod(merged) if all(type(x) is int for x in merged) else -1
    node = build.call(aten.reshape.default, node, [*(sizes[x] for x in kept), size])
    return node, [*kept, last[-1]]


def is_plain(second: Second) -> bool:
    """Whether a second contraction is weights times a matrix of values for each batch index, and nothing else."""
    found = second.found
    return found.added is None and found.scale == 1 and same(found.terms, 1) and not _extra(second)


def _extra(second: Second) -> list[str]:
    """The heads that only the values have. The outermost dim is of samples, for which weights are computed once."""
    weights, _, out = second.axes
    return [x for x in atoms(out)[1:] if x in second.batch and x not in atoms(weights)]


def plain(second: Second, effects: Effects, rule: str) -> Respelled:
    """Makes a second contraction plain.

    Raises:
        Refuse: its result would lie otherwise.
    """
    found, (weights, values, out), sizes = second.found, second.axes, second.sizes
    root, extra = found.node, _extra(second)
    build = Builder(effects, root, rule)
    try:
        p: _Side = (arrange(second.weights, weights, atoms(weights), sizes, build), atoms(weights))
        v: _Side = (arrange(second.values, values, atoms(values), sizes, build), atoms(values))
        order = [x for x in atoms(out) if x in (*p[1], *v[1])]
        if extra:
            v = _merged(*v, [*extra, "e"], sizes, build)
        new = product([p, v], [x for x in order if x not in extra], build)
        if extra:
            parts = [y for x in order if x not in extra for y in ([*extra, "e"] if x == "e" else [x])]
            new = build.call(aten.reshape.default, new, [sizes[x] for x in parts])
            new = arrange(new, tuple((x,) for x in parts), order, sizes, build)
        if not same(shape(new), shape(root)):
            new = build.call(aten.reshape.default, new, list(shape(root)))
        if found.scale != 1:
            new = build.call(aten.mul.Tensor, new, found.scale)
        if not same(found.terms, 1):
            new = build.call(aten.div.Tensor, new, found.terms)
        if found.added is not None and found.beta != 0:
            new = build.call(aten.add.Tensor, new, found.added, alpha=found.beta)
        replace((root,), new, build)
    except Refuse:
        build.discard()
        raise
    return Respelled(root, build)
