"""Rows of boxes: everything a box reads stands above it, and an edge that passes a row has a place in it.

The page's script turns rows into coordinates; it knows which groups are open and how wide a label is.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

from .box import Edge, depths

WIDEST = 12  # boxes in a row
FARTHEST = 6  # rows that an edge runs past; longer ones are drawn as two ends
SWEEPS = 6

Links = Mapping[int, Sequence[int]]


def rows(count: int, edges: Sequence[Edge]) -> list[list[int]]:
    """Rows for `count` boxes, each from left to right; -1 - k is a bend of edge k.

    Raises:
        ValueError: the edges form a cycle.
    """
    level = _levels(count, edges)
    found: list[list[int]] = [[] for _ in range(max(level, default=-1) + 1)]
    for box, at in enumerate(level):
        found[at].append(box)
    for k, (a, b, _) in enumerate(edges):
        if level[b] - level[a] <= FARTHEST:
            for at in range(level[a] + 1, level[b]):
                found[at].append(-1 - k)
    return _untangled([row for row in found if row], edges)


def _levels(count: int, edges: Sequence[Edge]) -> list[int]:
    """A row for each box: below all it reads, at most `WIDEST` in one; boxes that read nothing are pushed down."""
    reads: list[list[int]] = [[] for _ in range(count)]
    read_by: list[list[int]] = [[] for _ in range(count)]
    for a, b, _ in edges:
        reads[b].append(a)
        read_by[a].append(b)
    depth = depths(count, edges)
    level, used = [0] * count, Counter[int]()
    for box in sorted((k for k in range(count) if reads[k]), key=lambda k: (depth[k], k)):
        at = 1 + max(level[a] for a in reads[box])
        while used[at] >= WIDEST:
            at += 1
        level[box], used[at] = at, used[at] + 1
    for box in (k for k in range(count) if not reads[k]):
        at = min((level[b] for b in read_by[box]), default=1) - 1
        while at > 0 and used[at] >= WIDEST:
            at -= 1
        level[box], used[at] = at, used[at] + 1
    return level


def _untangled(found: list[list[int]], edges: Sequence[Edge]) -> list[list[int]]:
    """The rows sorted so that boxes stand near what they are connected with: the sweep with fewest crossings."""
    above, below = _links(found, edges)
    best, fewest = found, _crossings(found, below)
    for sweep in range(SWEEPS):
        if not fewest:
            break
        found = _swept(found, above, below, down=sweep % 2 == 0)
        crossings = _crossings(found, below)
        if crossings < fewest:
            best, fewest = found, crossings
    return best


def _swept(found: list[list[int]], above: Links, below: Links, down: bool) -> list[list[int]]:
    """Every row sorted by its neighbours in the row before it, on the way down or up."""
    last: list[int] = []
    swept: list[list[int]] = []
    for row in found if down else reversed(found):
        last = _near(row, above if down else below, {item: i for i, item in enumerate(last)})
        swept.append(last)
    return swept if down else swept[::-1]


def _crossings(found: list[list[int]], below: Links) -> int:
    """How many pairs of edges between neighbouring rows cross."""
    crossings = 0
    for upper, lower in pairwise(found):
        place = {item: i for i, item in enumerate(lower)}
        ends: list[int] = []
        for item in upper:
            mine = sorted(place[other] for other in below.get(item, ()) if other in place)
            crossings += sum(len(ends) - bisect_right(ends, end) for end in mine)
            ends = sorted(ends + mine)
    return crossings


def _near(row: Sequence[int], links: Links, place: Mapping[int, int]) -> list[int]:
    centre: dict[int, float] = {}
    for i, item in enumerate(row):
        at = [place[other] for other in links.get(item, ()) if other in place]
        centre[item] = sum(at) / len(at) if at else float(i)
    return sorted(row, key=centre.__getitem__)


def _links(
    found: list[list[int]], edges: Sequence[Edge]
) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """What each item of a row is connected with, a row above and a row below."""
    bent = Counter(item for row in found for item in row if item < 0)
    above: dict[int, list[int]] = {}
    below: dict[int, list[int]] = {}
    for k, (a, b, _) in enumerate(edges):
        bend = -1 - k
        chain = [(a, bend), (bend, b)] + [(bend, bend)] * (bent[bend] > 1) if bent[bend] else [(a, b)]
        for upper, lower in chain:
            below.setdefault(upper, []).append(lower)
            above.setdefault(lower, []).append(upper)
    return above, below
