"""Passes, their refusals, and what they report to."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from recompile.options import Options
from recompile.report import Refusal, RuleRecord, user_line


class Refuse(Exception):
    """Raised by a rule that does not fire.

    Args:
        why: one sentence for the user.
        at: the node that is to blame.
    """

    def __init__(self, why: str, at: fx.Node | None = None) -> None:
        super().__init__(why)
        self.why, self.at = why, at


@dataclass
class Context:
    """What a pass is given beside the graph: the user's options, and the record it writes to."""

    options: Options = field(default_factory=Options)
    rules: dict[str, RuleRecord] = field(default_factory=dict)

    def rule(self, name: str) -> RuleRecord:
        """The record of a rule, made on first use (so that a rule that never fires is still listed)."""
        return self.rules.setdefault(name, RuleRecord(name))

    def tried(self, name: str, n: int = 1) -> None:
        """Counts `n` candidates that the rule looked at."""
        self.rule(name).tried += n

    def fired(self, name: str, n: int = 1) -> None:
        """Counts `n` rewrites."""
        self.rule(name).fired += n

    def refuse(self, name: str, why: str, at: fx.Node | None = None) -> None:
        """Records why the rule left a candidate alone."""
        line = user_line(at) if at is not None else ""
        self.rule(name).refused.append(Refusal(why, at.name if at is not None else "", line))


@dataclass(frozen=True)
class Pass:
    """One rewrite of a graph. Subclasses are frozen dataclasses: their fields are the pass's options."""

    numerics: ClassVar[str] = "reassociate"  # "exact", "reassociate" or "fast": how far results may differ
    after: ClassVar[tuple[str, ...]] = ()
    before: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def name(cls) -> str:
        """The pass's name in options and reports: `FuseLookups` is `fuse-lookups`."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        """Rewrites `graph` in place. Nodes it adds carry `meta["val"]`."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")
