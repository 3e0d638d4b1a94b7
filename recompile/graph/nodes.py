"""Reading an FX node without arguing with its types."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import fx


def arg(node: fx.Node, index: int, default: Any = None) -> Any:
    """The positional argument `index` of `node`, or `default`."""
    return node.args[index] if len(node.args) > index else default


def adds_in_any_order(node: fx.Node) -> str:
    """Why no kernel of ours must make the gradient of a tensor that it reads anywhere, or "" where one may.

    On GPUs such gradients are added atomically, and `torch.use_deterministic_algorithms` forbids it.
    """
    asked = torch.are_deterministic_algorithms_enabled() and torch.is_grad_enabled()
    if not asked or node.meta["val"].device.type == "cpu":
        return ""
    return (
        f"the gradient of {node.name} would be added in any order, and deterministic algorithms are asked for"
    )


def input_name(node: fx.Node) -> str:
    """Where an input of the graph comes from, as the user writes it: `self.top.weight`."""
    source = getattr(node, "_dynamo_source", None)
    return str(node.target) if source is None else source_name(str(source.name))


def source_name(guarded: str) -> str:
    """A place as the user writes it: `L['self']._modules['top']._parameters['weight']` is `self.top.weight`."""
    inside = re.sub(r"\._(?:modules|parameters|buffers)\['([^']+)'\]", r".\1", guarded)
    return re.sub(r"^[LG]\['(\w+)'\]", r"\1", inside)
