"""One line of the benchmark table."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Result:
    """A measured `figure` and its target; `at_least` says on which side of it to be.

    `inductor` and `recompile` are in `unit`; NaN where the figure is not a ratio of two measurements.
    """

    name: str
    figure: float
    target: float
    at_least: bool = True
    inductor: float = float("nan")
    recompile: float = float("nan")
    unit: str = "ms"
    spread: float = 0.0

    @property
    def passed(self) -> bool:
        """The figure reaches the target."""
        return self.figure >= self.target if self.at_least else self.figure <= self.target

    def cells(self) -> list[str]:
        """For a table: name, Inductor, recompile, unit, figure, target, spread, PASS or SHORT."""
        sides = ["" if side != side else f"{side:.3f}" for side in (self.inductor, self.recompile)]
        target = f"{'>=' if self.at_least else '<='} {self.target:.2f}"
        verdict = "PASS" if self.passed else "SHORT"
        return [self.name, *sides, self.unit, f"{self.figure:.2f}", target, f"{self.spread:.0%}", verdict]

    def line(self) -> str:
        """For a log, as each case finishes."""
        return "  ".join(self.cells())
