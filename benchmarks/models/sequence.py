"""Models over a user's history: attention over earlier items, then a score for each candidate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recompile.zoo.dlrm import mlp

from .attention import Target


class DIN(nn.Module):
    """A perceptron weighs the history by the candidate (Zhou et al., 2018, arXiv:1706.06978)."""

    def __init__(self, items: int, width: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.unit = Target(width)
        self.top = mlp(2 * width, 200, 80, 1)

    def forward(self, history: Tensor, lengths: Tensor, candidate: Tensor) -> Tensor:
        """Logits (batch, 1) from ids (batch, N), lengths (batch,) and ids (batch,)."""
        target = self.items(candidate)
        user = self.unit(target, self.items(history), lengths)
        logits: Tensor = self.top(torch.cat([user, target], 1))
        return logits


class _Sequence(nn.Module):
    """Item and position embeddings, and heads split and merged."""

    def __init__(self, items: int, width: int, heads: int, longest: int) -> None:
        super().__init__()
        self.items = nn.Embedding(items, width, padding_idx=0)
        self.positions = nn.Embedding(longest, width)
        self.heads = heads

    def embed(self, history: Tensor) -> Tensor:
        """(batch, N, width)."""
        place = torch.arange(history.shape[1], device=history.device)
        rows: Tensor = self.items(history) * math.sqrt(self.items.embedding_dim) + self.positions(place)
        return rows

    def score(self, states: Tensor, candidates: Tensor) -> Tensor:
        """(batch, candidates) by the last state."""
        return torch.einsum("bd,bcd->bc", states[:, -1], self.items(candidates))


def _split(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SASRec(_Sequence):
    """Causal softmax attention and point-wise networks (Kang and McAuley, 2018, arXiv:1808.09781)."""

    def __init__(self, items: int, width: int, heads: int, longest: int, blocks: int = 2) -> None:
        super().__init__(items, width, heads, longest)
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.ffn = nn.ModuleList(mlp(width, width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """(batch, candidates) from ids (batch, N) and ids (batch, candidates)."""
        x = self.embed(history)
        for k, (project, out, ffn) in enumerate(zip(self.project, self.out, self.ffn, strict=True)):
            q, keys, v = (_split(y, self.heads) for y in project(self.norms[2 * k](x)).chunk(3, -1))
            x = x + out(self.attend(q, keys, v).transpose(1, 2).flatten(2))
            x = x + ffn(self.norms[2 * k + 1](x))
        return self.score(x, candidates)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Softmax attention to earlier items, written out."""
        length = q.shape[-2]
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool, device=q.device).triu(1)
        return scores.masked_fill(later, -1e9).softmax(-1) @ v


class HSTU(_Sequence):
    """Pointwise attention, gated (Zhai et al., 2024, arXiv:2402.17152), with a bias by relative position."""

    def __init__(self, items: int, width: int, heads: int, longest: int, blocks: int = 2) -> None:
        super().__init__(items, width, heads, longest)
        self.project = nn.ModuleList(nn.Linear(width, 4 * width) for _ in range(blocks))
        self.out = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks))
        self.bias = nn.Parameter(torch.randn(blocks, 2 * longest - 1) * 0.02)

    def forward(self, history: Tensor, candidates: Tensor) -> Tensor:
        """(batch, candidates) from ids (batch, N) and ids (batch, candidates)."""
        x = self.embed(history)
        for k, (project, out) in enumerate(zip(self.project, self.out, strict=True)):
            u, q, keys, v = F.silu(project(self.norms[2 * k](x))).chunk(4, -1)
            q, keys, v = (_split(y, self.heads) for y in (q, keys, v))
            mixed = self.attend(q, keys, v, self.bias[k]).transpose(1, 2).flatten(2)
            x = x + out(self.norms[2 * k + 1](mixed) * u)
        return self.score(x, candidates)

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        """SiLU of the scores over N, earlier items only."""
        length = q.shape[-2]
        place = torch.arange(length, device=q.device)
        apart = place[None, :] - place[:, None]
        scores = q @ k.transpose(-2, -1) + bias[apart + len(bias) // 2]
        return (F.silu(scores) / length).masked_fill(apart > 0, 0) @ v
