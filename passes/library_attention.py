"""The library's attention and the attention op: which of them computes what, and one as the other.

The library keeps what it has a kernel for that ours does not beat. On CPUs in float32 ours is the faster one (see
docs/attention.md), and with dropout the library has none, so there the call is spelled out as softmax and products for
`rewrite_attention` to read. So is a layer of `nn.TransformerEncoder` in evaluation, which is one call. On GPUs a plain
softmax goes to the library, however it is written.
"""

from __future__ import annotations

import math
from typing import Any

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
ENCODER = aten._transformer_encoder_layer_fwd.default
_PADDING = 1  # the kind of mask that is of samples and keys; others have heads and queries too


def spell_out(node: fx.Node, effects: Effects, rule: str) -> Builder:
    """Puts softmax and products in the place of a call of the library; the call stays, without users.

    Raises:
        Refuse: the library's kernel is as good, or the call has something that is not spelled out.
    """
    given, value = arguments(node), node.meta["val"]
    if value.device.type != "cpu" or value.dtype is not torch.float32:
        raise Refuse("it is the library's attention already", node)
    if given.get("enable_gqa"):
        raise Refuse("it is the library's attention, with heads that share keys", node)
    build = Builder(effects, node, rule)
    try:
        spelled = _encoder if node.target is ENCODER else _spelled
        replace((node,), spelled(given, value, build), build)
    except Refuse:
        build.discard()
        raise
    return build


def take_back(node: fx.Node, build: Builder) -> None:
    """Undoes `spell_out`, if what stands in the call's place has not become attention; else erases the call."""
    (weights,) = [made for made in build.made if made.target in (SOFTMAX, aten.softmax.int)]
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


def _encoder(given: dict[str, object], value: torch.Tensor, build: Builder) -> fx.Node:
    """A layer of an encoder, the feed-forward network included; a row without keys is NaN."""
    x: Any = given["src"]

    def normed(x: fx.Node, which: int) -> fx.Node:
        weight, bias = given[f"norm_weight_{which}"], given[f"norm_bias_{which}"]
        return build.call(aten.layer_norm.default, x, shape(x)[-1:], weight, bias, given["eps"])

    first = bool(given["norm_first"])
    attended = _attended(normed(x, 1) if first else x, given, build)
    x = build.call(aten.add.Tensor, attended, x)
    x = x if first else normed(x, 1)
    hidden = build.call(
        aten.linear.default, normed(x, 2) if first else x, given["ffn_weight_1"], given["ffn_bias_1"]
    )
    hidden = build.call(aten.gelu.default if given["use_gelu"] else aten.relu.default, hidden)
    hidden = build.call(aten.linear.default, hidden, given["ffn_weight_2"], given["ffn_bias_2"])
    x = build.call(aten.add.Tensor, hidden, x)
    return x if first else normed(x, 2)


def _attended(x: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node:
    """The layer's attention of `x` to itself; its mask, whatever its dtype, is true where there is no key."""
    heads, mask = given["num_heads"], given["mask"]
    samples, rows, width = shape(x)
    projected = build.call(aten.linear.default, x, given["qkv_weight"], given["qkv_bias"])
    projected = build.call(aten.reshape.default, projected, [samples, rows, 3, heads, width // heads])
    parts = [build.call(aten.select.int, projected, 2, n) for n in range(3)]
    q, k, v = (build.call(aten.permute.default, part, [0, 2, 1, 3]) for part in parts)
    scores = build.call(aten.matmul.default, q, build.call(aten.permute.default, k, [0, 1, 3, 2]))
    scores = build.call(aten.mul.Tensor, scores, 1 / math.sqrt(width // heads))
    if mask is not None:
        if given["mask_type"] == _PADDING:
            mask = build.call(aten.unsqueeze.default, build.call(aten.unsqueeze.default, mask, 1), 1)
        scores = build.call(
            aten.masked_fill.Scalar, scores, build.call(aten.to.dtype, mask, torch.bool), -math.inf
        )
    out = build.call(aten.matmul.default, build.call(aten.softmax.int, scores, -1), v)
    out = build.call(aten.permute.default, out, [0, 2, 1, 3])
    out = build.call(aten.reshape.default, out, [samples, rows, width])
    return build.call(aten.linear.default, out, given["proj_weight"], given["proj_bias"])


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
