"""Which rewrite changes the numbers: compiles a model with fewer and fewer rewrites until they are eager's again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import compare
from .errors import RecompileError
from .explain import compiling
from .report import PassRecord
from .rewrite.limit import Rewrite, made
from .wording import plural

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Found:
    """What bisecting found.

    `rewrite` is the first one that changes the numbers, the `number`-th of `rewrites`; None if none does. `error` and
    `before` are the largest differences to eager with and without it, relative to the largest magnitude in a tensor.
    `unseen` says what was not searched, "" if nothing.
    """

    rewrite: Rewrite | None
    number: int
    rewrites: int
    error: float
    before: float
    unseen: str = ""

    def __str__(self) -> str:
        if self.rewrite is None:
            whole = f"None of {plural(self.rewrites, 'rewrite')} changes the numbers"
            unseen = f"\n  {self.unseen}" if self.unseen else ""
            return f"{whole if self.rewrites else 'Nothing was rewritten'}: the error is {self.error:.0e}.{unseen}"
        without = f"{self.before:.0e}" if self.before else "none"
        line = f"\n  at {self.rewrite.line}" if self.rewrite.line else ""
        return (
            f"Rewrite {self.number} of {self.rewrites} changes the numbers: {self.rewrite.rule} at node "
            f"{self.rewrite.node}{line}\n  error {self.error:.0e} with it, {without} without"
        )


def bisect(
    model: nn.Module,
    *args: Any,
    options: Mapping[str, object] | None = None,
    train: bool = False,
    tolerance: float = TOLERANCE,
) -> Found:
    """The first rewrite whose result differs from eager by more than `tolerance`, or none.

    The model is compiled about log2 of the number of rewrites times.

    Args:
        options: as for `torch.compile(backend="recompile")`.
        train: compare gradients of all parameters, too. Dropout draws eager's numbers.
        tolerance: relative to the largest magnitude in a tensor.

    Raises:
        RecompileError: the model differs from eager without a single rewrite; the fault lies elsewhere.
    """
    trial = _Trial(model, args, dict(options or {}), train)
    good, bad, at_bad = 0, *trial.rewrites()
    total = bad
    if not at_bad > tolerance:
        return Found(None, 0, total, at_bad, at_bad, trial.unseen())
    at_good = trial.error(0)
    if at_good > tolerance:
        raise RecompileError(
            "the model differs from eager without any rewrite",
            expected=f"an error of at most {tolerance:.0e}",
            got=f"{at_good:.0e}",
            try_='torch.compile(backend="inductor") on the same inputs, or a larger tolerance'
            + trial.uncounted(),
        )
    while bad - good > 1:
        middle = (good + bad) // 2
        error = trial.error(middle)
        if error > tolerance:
            bad, at_bad = middle, error
        else:
            good, at_good = middle, error
    trial.error(bad)
    return Found(made[-1], bad, total, at_bad, at_good)


class _Trial:
    """The model against eager, with some number of rewrites."""

    def __init__(
        self, model: nn.Module, args: Sequence[Any], options: dict[str, object], train: bool
    ) -> None:
        self.model, self.args, self.train = model, tuple(args), train
        inductor: Any = options.pop("inductor", {})
        self.options = {**options, "inductor": {**inductor, "fallback_random": True}}
        self.expected = compare.run(model, model, self.args, grad=train)

    def rewrites(self) -> tuple[int, float]:
        """How many there are, and the error with all of them."""
        error = self.error(1 << 30)
        return len(made), error

    def error(self, limit: int) -> float:
        """The error with the first `limit` rewrites."""
        made.clear()
        torch._dynamo.reset()
        with compiling({**self.options, "rewrite_limit": limit}) as (self.report, backend):
            compiled = torch.compile(self.model, backend=backend)
            found = compare.run(compiled, self.model, self.args, grad=self.train)
        return compare.error(found, self.expected)

    def unseen(self) -> str:
        """What the last error does not tell of, in a sentence."""
        refused = [refusal for each in self._passes() for rule in each.rules for refusal in rule.refused]
        left = any("fallback_random" in refusal.why for refusal in refused)
        return (
            "Dropout draws eager's numbers here, so attention with dropout was not rewritten." if left else ""
        )

    def uncounted(self) -> str:
        """Which passes changed the graph with no rewrite allowed, as something to try."""
        changed = [
            each.name
            for each in self._passes()
            if each.nodes_before != each.nodes_after or any(rule.fired for rule in each.rules)
        ]
        names = ", ".join(dict.fromkeys(changed))
        return f"; or without what never calls ctx.begin, and so is not counted: {names}" if names else ""

    def _passes(self) -> list[PassRecord]:
        return [each for graph in self.report.graphs for each in graph.passes]
