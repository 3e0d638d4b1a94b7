"""Products of two tensors summed over one dim, however they are written: matmul, bmm, einsum, (a * b).sum(dim).

Dims are told apart by letters: equal letters are one dim, as in an einsum; "" is a dim of size 1 that is repeated.
"""

from __future__ import annotations

import string
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from recompile.rewrite import arguments, same

from .axes import shape

aten = torch.ops.aten
_PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)


@dataclass(frozen=True)
class Contraction:
    """`node` = `scale` * the sum of `left` * `right` over `summed`, + `added` times `beta`.

    `letters` are those of left, right and node, one a dim.
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

    def common(self) -> set[str]:
        """The dims that both sides have beside the summed one."""
        return set(self.letters[0]) & set(self.letters[1]) - {"", self.summed}


def contraction(node: Any) -> Contraction | None:
    """What `node` is as a contraction; None if it is not one."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return _matmul(node, *node.args[:2])
    if node.target is aten.baddbmm.default:
        given = arguments(node)
        found = _matmul(node, given["batch1"], given["batch2"])
        return found and Contraction(
            node, found.left, found.right, found.letters, found.summed,
            scale=given["alpha"], added=given["self"], beta=given["beta"],
        )  # fmt: skip
    if node.target is aten.einsum.default:
        return _einsum(node)
    return _weighted_sum(node) if node.target is aten.sum.dim_IntList else None


def _matmul(node: fx.Node, left: Any, right: Any) -> Contraction | None:
    ranks = [len(shape(left)), len(shape(right))]
    if min(ranks) < 2:
        return None
    batch = string.ascii_lowercase[: max(ranks) - 2]
    of = [(*batch[len(batch) - rank + 2 :], *ends) for rank, ends in zip(ranks, ("RS", "SC"), strict=True)]
    letters = _repeated(left, of[0], "S"), _repeated(right, of[1], "S"), (*batch, "R", "C")
    return Contraction(node, left, right, letters, "S")


def _repeated(node: fx.Node, letters: tuple[str, ...], summed: str) -> tuple[str, ...]:
    """The letters, but none where a dim of size 1 may be repeated."""
    sizes = zip(letters, shape(node), strict=True)
    return tuple("" if letter.islower() and same(size, 1) else letter for letter, size in sizes)


def _einsum(node: fx.Node) -> Contraction | None:
    given = arguments(node)
    inputs, arrow, out = given["equation"].replace(" ", "").partition("->")
    parts, values = [*inputs.split(","), out], [*given["tensors"], node]
    if not arrow or len(parts) != 3:
        return None
    parts = [_spelled_out(part, len(shape(value))) for part, value in zip(parts, values, strict=True)]
    if any(len(set(p)) < len(p) or not p.isalpha() for p in parts):
        return None
    summed = (set(parts[0]) | set(parts[1])) - set(parts[2])
    if len(summed) != 1 or not all(summed <= set(p) for p in parts[:2]):
        return None
    letter = summed.pop()
    left, right = given["tensors"]
    sides = [_free(n, p, letter) for n, p in ((left, parts[0]), (right, parts[1]))]
    return Contraction(node, left, right, (sides[0], sides[1], tuple(parts[2])), letter)


def _spelled_out(letters: str, rank: int) -> str:
    """`...` as letters: Greek ones, from the right, which no equation has."""
    named = len(letters.replace("...", ""))
    return letters.replace("...", "αβγδεζηθ"[8 - (rank - named) :])


def _free(node: fx.Node, letters: str, summed: str) -> tuple[str, ...]:
    sizes = zip(letters, shape(node), strict=True)
    return tuple("" if x != summed and same(size, 1) else x for x, size in sizes)


def _weighted_sum(node: fx.Node) -> Contraction | None:
    given = arguments(node)
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
    return Contraction(node, left, right, (sides[0], sides[1], kept), summed, (product,))


def _aligned(node: fx.Node, letters: list[str], rank: int) -> tuple[str, ...]:
    sizes = shape(node)
    return tuple(
        "" if same(size, 1) else x for x, size in zip(letters[rank - len(sizes) :], sizes, strict=True)
    )
