"""Attention as recommendation models write it, on its own; queries, keys and values are parameters."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _Attention(nn.Module):
    def __init__(self, batch: int, length: int, heads: int, width: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(batch, heads, length, width) * 0.5) for _ in range(3)
        )


class Hstu(nn.Module):
    """HSTU's pointwise attention (research form): SiLU of scores with a position and a time bias, over N.

    Zhai et al., "Actions Speak Louder than Words" (2024), section 3.2; the bias as in its published code: a table
    of relative positions and a table of log-bucketized time differences, shared by all heads.
    """

    def __init__(self, batch: int, length: int, heads: int, width: int, buckets: int = 128) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Parameter(torch.randn(batch, length, heads, width) * 0.5) for _ in range(3)
        )
        self.positions = nn.Parameter(torch.randn(2 * length - 1) * 0.1)
        self.times = nn.Parameter(torch.randn(buckets + 1) * 0.1)
        self.buckets = buckets

    def forward(self, stamps: Tensor) -> Tensor:
        """(batch, N, heads * width) from the times of the items and of the next one, (batch, N + 1), seconds."""
        batch, length, heads, width = self.q.shape
        apart = (stamps[:, 1:, None] - stamps[:, None, :-1]).abs().clamp(min=1)
        bucket = (torch.log(apart.float()) / 0.301).long().clamp(min=0, max=self.buckets)
        bias = self.distances() + self.times[bucket]
        scores = torch.einsum("bnhd,bmhd->bhnm", self.q, self.k) + bias[:, None]
        weights = F.silu(scores) / length * self.earlier()
        out: Tensor = torch.einsum("bhnm,bmhd->bnhd", weights, self.v).reshape(batch, length, heads * width)
        return out

    def distances(self) -> Tensor:
        """The bias of positions, (N, N) or (1, N, N)."""
        length = self.q.shape[1]
        place = torch.arange(length, device=self.q.device)
        return self.positions[place[None, :] - place[:, None] + length - 1]

    def earlier(self) -> Tensor:
        """1 where a key is no later than the query, (N, N)."""
        length = self.q.shape[1]
        return torch.tril(torch.ones(length, length, dtype=self.q.dtype, device=self.q.device))


class PublishedHstu(Hstu):
    """The same in the spelling of its published code: positions by a pad and a repeat, the mask a buffer."""

    def __init__(self, batch: int, length: int, heads: int, width: int) -> None:
        super().__init__(batch, length, heads, width)
        self.register_buffer("later", torch.ones(length, length, dtype=torch.bool).triu(1))

    def distances(self) -> Tensor:
        length = self.q.shape[1]
        rows = F.pad(self.positions, [0, length]).repeat(length)[..., :-length]
        reach = length - 1
        return rows.reshape(1, length, 3 * length - 2)[:, :, reach:-reach]

    def earlier(self) -> Tensor:
        return 1.0 - self.later.to(self.q.dtype)


class Causal(_Attention):
    """SASRec's: softmax, later items filled with -1e9; with `lengths`, padding too."""

    def forward(self, lengths: Tensor | None = None) -> Tensor:
        """(batch, N, heads * width)."""
        batch, heads, length, width = self.q.shape
        scores = self.q @ self.k.transpose(-2, -1) / math.sqrt(width)
        mask = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril()[None, None]
        if lengths is not None:
            mask = mask & (torch.arange(length, device=scores.device) < lengths[:, None])[:, None, None]
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return (weights @ self.v).transpose(1, 2).reshape(batch, length, heads * width)


class Window(_Attention):
    """Causal softmax attention to the last `window` items."""

    def __init__(self, batch: int, length: int, heads: int, width: int, window: int = 128) -> None:
        super().__init__(batch, length, heads, width)
        self.window = window

    def forward(self) -> Tensor:
        """(batch, heads, N, width)."""
        length, width = self.q.shape[2:]
        place = torch.arange(length, device=self.q.device)
        i, j = place[:, None], place[None, :]
        mask = (j <= i) & (i - j < self.window)
        scores = self.q @ self.k.transpose(-2, -1) / math.sqrt(width)
        return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ self.v


class Relative(_Attention):
    """Causal softmax attention with a learned bias a head and distance, as T5's without its buckets."""

    def __init__(self, batch: int, length: int, heads: int, width: int) -> None:
        super().__init__(batch, length, heads, width)
        self.bias = nn.Parameter(torch.randn(heads, length) * 0.1)

    def forward(self) -> Tensor:
        """(batch, heads, N, width)."""
        length, width = self.q.shape[2:]
        place = torch.arange(length, device=self.q.device)
        back = place[:, None] - place[None, :]
        scores = self.q @ self.k.transpose(-2, -1) / math.sqrt(width) + self.bias[:, back.clamp(min=0)]
        return scores.masked_fill(back < 0, float("-inf")).softmax(-1) @ self.v


class Fields(nn.Module):
    """AutoInt's interacting layer: attention of the fields of a sample to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.r = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, fields, width) from the same."""
        batch, fields, width = x.shape
        q, k, v = (
            layer(x).view(batch, fields, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.q, self.k, self.v)
        )
        weights = torch.softmax(q @ k.transpose(-2, -1), -1)
        out = (weights @ v).transpose(1, 2).reshape(batch, fields, width)
        return F.relu(out + self.r(x))


class Target(nn.Module):
    """DIN's attention: a perceptron scores each item of the history against the candidate."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Sequential(
            nn.Linear(4 * width, 80), nn.Sigmoid(), nn.Linear(80, 40), nn.Sigmoid(), nn.Linear(40, 1)
        )

    def forward(self, target: Tensor, history: Tensor, lengths: Tensor) -> Tensor:
        """(batch, width) from (batch, width), (batch, N, width) and (batch,)."""
        length = history.shape[1]
        query = target[:, None].expand(-1, length, -1)
        pairs = torch.cat([query, history, query - history, query * history], -1)
        scores = self.score(pairs).squeeze(-1)
        mask = torch.arange(length, device=lengths.device) < lengths[:, None]
        weights = scores.masked_fill(~mask, -1e9).softmax(-1)
        return (weights[:, None] @ history).squeeze(1)
