"""What happens to a graph, told node by node.

Tried with torch 2.13: `GraphModule._register_create_node_hook`, `_register_replace_node_hook`,
`_register_erase_node_hook` and their `_unregister_...`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

Made = Callable[[fx.Node], None]
Replaced = Callable[[fx.Node, str, fx.Node], None]
Erased = Callable[[fx.Node], None]


def follow(gm: fx.GraphModule, made: Made, replaced: Replaced, erased: Erased) -> None:
    """Calls these for every node of the graph of `gm` that is made, replaced or erased from now on.

    Args:
        made, erased: are given the node.
        replaced: is given the old node, the name of the new one, and a user that changes from one to the other.
    """
    gm._register_create_node_hook(made)
    gm._register_replace_node_hook(replaced)
    gm._register_erase_node_hook(erased)


def leave(gm: fx.GraphModule, made: Made, replaced: Replaced, erased: Erased) -> None:
    """Calls them no more."""
    gm._unregister_create_node_hook(made)
    gm._unregister_replace_node_hook(replaced)
    gm._unregister_erase_node_hook(erased)
