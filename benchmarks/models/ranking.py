"""Ranking models over one id a field and numeric features, as papers and tutorials write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from recompile.zoo.dlrm import mlp


class _Fields(nn.Module):
    """An embedding table a field."""

    def __init__(self, tables: Sequence[int], width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in tables)

    def embed(self, ids: Tensor) -> Tensor:
        """(batch, fields, width) from ids (batch, fields)."""
        return torch.stack([table(ids[:, f]) for f, table in enumerate(self.tables)], 1)


class DLRM(_Fields):
    """Dot products of all pairs of fields (Naumov et al., 2019, arXiv:1906.00091), with one id a field."""

    def __init__(self, tables: Sequence[int], numeric: int, width: int) -> None:
        super().__init__(tables, width)
        self.bottom = mlp(numeric, 512, 256, width)
        fields = len(tables) + 1
        self.top = mlp(width + fields * (fields - 1) // 2, 512, 256, 1)
        self.register_buffer("pairs", torch.tril_indices(fields, fields, offset=-1), persistent=False)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, 1) from (batch, numeric) and ids (batch, fields)."""
        dense = self.bottom(numeric)
        fields = torch.cat([dense[:, None], self.embed(ids)], 1)
        products = torch.bmm(fields, fields.transpose(1, 2))
        pairs = products[:, self.pairs[0], self.pairs[1]]
        logits: Tensor = self.top(torch.cat([dense, pairs], 1))
        return logits


class DeepFM(_Fields):
    """A factorization machine beside an MLP (Guo et al., 2017, arXiv:1703.04247)."""

    def __init__(self, tables: Sequence[int], numeric: int, width: int) -> None:
        super().__init__(tables, width)
        self.weights = nn.ModuleList(nn.Embedding(rows, 1) for rows in tables)
        self.deep = mlp(len(tables) * width + numeric, 400, 400, 400, 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, 1) from (batch, numeric) and ids (batch, fields)."""
        fields = self.embed(ids)
        first = torch.cat([table(ids[:, f]) for f, table in enumerate(self.weights)], 1).sum(1, keepdim=True)
        second = 0.5 * (fields.sum(1).pow(2) - fields.pow(2).sum(1)).sum(1, keepdim=True)
        logits: Tensor = first + second + self.deep(torch.cat([fields.flatten(1), numeric], 1))
        return logits


class DCNv2(_Fields):
    """Cross layers with full matrices, then an MLP (Wang et al., 2020, arXiv:2008.13535)."""

    def __init__(self, tables: Sequence[int], numeric: int, width: int, layers: int = 3) -> None:
        super().__init__(tables, width)
        total = len(tables) * width + numeric
        self.cross = nn.ModuleList(nn.Linear(total, total) for _ in range(layers))
        self.deep = mlp(total, 512, 256, 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, 1) from (batch, numeric) and ids (batch, fields)."""
        start = torch.cat([self.embed(ids).flatten(1), numeric], 1)
        x = start
        for layer in self.cross:
            x = start * layer(x) + x
        logits: Tensor = self.deep(x)
        return logits


class MMoE(_Fields):
    """Experts that all tasks share, mixed by a gate a task (Ma et al., 2018)."""

    def __init__(
        self, tables: Sequence[int], numeric: int, width: int, experts: int = 8, tasks: int = 2
    ) -> None:
        super().__init__(tables, width)
        total = len(tables) * width + numeric
        self.experts = nn.ModuleList(mlp(total, 256, 128) for _ in range(experts))
        self.gates = nn.ModuleList(nn.Linear(total, experts) for _ in range(tasks))
        self.towers = nn.ModuleList(mlp(128, 64, 1) for _ in range(tasks))

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, tasks) from (batch, numeric) and ids (batch, fields)."""
        x = torch.cat([self.embed(ids).flatten(1), numeric], 1)
        found = torch.stack([torch.relu(expert(x)) for expert in self.experts], 1)
        mixed = [(gate(x).softmax(-1)[..., None] * found).sum(1) for gate in self.gates]
        return torch.cat([tower(m) for tower, m in zip(self.towers, mixed, strict=True)], 1)
