"""Realistic sizes and inputs: 26 tables, 13 numeric fields, popular ids drawn more often."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

WIDTH = 16
NUMERIC = 13
ROWS = (1_000_000,) * 2 + (100_000,) * 6 + (10_000,) * 18  # 2.8M rows in 26 tables


@dataclass(frozen=True)
class Data:
    """Sizes at a given `scale`: tables shrink with it, shapes do not."""

    scale: float = 1.0

    def rows(self, full: int) -> int:
        """The number of rows of a table that has `full` of them at scale 1; never below 20."""
        return max(20, int(full * self.scale))

    @property
    def tables(self) -> tuple[int, ...]:
        """Rows of the 26 tables."""
        return tuple(self.rows(full) for full in ROWS)


def generator(batch: int, salt: int = 0) -> torch.Generator:
    """A generator that depends on the batch size and on `salt` only: inputs are the same in every run."""
    return torch.Generator().manual_seed(7919 * salt + batch)


def skewed(rows: int, shape: tuple[int, ...], draw: torch.Generator | None, low: int = 0) -> Tensor:
    """Ids in `low <= id < rows`, int64, distributed as V*u^3: half of them in the first eighth.

    Without a generator they come from torch's own, on its default device.
    """
    ids = low + torch.rand(shape, generator=draw) ** 3 * (rows - low)
    return ids.long().clamp_(low, rows - 1)


def histories(rows: int, batch: int, length: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Id sequences (batch, length), padded on the right with 0, and their lengths (batch,), at least 5."""
    ids = skewed(rows, (batch, length), draw, low=1)
    lengths = torch.randint(5, length + 1, (batch,), generator=draw)
    return ids * (torch.arange(length) < lengths[:, None]), lengths
