"""What the weights of an attention are computed from, up to the contractions: its cone."""

from __future__ import annotations

import operator

import torch
from torch import fx

from recompile.rewrite import same

from . import score_ops
from .axes import shape
from .computed import is_computed
from .contractions import Contraction, contraction

aten = torch.ops.aten
CASTS = (aten.to, aten._to_copy)
CONSTANTS = {
    aten.ones: 1, aten.ones_like: 1, aten.new_ones: 1, aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0,
}  # fmt: skip
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
FILLED = (aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)


def cone(weights: fx.Node) -> dict[fx.Node, None]:
    """`weights` and what it is computed from elementwise, up to contractions; nearest first."""
    found: dict[fx.Node, None] = {}
    left = [weights]
    while left and len(found) < 500:
        node = left.pop(0)
        held = isinstance(node.meta.get("val"), (torch.Tensor, tuple))
        if node in found or node.op != "call_function" or not held:
            continue
        found[node] = None
        if (product := contraction(node)) is None:
            left += [n for n in node.all_input_nodes if _is_transparent(node)]
        elif product.added is not None:
            left.append(product.added)
    return found


def products(nodes: dict[fx.Node, None]) -> list[fx.Node]:
    """The contractions among the nodes that may be of queries and keys: without a softmax on the way no layers.

    Of several those that are no biases, which a model holds anyway or which are smaller: they have all dims of the
    scores, and no features for each pair, as `einsum("bnd,bnmd->bnm", q, times)` has.
    """
    found = [c for n in nodes if (c := contraction(n)) is not None]
    found = [c for c in found if has_softmax(nodes) or not is_layer(c)]
    if len(found) > 1:
        most = max(len(_dims(c)) for c in found)
        true = [
            c for c in found if len(_dims(c)) == most and not any(_dims(c) <= {*x} for x in c.letters[:2])
        ]
        found = true or found
    return [c.node for c in found]


def _dims(found: Contraction) -> set[str]:
    """The letters of the result that stand for more than one element."""
    return {x for x, size in zip(found.letters[2], shape(found.node), strict=True) if not same(size, 1)}


def has_softmax(nodes: dict[fx.Node, None]) -> bool:
    """Whether one of the nodes is a softmax, or what one by hand is made of."""
    return any(n.target in (*SOFTMAX, aten.exp.default) for n in nodes)


def is_layer(found: Contraction) -> bool:
    """Whether one side of a contraction is the same whatever the model is called with, or one term is summed.

    Not if both have a dim in common beside the summed one, such as samples.
    """
    if same(shape(found.left)[found.letters[0].index(found.summed)], 1):
        return True
    return not (found.common() or (is_computed(found.left) and is_computed(found.right)))


def _is_transparent(node: fx.Node) -> bool:
    """Whether a region may go on above `node`."""
    if node.target is operator.getitem:
        return True
    packet = getattr(node.target, "overloadpacket", None)
    if packet in _TRANSPARENT or packet in score_ops.KNOWN or packet in _REFUSED:
        return True
    return str(getattr(packet, "__name__", "")).endswith("_")  # in place: refused with a sentence


_TRANSPARENT = {
    aten.softmax, aten._softmax, aten._safe_softmax,
    aten.amax, aten.max, aten.sum, aten.tril, aten.triu, aten.index, aten.embedding,
    aten.unsqueeze, aten.permute, aten.expand, aten.repeat, aten.repeat_interleave, aten.contiguous, aten.clone,
    aten.alias, aten.detach, aten._unsafe_view, aten.reshape, aten.view, aten.squeeze,
    aten.select_scatter, aten.slice_scatter,
    aten.dropout, aten.feature_dropout, aten.logsumexp, *CASTS,
}  # fmt: skip


# What people do to scores that no expression of one pair can say, or not yet: refused with a sentence.
_REFUSED = {
    aten.cumsum, aten.cumprod, aten.nan_to_num, aten.gelu, aten.elu, aten.softplus, aten.erf, aten.log_softmax,
    aten.roll, aten.flip, aten.bernoulli, aten.native_dropout,
}  # fmt: skip


def is_filled(node: fx.Node) -> bool:
    """Whether `node` is one number everywhere."""
    return getattr(node.target, "overloadpacket", None) in (*CONSTANTS, *FILLED)


def path(nodes: dict[fx.Node, None], products: list[fx.Node]) -> set[fx.Node]:
    """The nodes of the cone that depend on a product."""
    path = set(products)
    for node in sorted(nodes):
        if not is_filled(node) and any(n in path for n in node.all_input_nodes):
            path.add(node)
    return path
