"""RankMixer (Zhu et al., 2025, arXiv:2507.15551): tokens of features, mixed without attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerToken(nn.Module):
    """A feed-forward network for each token, with its own weights: W2_t gelu(W1_t x_t + b1_t) + b2_t."""

    def __init__(self, tokens: int, width: int, factor: int) -> None:
        super().__init__()
        self.w1 = nn.Parameter(torch.randn(tokens, width, factor * width) / width**0.5)
        self.b1 = nn.Parameter(torch.zeros(tokens, factor * width))
        self.w2 = nn.Parameter(torch.randn(tokens, factor * width, width) / (factor * width) ** 0.5)
        self.b2 = nn.Parameter(torch.zeros(tokens, width))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) from the same."""
        hidden = F.gelu(torch.einsum("btd,tdh->bth", x, self.w1) + self.b1)
        return torch.einsum("bth,thd->btd", hidden, self.w2) + self.b2


class Block(nn.Module):
    """s = norm(mix(x) + x); norm(ffn(s) + s)."""

    def __init__(self, tokens: int, width: int, factor: int = 4) -> None:
        super().__init__()
        self.tokens = tokens
        self.ffn = PerToken(tokens, width, factor)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, tokens, width) from the same."""
        mixed: Tensor = self.norms[0](self.mix(x) + x)
        out: Tensor = self.norms[1](self.ffn(mixed) + mixed)
        return out

    def mix(self, x: Tensor) -> Tensor:
        """Each token in as many heads as there are tokens; new token h holds the heads h of all tokens."""
        batch, tokens, width = x.shape
        heads = x.view(batch, tokens, self.tokens, width // self.tokens)
        return heads.transpose(1, 2).reshape(batch, tokens, width)


class RankMixer(nn.Module):
    """All features concatenated and cut into tokens, blocks, the mean of the tokens, a logit."""

    def __init__(
        self,
        tables: Sequence[int],
        numeric: int,
        width: int,
        tokens: int = 16,
        hidden: int = 256,
        blocks: int = 2,
    ) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for rows in tables)
        total = len(tables) * width + numeric
        self.part = -(-total // tokens)
        self.pad = self.part * tokens - total
        self.project = nn.Linear(self.part, hidden)
        self.blocks = nn.Sequential(*(Block(tokens, hidden) for _ in range(blocks)))
        self.head = nn.Linear(hidden, 1)

    def forward(self, numeric: Tensor, ids: Tensor) -> Tensor:
        """Logits (batch, 1) from (batch, numeric) and ids (batch, fields)."""
        features = torch.cat([*(table(ids[:, f]) for f, table in enumerate(self.tables)), numeric], 1)
        tokens = F.pad(features, (0, self.pad)).unflatten(1, (-1, self.part))
        logits: Tensor = self.head(self.blocks(self.project(tokens)).mean(1))
        return logits
