"""Words of sentences for people."""

from __future__ import annotations


def plural(n: int, word: str) -> str:
    """`1 table`, `26 tables`."""
    return f"{n} {word}{'' if n == 1 else 's'}"
