"""Which nodes a pass replaced by which.

torch.fx tells of every node that is made, replaced or erased, whoever does it. One rewrite makes nodes, hands over
to them, and erases what it replaced: where something is made or replaced after an erasure, the next one begins.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

from torch import fx

from .torch_private.graph_hooks import follow, leave


@dataclass
class _Rewrite:
    """Names in the order in which they came; a dict is a set that keeps it."""

    made: dict[str, fx.Node] = field(default_factory=dict)
    old: dict[str, None] = field(default_factory=dict)
    new: dict[str, None] = field(default_factory=dict)
    rule: str = ""
    erasing: bool = False


class Journal:
    """The rewrites of one pass."""

    def __init__(self) -> None:
        self._rewrites: list[_Rewrite] = []

    def follow(self, gm: fx.GraphModule) -> None:
        """Hears what happens to the graph of `gm` from now on."""
        follow(gm, self._made, self._replaced, self._erased)

    def leave(self, gm: fx.GraphModule) -> None:
        """Hears no more."""
        leave(gm, self._made, self._replaced, self._erased)

    def take(
        self, before: Collection[str], after: Collection[str]
    ) -> Iterator[tuple[str, list[str], list[str]]]:
        """(rule or "", old nodes, new nodes) of each rewrite since the last call.

        Args:
            before, after: the names in the graph before and after the pass. What was made and erased between
                is left out, and a rewrite of another's result is part of that one.
        """
        rewrites, self._rewrites = self._rewrites, []
        for rewrite in _merged(rewrites):
            old = [name for name in rewrite.old if name in before]
            new = [name for name in (rewrite.made | rewrite.new) if name in after]
            if old or new:
                yield rewrite.rule, old, new

    def _current(self, begins: bool) -> _Rewrite:
        if not self._rewrites or (begins and self._rewrites[-1].erasing):
            self._rewrites.append(_Rewrite())
        return self._rewrites[-1]

    def _made(self, node: fx.Node) -> None:
        self._current(begins=True).made[node.name] = node

    def _replaced(self, old: fx.Node, new: str, user: fx.Node) -> None:
        rewrite = self._current(begins=True)
        rewrite.old[old.name] = rewrite.new[new] = None
        rewrite.rule = old.meta.get("recompile_replaced_by", "")

    def _erased(self, node: fx.Node) -> None:
        rewrite = self._current(begins=False)
        rewrite.old[node.name], rewrite.erasing = None, True


def _merged(rewrites: list[_Rewrite]) -> list[_Rewrite]:
    """Rewrites that replace what an earlier one made become part of it."""
    maker: dict[str, _Rewrite] = {}
    kept: list[_Rewrite] = []
    for rewrite in rewrites:
        into = next((maker[name] for name in rewrite.old if name in maker), None)
        if into is None:
            kept.append(rewrite)
            into = rewrite
        into.made |= rewrite.made
        into.old |= rewrite.old
        into.new |= rewrite.new
        maker |= dict.fromkeys(rewrite.made, into)
    return kept
