"""Every error that a user can meet: what is wrong, what was expected, what was found, where, what to try."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RecompileError(Exception):
    """Base of all errors of this package.

    The message is one sentence (`what`), then one line for each of the other parts that is known.

    Args:
        what: what is wrong, one sentence.
        expected: what would have been right.
        got: what was found instead.
        where: the user's line, as `recompile.report.user_line` writes it.
        try_: what the user can do about it.
    """

    def __init__(
        self, what: str, *, expected: str = "", got: str = "", where: str = "", try_: str = ""
    ) -> None:
        parts = {"expected": expected, "got": got, "where": where, "try": try_}
        super().__init__("\n".join([what, *(f"  {name}: {text}" for name, text in parts.items() if text)]))
        self.what, self.expected, self.got, self.where, self.try_ = what, expected, got, where, try_


class OptionError(RecompileError, ValueError):
    """An unknown option, pass or pass field, or a value of the wrong type or outside the allowed ones."""


class PassOrderError(RecompileError):
    """The passes' `after` and `before` contradict each other; the message names the cycle."""


class CaptureError(RecompileError):
    """Dynamo's graph cannot be turned into the normalized ATen graph.

    Args:
        why: one sentence.
        node: name of the node in Dynamo's graph, if one is to blame.
        line: the user's line, if known.
    """

    def __init__(self, why: str, node: str = "", line: str = "") -> None:
        super().__init__(why, where=line, got=f"node {node}" if node else "")
        self.why, self.node, self.line = why, node, line


class RegionError(RecompileError):
    """A region operator of a user's own is defined or called wrongly, or its generator fails."""


class StrictError(RecompileError):
    """A graph fell back to plain Inductor, or a pass failed, under `options={"strict": True}`."""


class IndexOutOfRange(RecompileError, IndexError, RuntimeError):
    """An id outside its table.

    Eager raises IndexError from `embedding` and RuntimeError from `embedding_bag`: this is both.
    """


def unknown(kind: str, name: object, allowed: Iterable[str]) -> OptionError:
    """The error for a name that is not one of `allowed`: it names the nearest one and lists them, if few."""
    names = sorted(allowed)
    near = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    listed = names if len(names) <= 40 else near  # Inductor has some 400 settings
    return OptionError(
        f"unknown {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else ""),
        expected="one of " + ", ".join(listed) if listed else "",
    )
