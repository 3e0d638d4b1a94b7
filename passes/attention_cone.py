"""What the weights of an attention are computed from, up to the contractions: its cone."""

from __future__ import annotations

import operator
from collections.abc import Callable

import torch
from torch import fx
from torch._ops import OpOverload

from recompile.rewrite import same
from recompile.rewrite.schema import op_name

from . import score_ops
from .axes import COPIES, shape
from .computed import is_computed
from .contractions import Contraction, contraction
from .looked_up import LOOKUPS

aten = torch.ops.aten
CASTS = (aten.to, aten._to_copy)
CONSTANTS = {
    aten.ones: 1, aten.ones_like: 1, aten.new_ones: 1, aten.zeros: 0, aten.zeros_like: 0, aten.new_zeros: 0,
}  # fmt: skip
SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
LOG_SOFTMAX = (aten.log_softmax.int, aten._log_softmax.default)
VIEWS = (
    aten.unsqueeze, aten.squeeze, aten.permute, aten.expand, aten.reshape, aten.view, aten._unsafe_view,
    aten.select, aten.slice, aten.detach, *COPIES, *CASTS,
)  # fmt: skip
FILLED = (aten.full, aten.full_like, aten.new_full, aten.scalar_tensor)


def cone(weights: fx.Node) -> dict[fx.Node, None]:
    """`weights` and what it is computed from elementwise, up to contractions; nearest first.

    Where a softmax stands on the way, also through operators that nearly keep a tensor's shape, to be refused by
    name: without one, that would take any two layers for an attention.
    """
    found = _walked(weights, lambda node, source: is_known(node) or _keeps(node, source))
    return found if has_softmax(found) else _walked(weights, lambda node, _: is_known(node))


def _walked(weights: fx.Node, goes_on: Callable[[fx.Node, fx.Node], bool]) -> dict[fx.Node, None]:
    found: dict[fx.Node, None] = {}
    left = [weights]
    while left and len(found) < 500:
        node = left.pop(0)
        held = isinstance(node.meta.get("val"), (torch.Tensor, tuple, list))
        if node in found or node.op != "call_function" or not held:
            continue
        found[node] = None
        if is_filled(node):
            continue
        if (product := contraction(node)) is None:
            left += [n for n in node.all_input_nodes if goes_on(node, n)]
        elif product.added is not None:
            left.append(product.added)
    return found


def products(nodes: dict[fx.Node, None]) -> list[fx.Node]:
    """The contractions among the nodes that may be of queries and keys: without a softmax on the way no layers.

    Of several those that are no biases, which a model holds anyway or which are smaller: they have all dims of the
    scores, and no features for each pair, as `einsum("bhnd,bnmd->bhnm", q, times)` has.
    """
    found = [c for n in nodes if (c := contraction(n)) is not None]
    found = [c for c in found if has_softmax(nodes) or not is_layer(c)]
    if len(found) > 1:
        found = [c for c in found if not c.is_elementwise()] or found
        most = max(len(_dims(c)) for c in found)
        found = [c for c in found if len(_dims(c)) == most and not _is_of_pairs(c)] or found
    return [c.node for c in found]


def _is_of_pairs(found: Contraction) -> bool:
    """Whether a side has features for each pair: all dims of the result, or its last two, queries and keys usually."""
    pairs = [{*found.letters[2][-2:]}.difference([""]), _dims(found)]
    return any(len(dims) > 1 and dims <= {*side} for dims in pairs for side in found.letters[:2])


def _dims(found: Contraction) -> set[str]:
    """The letters of the result that stand for more than one element."""
    return {x for x, size in zip(found.letters[2], shape(found.node), strict=True) if not same(size, 1)}


def is_layer(found: Contraction) -> bool:
    """Whether one side of a contraction is the same whatever the model is called with, or one term is summed.

    Not if both have a dim in common beside the summed one, such as samples.
    """
    return found.is_elementwise() or not (
        found.common() or (is_computed(found.left) and is_computed(found.right))
    )


def has_softmax(nodes: dict[fx.Node, None]) -> bool:
    """Whether a softmax is among the nodes, or what one by hand is made of."""
    return any(n.target in (*SOFTMAX, *LOG_SOFTMAX, aten.exp.default) for n in nodes)


def is_known(node: fx.Node) -> bool:
    """Whether a region may go on above `node`, or the node is elementwise: then it is refused by name."""
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    packet = node.target.overloadpacket
    if packet in _TRANSPARENT or packet in score_ops.KNOWN or torch.Tag.pointwise in node.target.tags:
        return True
    return op_name(node.target).endswith("_")  # in place: refused with a sentence


def _keeps(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator's result has the shape of `source`, but for one dim that is cut, longer, or gone.

    A layer's has that very shape, as where it mixes the heads of scores.
    """
    value = node.meta["val"]
    new, old = (value if isinstance(value, torch.Tensor) else value[0]).shape, shape(source)
    if node.target in _LAYERS or len(old) < 3:
        return bool(same(new, old))
    if len(new) == len(old):
        return sum(not same(a, b) for a, b in zip(new, old, strict=True)) < 2
    return any(same(new, (*old[:k], *old[k + 1 :])) for k in range(len(old)))


_LAYERS = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
_TRANSPARENT = {
    aten.softmax, aten._softmax, aten._safe_softmax,
    aten.amax, aten.max, aten.sum, aten.tril, aten.triu, aten.bucketize, *LOOKUPS,
    aten.unsqueeze, aten.permute, aten.expand, aten.repeat, aten.repeat_interleave, aten.contiguous, aten.clone,
    aten.alias, aten.detach, aten._unsafe_view, aten.reshape, aten.view, aten.squeeze,
    aten.select_scatter, aten.slice_scatter,
    aten.dropout, aten.feature_dropout, aten.logsumexp, *CASTS,
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
