"""Products of two tensors summed over one dim, however they are written: matmul, einsum, (a * b).sum(dim), ...

Dims are told apart by letters: equal letters are one dim, as in an einsum; "" is a dim of size 1 that is repeated.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from recompile.rewrite import arguments, same

from .axes import shape
from .computed import is_computed

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default)
_ADDED = {aten.baddbmm.default: ("batch1", "batch2"), aten.addmm.default: ("mat1", "mat2")}


@dataclass(frozen=True)
class Contraction:
    """`node` = `scale` / `terms` * the sum of `left` * `right` over `summed`, + `added` times `beta`.

    `letters` are those of left, right and node, one a dim. `terms` is not 1 in a mean.
    """

    node: fx.Node
    left: fx.Node
    right: fx.Node
    letters: tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]
    summed: str
    inner: tuple[fx.Node, ...] = ()  # nodes that are part of it
    scale: Any = 1
    added: fx.Node | None = None
    beta: Any = 1
    terms: Any = 1

    def common(self) -> set[str]:
        """The dims that both sides have beside the summed one."""
        return set(self.letters[0]) & set(self.letters[1]) - {"", self.summed}

    def is_elementwise(self) -> bool:
        """Whether one term is summed, as in the product of a column and a row."""
        return same(shape(self.left)[self.letters[0].index(self.summed)], 1)


def contraction(node: Any) -> Contraction | None:
    """What `node` is as a contraction; None if it is not one.

    A linear layer is one only if its weight is computed from the model's inputs.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return _matmul(node, *node.args[:2])
    if node.target in _ADDED:
        given = arguments(node)
        found = _matmul(node, *(given[name] for name in _ADDED[node.target]))
        return found and replace(found, scale=given["alpha"], added=given["self"], beta=given["beta"])
    if node.target in _OTHERS:
        return _OTHERS[node.target](node, arguments(node))
    return None


def _matmul(node: fx.Node, left: Any, right: Any) -> Contraction | None:
    ranks = [len(shape(left)), len(shape(right))]
    if max(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    ends = [x if rank > 1 else "S" for x, rank in zip(("RS", "SC"), ranks, strict=True)]
    of = [
        (*batch[len(batch) - rank + 2 :], *end) if rank > 1 else (end,)
        for rank, end in zip(ranks, ends, strict=True)
    ]
    letters = (
        _repeated(left, of[0], "S"),
        _repeated(right, of[1], "S"),
        (*batch, *"".join(ends).replace("S", "")),
    )
    return Contraction(node, left, right, letters, "S")


def _apart(node: fx.Node, left: fx.Node, right: fx.Node, dims: Sequence[int]) -> Contraction:
    """The sides have no dim in common but the one that is summed."""
    ranks = [len(shape(left)), len(shape(right))]
    names = string.ascii_lowercase[: sum(ranks)]
    sides = [[*names[: ranks[0]]], [*names[ranks[0] :]]]
    for side, dim in zip(sides, dims, strict=True):
        side[dim] = "S"
    out = tuple(x for side in sides for x in side if x != "S")
    return Contraction(node, left, right, (tuple(sides[0]), tuple(sides[1]), out), "S")


def _inner(node: fx.Node, given: dict[str, Any]) -> Contraction | None:
    return _apart(node, given["self"], given["other"], (-1, -1))


def _tensordot(node: fx.Node, given: dict[str, Any]) -> Contraction | None:
    dims = [given["dims_self"], given["dims_other"]]
    return _apart(node, given["self"], given["other"], [d[0] for d in dims]) if len(dims[0]) == 1 else None


def _linear(node: fx.Node, given: dict[str, Any]) -> Contraction | None:
    if len(shape(given["weight"])) != 2 or not is_computed(given["weight"]):
        return None
    return replace(_apart(node, given["input"], given["weight"], (-1, -1)), added=given["bias"])


def _repeated(node: fx.Node, letters: tuple[str, ...], summed: str) -> tuple[str, ...]:
    """The letters, but none where a dim of size 1 may be repeated."""
    sizes = zip(letters, shape(node), strict=True)
    return tuple("" if letter.islower() and same(size, 1) else letter for letter, size in sizes)


def einsum_letters(node: fx.Node) -> list[str] | None:
    """The letters of an einsum's operands and of its result; None where one has a letter twice."""
    given = arguments(node)
    inputs, arrow, out = given["equation"].replace(" ", "").partition("->")
    if not arrow:  # the letters that are there once, in order
        out = "..." * ("..." in inputs) + "".join(
            sorted(x for x in inputs if x.isalpha() and inputs.count(x) == 1)
        )
    values = [*given["tensors"], node]
    parts = [
        _spelled_out(part, len(shape(value)))
        for part, value in zip([*inputs.split(","), out], values, strict=True)
    ]
    return None if any(len(set(part)) < len(part) or not part.isalpha() for part in parts) else parts


def _einsum(node: fx.Node, given: dict[str, Any]) -> Contraction | None:
    parts = einsum_letters(node)
    if parts is None or len(parts) != 3:
        return None
    summed = (set(parts[0]) | set(parts[1])) - set(parts[2])
    if len(summed) != 1 or not all(summed <= set(p) for p in parts[:2]):
        return None
    letter = summed.pop()
    left, right = given["tensors"]
    if not same(shape(left)[parts[0].index(letter)], shape(right)[parts[1].index(letter)]):
        return None  # one term is repeated
    sides = [_free(n, p, letter) for n, p in ((left, parts[0]), (right, parts[1]))]
    return Contraction(node, left, right, (sides[0], sides[1], tuple(parts[2])), letter)


def _spelled_out(letters: str, rank: int) -> str:
    """`...` as letters: Greek ones, from the right, which no equation has."""
    named = len(letters.replace("...", ""))
    return letters.replace("...", "αβγδεζηθ"[8 - (rank - named) :])


def _free(node: fx.Node, letters: str, summed: str) -> tuple[str, ...]:
    sizes = zip(letters, shape(node), strict=True)
    return tuple("" if x != summed and same(size, 1) else x for x, size in sizes)


def _weighted_sum(node: fx.Node, given: dict[str, Any]) -> Contraction | None:
    product, dims = given["self"], given["dim"]
    if len(dims or ()) != 1 or given["dtype"] is not None or product.target is not aten.mul.Tensor:
        return None
    left, right = product.args[:2]
    if not isinstance(right, fx.Node) or len(product.users) > 1:
        return None
    rank = len(shape(product))
    letters = [chr(ord("a") + k) for k in range(rank)]
    summed = letters[dims[0]]
    sides = [_aligned(n, letters, rank) for n in (left, right)]
    if not all(summed in side for side in sides):
        return None
    kept = tuple(x if k != dims[0] else "" for k, x in enumerate(letters) if k != dims[0] or given["keepdim"])
    terms = shape(product)[dims[0]] if node.target is aten.mean.dim else 1
    return Contraction(node, left, right, (sides[0], sides[1], kept), summed, (product,), terms=terms)


def _aligned(node: fx.Node, letters: list[str], rank: int) -> tuple[str, ...]:
    sizes = shape(node)
    return tuple(
        "" if same(size, 1) else x for x, size in zip(letters[rank - len(sizes) :], sizes, strict=True)
    )


_OTHERS = {
    aten.inner.default: _inner, aten.tensordot.default: _tensordot, aten.linear.default: _linear,
    aten.einsum.default: _einsum, aten.sum.dim_IntList: _weighted_sum, aten.mean.dim: _weighted_sum,
}  # fmt: skip
