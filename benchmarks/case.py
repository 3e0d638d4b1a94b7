"""What a case is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

Built = tuple[nn.Module, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """`build(batch)` gives model and inputs; recompile is to be `target` times as fast as Inductor."""

    name: str
    batch: int
    target: float
    build: Callable[[int], Built]
    train: bool = False
