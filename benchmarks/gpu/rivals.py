"""Specialists to measure against, each where its package is present; they share the model's parameters."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.models.attention import Causal, Relative, Window
from benchmarks.models.lookups import Mixed

from .case import Inputs, Variant


def fbgemm(model: nn.Module) -> Variant:
    """FBGEMM's table-batched lookup over copies of the model's tables; ids are laid out for it beforehand.

    Raises:
        ImportError: fbgemm_gpu is not installed.
    """
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    assert isinstance(model, Mixed)
    weights = [table.weight.detach() for table in model.tables]
    specs = [(*w.shape, EmbeddingLocation.DEVICE, ComputeDevice.CUDA) for w in weights]
    batched = SplitTableBatchedEmbeddingBagsCodegen(specs)  # its pooling is a sum unless said
    for own, weight in zip(batched.split_embedding_weights(), weights, strict=True):
        own.copy_(weight)

    def prepare(inputs: Inputs) -> Inputs:
        ids: list[Tensor] = inputs[0]
        counts = torch.cat([torch.full((len(x),), x[0].numel(), device=x.device) for x in ids])
        offsets = F.pad(counts.cumsum(0), (1, 0))
        return torch.cat([x.flatten() for x in ids]), offsets

    return Variant(batched, prepare)


def flash(model: nn.Module) -> Variant:
    """`scaled_dot_product_attention`, its flash kernel and no other."""
    assert isinstance(model, Causal)

    def call() -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(model.q, model.k, model.v, is_causal=True)
        return out.transpose(1, 2).flatten(2)

    return Variant(call)


def flex(model: nn.Module) -> Variant:
    """FlexAttention, compiled, with the model's mask as a block mask and its bias as a score function.

    Raises:
        ImportError: this torch has none.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    assert isinstance(model, Causal | Window | Relative)
    batch, _, length, width = model.q.shape
    compiled = torch.compile(flex_attention, dynamic=False)
    bias = model.bias if isinstance(model, Relative) else None

    def keep(lengths: Tensor | None) -> Callable[..., Tensor]:
        def kept(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            mask = j <= i
            if isinstance(model, Window):
                mask = mask & (i - j < model.window)
            return mask if lengths is None else mask & (j < lengths[b])

        return kept

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[h, (i - j).clamp(min=0)]

    def prepare(inputs: Inputs) -> Inputs:
        lengths = inputs[0] if inputs else None
        rows = None if lengths is None else batch
        return (create_block_mask(keep(lengths), rows, None, length, length, device=model.q.device),)

    def call(mask: object) -> Tensor:
        out = compiled(
            model.q,
            model.k,
            model.v,
            score_mod=None if bias is None else biased,
            block_mask=mask,
            scale=1 / math.sqrt(width),
        )
        return out.transpose(1, 2).flatten(2) if isinstance(model, Causal) else out

    return Variant(call, prepare)
