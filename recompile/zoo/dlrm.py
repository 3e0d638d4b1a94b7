"""DLRM (Naumov et al., 2019, arXiv:1906.00091), written on EmbeddingBags: several ids a field."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from .data import NUMERIC, WIDTH, Data, generator, skewed
from .registry import Inputs, recipe

IDS_PER_BAG = 5


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with a ReLU after each of them but the last."""
    layers: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DLRM(nn.Module):
    """Bags and numeric fields, their pairwise dot products, an MLP."""

    def __init__(self, tables: tuple[int, ...], numeric: int = NUMERIC, width: int = WIDTH) -> None:
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(rows, width, mode="sum") for rows in tables)
        self.bottom = mlp(numeric, 128, 64, width)
        fields = len(tables) + 1
        self.top = mlp(width + fields * (fields - 1) // 2, 256, 128, 1)
        self.register_buffer("pairs", torch.tril_indices(fields, fields, offset=-1), persistent=False)
        self.pairs: Tensor

    def forward(self, numeric: Tensor, ids: list[Tensor], offsets: list[Tensor]) -> Tensor:
        """Click logits (batch, 1) from numeric (batch, 13) and, for each table, flat ids and bag offsets."""
        dense = self.bottom(numeric)
        pooled = [bag(i, o) for bag, i, o in zip(self.bags, ids, offsets, strict=True)]
        fields = torch.stack([dense, *pooled], dim=1)
        products = torch.bmm(fields, fields.transpose(1, 2))
        interactions = products[:, self.pairs[0], self.pairs[1]]
        logits: Tensor = self.top(torch.cat([dense, interactions], dim=1))
        return logits


def _inputs(tables: tuple[int, ...]) -> Inputs:
    def inputs(batch: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        draw = generator(batch)
        numeric = torch.rand(batch, NUMERIC, generator=draw)
        ids = [skewed(rows, (batch * IDS_PER_BAG,), draw) for rows in tables]
        return numeric, ids, [torch.arange(0, batch * IDS_PER_BAG, IDS_PER_BAG) for _ in tables]

    return inputs


def _dlrm(data: Data) -> tuple[nn.Module, Inputs]:
    return DLRM(data.tables), _inputs(data.tables)


recipe("own.DLRM", _dlrm)
