"""What a case is: a model, how its inputs are drawn, and what is wanted of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Inputs = tuple[Any, ...]


@dataclass(frozen=True)
class Problem:
    """A model and a function that draws fresh inputs for it, both on torch's default device.

    `rows`: the float64 reference takes so many samples at a time, 0: all. Each input has a value a sample, and so have
    the parameters named in `split`. `by_norm`: gradients are compared by their norms, not by their largest difference,
    as a unit near 0 is open in one precision and closed in another.
    """

    model: nn.Module
    inputs: Callable[[], Inputs]
    rows: int = 0
    split: tuple[str, ...] = ()
    by_norm: bool = False


@dataclass(frozen=True)
class Variant:
    """A way to compute a case's outputs. `prepare` puts inputs into the form that it takes; it is not timed."""

    call: Callable[..., Any]
    prepare: Callable[[Inputs], Inputs] = lambda inputs: inputs


@dataclass(frozen=True)
class Need:
    """A figure (see `figures.value`) and its target; `at_least` says on which side of it to be."""

    what: str
    target: float
    at_least: bool = True

    def met(self, value: float) -> bool:
        """The figure reaches the target."""
        return value >= self.target if self.at_least else value <= self.target


@dataclass(frozen=True)
class Case:
    """One line of the table.

    `build(scale)` makes it with its sizes times `scale`, at 1 as its name says. `kept` is the part of all pairs that
    its attention does not mask. `rivals` are specialists, made from the model.
    """

    name: str
    group: str
    build: Callable[[float], Problem]
    needs: tuple[Need, ...]
    train: bool = False
    dtype: torch.dtype = torch.float32
    tolerance: float = 1e-4
    kept: float = 1.0
    rivals: Mapping[str, Callable[[nn.Module], Variant]] = field(default_factory=dict)
    quick: bool = False

    def make(self, device: str, scale: float = 1.0) -> Problem:
        """The problem on a device, in the case's dtype."""
        with torch.device(device):
            problem = self.build(scale)
        problem.model.train(self.train).to(self.dtype)

        def inputs() -> Inputs:
            with torch.device(device):
                drawn = problem.inputs()
            cast: Inputs = tree_map_only(Tensor, self._cast, drawn)
            return cast

        return replace(problem, inputs=inputs)

    def _cast(self, x: Tensor) -> Tensor:
        return x.to(self.dtype) if x.is_floating_point() else x


def scaled(size: int, scale: float, least: int = 1) -> int:
    """A size of a smaller case."""
    return max(least, round(size * scale))


def tensors(value: Any) -> list[Tensor]:
    """The tensors in a nest of lists, tuples and dictionaries."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def total_bytes(value: Iterable[Tensor]) -> int:
    """The bytes of several tensors."""
    return sum(x.numel() * x.element_size() for x in value)
