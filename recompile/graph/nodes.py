"""Reading an FX node without arguing with its types."""

from __future__ import annotations

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
