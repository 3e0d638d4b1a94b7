"""Small models, one per pattern of lookups: 26 tables, width 16 unless said."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

TABLES, WIDTH = 26, 16


def _tables(kind: type[nn.Module], rows: int, width: int, count: int = TABLES, **kw: Any) -> nn.ModuleList:
    return nn.ModuleList(kind(rows, width, **kw) for _ in range(count))


class Bags(nn.Module):
    """`EmbeddingBag(sum)` a field, concatenated."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.bags = _tables(nn.EmbeddingBag, rows, WIDTH, mode="sum")

    def forward(self, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """(batch, 26*16) from flat ids and offsets, one of each a table."""
        return torch.cat([bag(i, o) for bag, i, o in zip(self.bags, ids, offsets, strict=True)], 1)


class MaskedMeans(nn.Module):
    """A mean over the ids that are not 0, written by hand."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = _tables(nn.Embedding, rows, WIDTH, padding_idx=0)

    def forward(self, ids: list[Tensor]) -> Tensor:
        """(batch, 26*16) from ids (batch, length), one a table."""
        return torch.cat([self.mean(t, i) for t, i in zip(self.tables, ids, strict=True)], 1)

    @staticmethod
    def mean(table: nn.Module, ids: Tensor) -> Tensor:
        """The masked mean of one field."""
        mask = (ids != 0).unsqueeze(-1).float()
        mean: Tensor = (table(ids) * mask).sum(1) / (mask.sum(1) + 1e-16)
        return mean


class Sums(nn.Module):
    """Gather and sum, width 64."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = _tables(nn.Embedding, rows, 64)

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, 26*64) from ids (batch, 26, length)."""
        return torch.cat([table(ids[:, f]).sum(1) for f, table in enumerate(self.tables)], 1)


class OneHot(nn.Module):
    """One id a field, concatenated; with `out`, a linear layer on top."""

    def __init__(self, rows: int, count: int = TABLES, out: int = 0) -> None:
        super().__init__()
        self.tables = _tables(nn.Embedding, rows, WIDTH, count)
        self.top = nn.Linear(count * WIDTH, out) if out else nn.Identity()

    def forward(self, ids: Tensor) -> Tensor:
        """(batch, fields*16 or out) from ids (batch, fields)."""
        flat = torch.cat([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)
        out: Tensor = self.top(flat)
        return out


class FirstStage(nn.Module):
    """DeepFM's first stage: embeddings, first-order weights, the factorization machine term."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.tables = _tables(nn.Embedding, rows, WIDTH)
        self.weights = _tables(nn.Embedding, rows, 1)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Flat embeddings (batch, 26*16) and a logit (batch, 1) from ids (batch, 26)."""
        fields = torch.stack([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)
        first = torch.cat([table(ids[:, f]) for f, table in enumerate(self.weights)], 1).sum(1, keepdim=True)
        second = 0.5 * (fields.sum(1).pow(2) - fields.pow(2).sum(1)).sum(1, keepdim=True)
        return fields.flatten(1), first + second


class Mixed(nn.Module):
    """Fields of any (rows, width, ids a sample), one table each, several ids summed; all concatenated."""

    def __init__(self, fields: Sequence[tuple[int, int, int]]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(rows, width) if ids == 1 else nn.EmbeddingBag(rows, width, mode="sum")
            for rows, width, ids in fields
        )

    def forward(self, ids: list[Tensor]) -> Tensor:
        """(batch, all widths) from ids (batch,) or (batch, ids a sample), one tensor a field."""
        return torch.cat([table(x) for table, x in zip(self.tables, ids, strict=True)], 1)
