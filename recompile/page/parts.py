"""Nodes by the name of their group, so that no groups read each other in a cycle: then they can be laid out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence

import networkx as nx

Named = tuple[str, str]  # kind and label of a group
Part = tuple[Named | int, ...]  # a group, and which of its calls
Reads = Mapping[int, Sequence[int]]


def divided(
    names: dict[int, Named], reads: Reads, element: Callable[[int, Named], Named]
) -> list[tuple[Named, list[int]]]:
    """The nodes of each name; a name has several parts where one would be in a cycle.

    Source lines are split first: a line in a loop stands between the modules that it calls. Then a list of
    modules becomes its elements. What is still in a cycle is split into its calls: a module called twice.

    Args:
        names: the name of each node's group, in the graph's order.
        reads: what each node reads, by index.
        element: a longer name for a node of a list of modules, the same for others.
    """
    parts: dict[int, Part] = {i: (name,) for i, name in names.items()}
    if _cycles(parts, reads):
        _split(parts, reads, lambda i: names[i][0] == "line")
        cycles = _cycles(parts, reads)
        names = {i: element(i, name) if parts[i] in cycles else name for i, name in names.items()}
        parts = {i: (names[i], *part[1:]) for i, part in parts.items()}
        _split(parts, reads, lambda i: True)
    found: dict[Part, list[int]] = defaultdict(list)
    for i, part in parts.items():
        found[part].append(i)
    return [(names[inside[0]], inside) for inside in found.values()]


def _split(parts: dict[int, Part], reads: Reads, splits: Callable[[int], bool]) -> None:
    """Divides parts that are in a cycle into their calls, of those nodes for which `splits` holds."""
    calls = _calls(parts, reads, _cycles(parts, reads))
    parts |= {i: (*parts[i], call) for i, call in calls.items() if splits(i)}


def _cycles(parts: Mapping[int, Part], reads: Reads) -> dict[Part, int]:
    """The number of the cycle of each part that is in one."""
    if len(set(parts.values())) == len(parts):
        return {}
    reading = nx.DiGraph()
    reading.add_edges_from((parts[r], parts[i]) for i in parts for r in reads[i] if r in parts)
    components = enumerate(nx.strongly_connected_components(reading))
    return {part: k for k, component in components if len(component) > 1 for part in component}


def _calls(parts: Mapping[int, Part], reads: Reads, cycles: Mapping[Part, int]) -> dict[int, int]:
    """For each node in a cycle, how often the way to it changes the part: the same number, the same call."""
    calls: dict[int, int] = {}
    for i, part in parts.items():
        if part not in cycles:
            continue
        before = [r for r in reads[i] if r in calls and cycles[parts[r]] == cycles[part]]
        calls[i] = max((calls[r] + (parts[r] != part) for r in before), default=0)
    return calls
