"""Words of sentences for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


def plural(n: int, word: str) -> str:
    """`1 table`, `26 tables`."""
    return f"{n} {word}{'' if n == 1 else 's'}"


def counted(texts: Iterable[str]) -> str:
    """`26 x f32[20, 4], i64[5]`: equal texts once, in the order of the first."""
    return ", ".join(f"{n} x {text}" if n > 1 else text for text, n in Counter(texts).items())
