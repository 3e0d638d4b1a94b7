"""Which rewrites this process has made: `rewrite_limit` stops after so many of them, `recompile bisect` finds one."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from recompile.report import user_line


@dataclass(frozen=True)
class Rewrite:
    """One rewrite: its rule, the node it started from, and the user's line ("" where unknown)."""

    rule: str
    node: str = ""
    line: str = ""

    @classmethod
    def at(cls, rule: str, node: fx.Node | None) -> Rewrite:
        """The rewrite of a rule that starts from `node`."""
        return cls(rule) if node is None else cls(rule, node.name, user_line(node))


made: list[Rewrite] = []  # while there is a limit, oldest first; `made.clear()` starts anew
