"""torch-rechub's models on flat features: click prediction and multi-task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch_rechub.basic.features import DenseFeature, SparseFeature
from torch_rechub.models import matching, multi_task, ranking

from .data import NUMERIC, WIDTH, Data, generator, histories, skewed
from .registry import Inputs, recipe

HIDDEN = [256, 128, 64]
_MLP = {"dims": HIDDEN}
_DROPOUT = {"dims": HIDDEN, "dropout": 0.2, "activation": "relu"}
_EXPERT = {"dims": [256, 128]}
_TOWERS = [{"dims": [64]}] * 2
_TASKS = ["classification"] * 2

# Each from (sparse features, dense features).
MODELS: dict[str, Callable[[list[Any], list[Any]], nn.Module]] = {
    "WideDeep": lambda s, d: ranking.WideDeep(d, s, _DROPOUT),
    "DeepFM": lambda s, d: ranking.DeepFM(d + s, s, _DROPOUT),
    "DCN": lambda s, d: ranking.DCN(d + s, 3, _MLP),
    "DCNv2": lambda s, d: ranking.DCNv2(d + s, 3, _MLP, use_low_rank_mixture=False),
    "AutoInt": lambda s, d: ranking.AutoInt(s, d, 3, 2, 0.0, _MLP),
    "FiBiNet": lambda s, d: ranking.FiBiNet(s, _MLP, 3),
    "AFM": lambda s, d: ranking.AFM(s, 16),
    "EDCN": lambda s, d: ranking.EDCN(s, 3, _MLP),
    "MMOE": lambda s, d: multi_task.MMOE(d + s, _TASKS, 8, _EXPERT, _TOWERS),
    "PLE": lambda s, d: multi_task.PLE(d + s, _TASKS, 2, 2, 2, _EXPERT, _TOWERS),
    "SharedBottom": lambda s, d: multi_task.SharedBottom(d + s, _TASKS, _EXPERT, _TOWERS),
    "ESMM": lambda s, d: multi_task.ESMM(s[:13], s[13:], _MLP, _MLP),
    "AITM": lambda s, d: multi_task.AITM(d + s, 2, _EXPERT, _TOWERS),
    "DSSM": lambda s, d: matching.DSSM(s[:13], s[13:], _MLP, _MLP),
}


def inputs(
    sparse: Sequence[Any], dense: Sequence[Any] = (), history: Sequence[tuple[Any, int]] = ()
) -> Inputs:
    """Inputs for features: one dictionary from a field's name to its tensor, batch first."""

    def make(batch: int) -> tuple[dict[str, Tensor]]:
        draw, past = generator(batch), generator(batch, salt=5)
        fields = {f.name: skewed(f.vocab_size, (batch,), draw, low=1) for f in sparse}
        fields |= {f.name: torch.rand(batch, generator=draw) for f in dense}
        fields |= {f.name: histories(f.vocab_size, batch, length, past)[0] for f, length in history}
        return (fields,)

    return make


def _builder(make: Callable[[list[Any], list[Any]], nn.Module]) -> Callable[[Data], tuple[nn.Module, Inputs]]:
    def build(data: Data) -> tuple[nn.Module, Inputs]:
        sparse = [SparseFeature(f"C{i}", rows, WIDTH) for i, rows in enumerate(data.tables)]
        dense = [DenseFeature(f"I{i}") for i in range(NUMERIC)]
        return make(sparse, dense), inputs(sparse, dense)

    return build


for _name, _make in MODELS.items():
    recipe(f"rechub.{_name}", _builder(_make))
