"""Which memory is under a graph's values: what it writes to its inputs, and which of its outputs share memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

from torch import fx
from torch.utils._pytree import tree_leaves

from .rewrite.effects import is_pure, storages, writes_to

_INPUTS = ("placeholder", "get_attr")
Owner = tuple[fx.Node, int]  # the node that had a memory first, and the memory's identity there


class Memory:
    """The memory under each node's value, by who had it first.

    A node has the memory of those of its arguments whose values share storage with its own; any other is new.

    Args:
        before: the same of an earlier form of the graph.
        twins: by node of the graph its node there. A view that a pass gave another argument and left its value as
            it was is a view of that argument.
    """

    def __init__(
        self, graph: fx.Graph, before: Memory | None = None, twins: Mapping[fx.Node, fx.Node] | None = None
    ) -> None:
        self._before, self._twins = before, twins or {}
        self._owners: dict[fx.Node, dict[int, Owner]] = {}
        self._inputs: dict[int, Owner] = {}
        # By the name of an input, the nodes that write to it.
        self.writers: dict[str, list[fx.Node]] = defaultdict(list)
        for node in graph.nodes:
            self._owners[node] = self._owners_of(node)
            if not is_pure(node):
                self._note_writes(node)
        # For each output, the inputs and the earlier outputs that it shares memory with.
        self.shared = self._shared(graph.output_node())

    def is_view(self, node: fx.Node) -> bool:
        """Whether the value of `node` lies in memory of another node's."""
        return any(owner is not node for owner, _ in self._owners[node].values())

    def _owners_of(self, node: fx.Node) -> dict[int, Owner]:
        mine = set(storages(node))
        if node.op in _INPUTS:
            return {s: self._inputs.setdefault(s, (node, s)) for s in mine}
        given: dict[int, Owner] = {}
        for arg in node.all_input_nodes:
            given.update(self._owners[arg])
        if given and mine.isdisjoint(given) and self._is_stale_view(node):
            return dict.fromkeys(mine, next(iter(given.values())))
        return {s: given.get(s, (node, s)) for s in mine}

    def _is_stale_view(self, node: fx.Node) -> bool:
        twin = self._twins.get(node)
        return (
            twin is not None
            and self._before is not None
            and self._before.is_view(twin)
            and node.meta.get("val") is twin.meta.get("val")
        )

    def _note_writes(self, node: fx.Node) -> None:
        written = [arg for arg in tree_leaves(writes_to(node)) if isinstance(arg, fx.Node)]
        owners = {owner for arg in written for owner in self._owners[arg].values()}
        for name in {_name(owner) for owner in owners if owner[0].op in _INPUTS}:
            self.writers[name].append(node)

    def _shared(self, output: fx.Node) -> list[list[str]]:
        known = {owner: _name(owner) for owner in self._inputs.values()}
        shared = []
        for i, out in enumerate(tree_leaves(output.args[0])):
            owners = set(self._owners[out].values()) if isinstance(out, fx.Node) else set()
            shared.append(sorted({known[owner] for owner in owners if owner in known}))
            for owner in owners:
                known.setdefault(owner, f"output {i}")
        return shared


def _name(owner: Owner) -> str:
    node, _ = owner  # of several that read one attribute a pass may drop the first
    return f"input {node.target if node.op == 'get_attr' else node.name}"
