"""Reading an FX node without arguing with its types."""

from __future__ import annotations

from typing import Any

from torch import fx


def arg(node: fx.Node, index: int, default: Any = None) -> Any:
    """The positional argument `index` of `node`, or `default`."""
    return node.args[index] if len(node.args) > index else default
