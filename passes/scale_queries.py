"""Scores that must be kept are scaled before their product, where there is less to scale.

    softmax(q @ k / c)   ->   softmax((q / c) @ k)        q [..., M, D], scores [..., M, N], D < N

Attention that gives its weights to the caller stays as it is written (see `rewrite_attention.py`). For a scaled
softmax, Inductor (torch 2.13) computes each row's maximum before the scale and after it, and then chooses by whether
all scores of the row are finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from recompile.cost import numel
from recompile.rewrite import Match, Ops, Pattern, Refuse, Rule, any_of, register

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # in float16, scaled queries may overflow


@register
@dataclass(frozen=True)
class ScaleQueries(Rule):
    """Moves the scale of a softmax' scores to their smaller side (see the module)."""

    numerics = "reassociate"
    after = ("rewrite-attention",)

    def pattern(self, op: Ops) -> Pattern:
        q, k = op.var("q"), op.var("k")
        products = op.matmul(q, k), op.bmm(q, k), op.einsum(op.const("equation"), [q, k])
        scores = any_of(*(product.used_once() for product in products), tag="product").named("scores")
        by = op.const("by")
        scaled = any_of(op.div(scores, by).used_once(), op.mul(scores, by).used_once(), tag="scale")
        softmax: Pattern = op.softmax(scaled, op.const("dim"))
        return softmax

    def check(self, m: Match) -> None:
        if len(m.root.users) < 2:
            raise Refuse("the attention weights are used once: Inductor's own attention may fit")
        dtypes = {m.val(name).dtype for name in ("q", "k", "scores")}
        if len(dtypes) > 1 or not dtypes <= {*_DTYPES}:
            raise Refuse(f"queries, keys and scores are of {', '.join(sorted(map(str, dtypes)))}")
        if not isinstance(m["by"], (int, float)) or not math.isfinite(m["by"]) or m["by"] == 0:
            raise Refuse(f"scaled by {m['by']}, scores need not be finite where the products are")
        if not any(_is_smaller(m.val(side), m.val("scores")) for side in "qk"):
            raise Refuse("neither queries nor keys are known to be smaller than their scores")

    def rewrite(self, m: Match) -> fx.Node:
        sides = {name: m.node(name) for name in "qk"}
        name = "q" if _is_smaller(m.val("q"), m.val("scores")) else "k"
        sides[name] = (m.op.div, m.op.mul)[m["scale"]](sides[name], m["by"])
        if m["product"] == 2:
            scores = m.op.einsum(m["equation"], [*sides.values()])
        else:
            scores = (m.op.matmul, m.op.bmm)[m["product"]](*sides.values())
        softmax: fx.Node = m.op.softmax(scores, m["dim"])
        return softmax


def _is_smaller(x: Any, y: Any) -> bool:
    """Whether x is known to have fewer elements than y, for any size of the batch."""
    if numel(y) == 0:
        return False
    ratio = sympy.sympify(numel(x)) / numel(y)
    return bool(ratio.is_number and ratio < 1)
