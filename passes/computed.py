"""What of a graph depends on what the model is called with, and what is the model's own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx


def is_computed(node: fx.Node) -> bool:
    """Whether `node` depends on a tensor that the model is called with: no parameter, buffer or constant."""
    return any(not _is_held(x) for x in _inputs(node))


def learns(node: fx.Node) -> bool:
    """Whether a gradient may reach an input of the graph through `node`.

    Inputs tell: a node that a pass has made may have lost what it knew.
    """
    return torch.is_grad_enabled() and any(x.meta["val"].requires_grad for x in _inputs(node))


def _inputs(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors among the graph's inputs that `node` depends on."""
    seen, left = {node}, [node]
    while left:
        node = left.pop()
        if node.op == "placeholder" and isinstance(node.meta.get("val"), torch.Tensor):
            yield node
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        left += new


def _is_held(node: fx.Node) -> bool:
    """Whether an input of the graph is a parameter, a buffer or a constant of the model."""
    source = str(getattr(getattr(node, "_dynamo_source", None), "name", ""))
    exported = "recompile_name" in node.meta
    return isinstance(node.meta["val"], torch.nn.Parameter) or exported or "._buffers[" in source
