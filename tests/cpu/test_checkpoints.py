"""Attention in activation checkpoints (`torch.utils.checkpoint`): fused, and computed again by the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recompile.report import collect


class Encoder(nn.Module):
    """Attention over looked-up rows, in a checkpoint if `saving`."""

    def __init__(self, saving: bool) -> None:
        super().__init__()
        self.saving = saving
        self.table, self.layer = nn.Embedding(50, 16), nn.Linear(16, 48)

    def attention(self, x: Tensor) -> Tensor:
        q, k, v = self.layer(x).chunk(3, -1)
        weights = F.dropout((q @ k.mT / 4).softmax(-1), 0.3)
        return x + F.dropout(weights @ v, 0.2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids).sin()
        x = checkpoint(self.attention, x, use_reentrant=False) if self.saving else self.attention(x)
        return x.mean(1)


def trained(saving: bool) -> tuple[list[Tensor], int]:
    """The output and the gradients, and how many elements the forward keeps for the backward beside parameters."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, kept = Encoder(saving), []
    with (
        collect() as report,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
    ):
        out = torch.compile(model, backend="recompile", options={"strict": True})(
            torch.arange(24).view(2, 12)
        )
    assert [region.op for graph in report.graphs for region in graph.regions] == [
        "recompile.attention.default"
    ]
    out.square().sum().backward()
    own = {p.data_ptr() for p in model.parameters()}
    found = [out.detach(), *(p.grad for p in model.parameters())]
    return found, sum(t.numel() for t in kept if t.data_ptr() not in own)


def test_attention_is_fused_and_computed_again_with_the_same_dropout() -> None:
    plain, more = trained(False)
    saving, less = trained(True)
    torch.testing.assert_close(saving, plain)
    assert less < more / 2
