"""Activation checkpoints (`torch.utils.checkpoint`): what is inside them becomes part of the graph around them.

Passes see it then, and fuse it. AOTAutograd's partitioner reads from marks on nodes what the backward computes again;
with Dynamo's operator, torch sets the same marks on what the operator calls.

Tried with torch 2.13: `torch.ops.higher_order.tag_activation_checkpoint`, `_checkpoint_context_fn` on its graph, and
`recompute` and `ac_graph_id` on nodes.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

_ids = itertools.count(1)
_MARKS = ("recompute", "ac_graph_id")


def body(node: fx.Node, values: dict[fx.Node, Any]) -> fx.GraphModule | None:
    """The graph in the checkpoint `node`; None if it is none, or chooses itself what is computed again.

    Args:
        values: the value of each node before `node`.
    """
    if node.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return None
    inside = values[node.args[0]]  # type: ignore[index]
    return None if "_checkpoint_context_fn" in inside.meta else inside


def marks(meta: dict[str, Any]) -> dict[str, Any]:
    """The marks of the nodes in a checkpoint: those of the checkpoint around it, whose node has `meta`, or new ones."""
    around = {key: meta[key] for key in _MARKS if key in meta}
    return around or dict(zip(_MARKS, (CheckpointPolicy.PREFER_RECOMPUTE, next(_ids)), strict=True))
