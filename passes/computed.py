"""What of a graph depends on what the model is called with, and what is the model's own."""

from __future__ import annotations

import torch
from torch import fx


def is_computed(node: fx.Node) -> bool:
    """Whether `node` depends on a tensor that the model is called with: no parameter, buffer or constant."""
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor) and not _is_held(node):
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        left += new
    return False


def _is_held(node: fx.Node) -> bool:
    """Whether an input of the graph is a parameter, a buffer or a constant of the model."""
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    exported = "recompile_name" in node.meta
    return isinstance(node.meta["val"], torch.nn.Parameter) or exported or "._buffers[" in source
