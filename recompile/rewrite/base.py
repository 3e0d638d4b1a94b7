"""Passes, their refusals, and what they report to."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

from torch import fx

from recompile.graph.nodes import input_name
from recompile.options import Options
from recompile.report import Refusal, RuleRecord, user_line
from recompile.rewrite.limit import Rewrite, made
from recompile.wording import plural


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
    """What a pass is given beside the graph: the user's options, and the record it writes to.

    `account` takes down what was replaced by what. It is called after a pass, and by a pass whose rewrites read each
    other's results, after each: otherwise they would share what all of them replace.
    """

    options: Options = field(default_factory=Options)
    rules: dict[str, RuleRecord] = field(default_factory=dict)
    account: Callable[[fx.Graph], None] = lambda graph: None
    _rewrite: Rewrite | None = None

    def rule(self, name: str) -> RuleRecord:
        """The record of a rule, made on first use (so that a rule that never fires is still listed)."""
        return self.rules.setdefault(name, RuleRecord(name))

    def tried(self, name: str, n: int = 1) -> None:
        """Counts `n` candidates that the rule looked at."""
        self.rule(name).tried += n

    def begin(self, name: str, at: fx.Node) -> None:
        """Announces a rewrite that starts from the node `at`, before anything is changed; `fired` completes it.

        Raises:
            Refuse: as many rewrites were made as the option `rewrite_limit` allows.
        """
        limit = self.options.rewrite_limit
        if 0 <= limit <= len(made):
            raise Refuse(f"the option rewrite_limit allows {plural(limit, 'rewrite')}", at)
        self._rewrite = Rewrite.at(name, at) if limit >= 0 else None

    def fired(self, name: str, n: int = 1) -> None:
        """Counts `n` candidates as rewritten, by one rewrite."""
        self.rule(name).fired += n
        if self._rewrite is not None:
            made.append(self._rewrite)
            self._rewrite = None

    def refuse(self, name: str, why: str, at: fx.Node | None = None) -> None:
        """Records why the rule left a candidate alone; the graph's inputs are called as the model calls them."""
        refused = self.rule(name).refused
        refused.append(
            Refusal(_spoken(why, at.graph), at.name, user_line(at)) if at is not None else Refusal(why)
        )


def _spoken(why: str, graph: fx.Graph) -> str:
    """`why`, with `self.top.weight` for `l_self_modules_top_parameters_weight_`."""
    if "l_" not in why:
        return why
    names = {node.name: input_name(node) for node in graph.find_nodes(op="placeholder")}
    return re.sub(r"\bl_\w+", lambda found: names.get(found[0], found[0]), why)


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
