"""`scaled_dot_product_attention` and the attention op: which of them computes what, and one as the other.

The library keeps what it has a kernel for that ours does not beat. On CPUs in float32 ours is the faster one (see
docs/attention.md), and with dropout the library has none, so there the call is spelled out as softmax and products for
`rewrite_attention` to read. On GPUs a plain softmax goes to the library, however it is written.
"""

from __future__ import annotations

import math

import sympy
import torch
from torch import fx

from recompile.lowering import score as language
from recompile.lowering.attention import Attention
from recompile.rewrite import Builder, Effects, Refuse, arguments, replace

from .axes import layout, shape

aten = torch.ops.aten
SOFTMAX = aten._safe_softmax.default
LIBRARY = aten.scaled_dot_product_attention.default


def spell_out(node: fx.Node, effects: Effects, rule: str) -> Builder:
    """Puts softmax and products in the place of a call of the library; the call stays, without users.

    Raises:
        Refuse: the library's kernel is as good, or the call has something that is not spelled out.
    """
    given, value = arguments(node), node.meta["val"]
    if value.device.type != "cpu" or value.dtype is not torch.float32:
        raise Refuse("it is the library's attention already", node)
    if given["enable_gqa"]:
        raise Refuse("it is the library's attention, with heads that share keys", node)
    build = Builder(effects, node, rule)
    try:
        replace((node,), _spelled(given, value, build), build)
    except Refuse:
        build.discard()
        raise
    return build


def take_back(node: fx.Node, build: Builder) -> None:
    """Undoes `spell_out`, if what stands in the call's place has not become attention; else erases the call."""
    (weights,) = [made for made in build.made if made.target is SOFTMAX]
    if weights._erased:
        node.graph.erase_node(node)
        return
    build.made[-1].replace_all_uses_with(node)
    build.discard()


def _spelled(given: dict[str, object], value: torch.Tensor, build: Builder) -> fx.Node:
    q, k, v, mask, scale = (given[name] for name in ("query", "key", "value", "attn_mask", "scale"))
    assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
    rank = len(shape(k))
    turned = build.call(aten.permute.default, k, [*range(rank - 2), rank - 1, rank - 2])
    scores = build.call(aten.matmul.default, q, turned)
    scores = build.call(aten.mul.Tensor, scores, 1 / math.sqrt(shape(q)[-1]) if scale is None else scale)
    if given["is_causal"]:
        ones = build.call(aten.ones.default, shape(scores)[-2:], dtype=torch.bool, device=value.device)
        mask = build.call(aten.tril.default, ones)
    if isinstance(mask, fx.Node) and mask.meta["val"].dtype is torch.bool:
        out = build.call(aten.bitwise_not.default, mask)
        scores = build.call(aten.masked_fill.Scalar, scores, out, -math.inf)
    elif mask is not None:
        scores = build.call(aten.add.Tensor, scores, mask)
    weights = build.call(SOFTMAX, scores, -1)
    if given["dropout_p"]:
        weights = build.call(aten.dropout.default, weights, given["dropout_p"], True)
    return _laid_out(build.call(aten.matmul.default, weights, v), value, build)


def _laid_out(out: fx.Node, like: torch.Tensor, build: Builder) -> fx.Node:
    """`out` in memory as the library lays it out, which follows the queries: heads may lie inside the rows."""
    order, plain = layout(like), tuple(range(like.dim()))
    if order is None or order == plain or order[-1] != plain[-1]:
        return out
    turned = build.call(aten.contiguous.default, build.call(aten.permute.default, out, list(order)))
    return build.call(aten.permute.default, turned, [order.index(dim) for dim in plain])


def by_library(spec: Attention, device: str, rank: int) -> dict[str, object] | None:
    """How the library computes a spec on such a device (its arguments), where it does that best; else None."""
    score, keep = language.parse(spec.kept or spec.score), language.parse(spec.keep)
    scale = sympy.diff(score, language.S)
    known = keep == sympy.true or keep == sympy.LessThan(language.J, language.I)
    if device != "cuda" or rank != 4 or not spec.softmax or spec.extras or spec.weight or not known:
        return None
    if not scale.is_number or score != scale * language.S or scale <= 0:
        return None
    return {"is_causal": keep != sympy.true, "scale": float(scale)}
