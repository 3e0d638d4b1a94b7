"""Order and dependence in an FX graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import fx

from .walls import is_random, is_wall


def depths(needs: Mapping[fx.Node, Iterable[fx.Node]], of: Iterable[fx.Node]) -> dict[fx.Node, int]:
    """How many of the nodes `of` lie on the longest path to each node, itself included.

    Two of them with the same depth do not depend on each other, so nodes of one depth can become one node
    without a cycle.

    Args:
        needs: what each node depends on; nodes come after what they depend on.
    """
    counted, found = set(of), dict[fx.Node, int]()
    for node, before in needs.items():
        found[node] = max((found[i] for i in before), default=0) + (node in counted)
    return found


def erase(node: fx.Node) -> None:
    """Erases `node`, and what fed only it, if nobody uses it; walls, random operators and inputs stay."""
    todo = [node]
    while todo:
        dead = todo.pop()
        if (
            dead.users
            or dead._erased
            or dead.op in ("placeholder", "output")
            or is_wall(dead)
            or is_random(dead)
        ):
            continue
        todo += dead.all_input_nodes
        dead.graph.erase_node(dead)
