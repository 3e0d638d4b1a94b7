"""What differs between two stages of a graph, as blocks of lines."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

Block = tuple[int, int, int, int]


def blocks(before: Sequence[int], after: Sequence[int]) -> list[Block]:
    """The differences as `(a0, a1, b0, b1)`: `before[a0:a1]` became `after[b0:b1]`; the fewest lines possible.

    A value stands at most once in each sequence. Then the longest common subsequence is the longest
    increasing one of positions, found in n log n steps, where a general diff may take n squared.
    """
    place = {value: i for i, value in enumerate(before)}
    common = _increasing([(place[value], j) for j, value in enumerate(after) if value in place])
    found: list[Block] = []
    a0 = b0 = 0
    for a, b in [*common, (len(before), len(after))]:
        if a > a0 or b > b0:
            found.append((a0, a, b0, b))
        a0, b0 = a + 1, b + 1
    return found


def _increasing(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest run of `pairs`, in order, whose first numbers increase."""
    ends: list[int] = []  # the smallest first number that ends an increasing run of each length
    at: list[int] = []  # which pair that is
    previous: list[int] = []
    for k, (first, _) in enumerate(pairs):
        length = bisect_left(ends, first)
        ends[length : length + 1] = [first]
        at[length : length + 1] = [k]
        previous.append(at[length - 1] if length else -1)
    chain: list[tuple[int, int]] = []
    k = at[-1] if at else -1
    while k >= 0:
        chain.append(pairs[k])
        k = previous[k]
    return chain[::-1]
