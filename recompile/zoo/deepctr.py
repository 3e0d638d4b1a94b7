"""deepctr-torch's models. They take one float matrix; ids are its columns, cast inside the model."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .data import NUMERIC, ROWS, WIDTH, Data, generator, histories, skewed
from .registry import Inputs, recipe

# The package looks its newest version up on the network when imported: it gets a `utils` that does not.
_offline: Any = types.ModuleType("deepctr_torch.utils")
_offline.check_version = lambda version: None
sys.modules.setdefault("deepctr_torch.utils", _offline)

from deepctr_torch import models  # noqa: E402
from deepctr_torch.inputs import (  # noqa: E402
    DenseFeat,
    SparseFeat,
    VarLenSparseFeat,
    build_input_features,
)
from deepctr_torch.models import multitask  # noqa: E402

_DNN = {"dnn_hidden_units": (256, 128, 64)}
_TWO_TASKS = {"task_types": ["binary"] * 2, "task_names": ["click", "buy"]}


def _sparse(columns: list[Any]) -> list[Any]:
    return [c for c in columns if isinstance(c, SparseFeat)]


# Each from its columns.
MODELS: dict[str, Callable[[list[Any]], nn.Module]] = {
    "WDL": lambda c: models.WDL(c, c, **_DNN),
    "DeepFM": lambda c: models.DeepFM(c, c, **_DNN),
    "xDeepFM": lambda c: models.xDeepFM(c, c, cin_layer_size=(64, 32), **_DNN),
    "DCN": lambda c: models.DCN(c, c, cross_num=3, **_DNN),
    "DCNv2": lambda c: models.DCN(c, c, cross_num=3, cross_parameterization="matrix", **_DNN),
    "DCNMix": lambda c: models.DCNMix(c, c, cross_num=2, **_DNN),
    "FiBiNET": lambda c: models.FiBiNET(c, c, **_DNN),
    "AutoInt": lambda c: models.AutoInt(c, c, **_DNN),
    "AFM": lambda c: models.AFM(c, _sparse(c)),
    "NFM": lambda c: models.NFM(c, c, **_DNN),
    "PNN": lambda c: models.PNN(c, use_outter=True, **_DNN),
    "IFM": lambda c: models.IFM(c, c, **_DNN),
    "DIFM": lambda c: models.DIFM(c, c, **_DNN),
    "CCPM": lambda c: models.CCPM(c, _sparse(c), **_DNN),
    "AFN": lambda c: models.AFN(c, _sparse(c), ltl_hidden_size=64, afn_dnn_hidden_units=(256, 128, 64)),
    "MMOE": lambda c: multitask.MMOE(c, num_experts=6, **_TWO_TASKS),
    "PLE": lambda c: multitask.PLE(c, num_levels=2, **_TWO_TASKS),
    "ESMM": lambda c: multitask.ESMM(c, task_types=["binary"] * 2),
    "SharedBottom": lambda c: multitask.SharedBottom(c, **_TWO_TASKS),
}


def _flat(data: Data) -> list[Any]:
    sparse = [SparseFeat(f"C{i}", rows, WIDTH) for i, rows in enumerate(data.tables)]
    return sparse + [DenseFeat(f"I{i}", 1) for i in range(NUMERIC)]


def _history(data: Data, length: int, width: int) -> list[Any]:
    """A user's profile, a candidate item and a history on the candidate's tables."""
    tables = {"item": data.rows(100_000), "cate": data.rows(10_000)}
    columns = [SparseFeat(f"C{i}", data.rows(ROWS[i]), width) for i in range(6, 18)]
    columns += [SparseFeat(name, rows, width) for name, rows in tables.items()]
    columns.append(DenseFeat("price", 1))
    for name, rows in tables.items():
        past = SparseFeat(f"hist_{name}", rows, width, embedding_name=name)
        columns.append(VarLenSparseFeat(past, maxlen=length, length_name="seq_length"))
    return columns


def _inputs(columns: list[Any]) -> Inputs:
    places = build_input_features(columns)

    def make(batch: int) -> tuple[Tensor]:
        draw, past = generator(batch), generator(batch, salt=3)
        matrix = torch.zeros(batch, max(stop for _, stop in places.values()))
        for column in columns:
            start, stop = places[column.name]
            if isinstance(column, DenseFeat):
                matrix[:, start:stop] = torch.rand(batch, stop - start, generator=draw)
            elif isinstance(column, SparseFeat):
                matrix[:, start] = skewed(column.vocabulary_size, (batch,), draw, low=1).float()
            else:
                ids, lengths = histories(column.vocabulary_size, batch, column.maxlen, past)
                matrix[:, start:stop] = ids.float()
                if column.length_name:
                    matrix[:, places[column.length_name][0]] = lengths.float()
        return (matrix,)

    return make


def _builder(make: Callable[[list[Any]], nn.Module]) -> Callable[[Data], tuple[nn.Module, Inputs]]:
    def build(data: Data) -> tuple[nn.Module, Inputs]:
        columns = _flat(data)
        return make(columns), _inputs(columns)

    return build


def din(data: Data) -> tuple[nn.Module, Inputs]:
    """DIN over a history of 100."""
    columns = _history(data, 100, WIDTH)
    return models.DIN(columns, ["item", "cate"], att_weight_normalization=True, **_DNN), _inputs(columns)


def dien(data: Data) -> tuple[nn.Module, Inputs]:
    """DIEN over a history of 50."""
    columns = _history(data, 50, 8)
    return models.DIEN(columns, ["item", "cate"], gru_type="AUGRU", **_DNN), _inputs(columns)


def deepfm_with_tags(data: Data) -> tuple[nn.Module, Inputs]:
    """DeepFM with four mean-pooled fields of up to 20 tags."""
    tags = [SparseFeat(f"tags{i}", data.rows(10_000), WIDTH) for i in range(4)]
    columns = _flat(data) + [VarLenSparseFeat(tag, maxlen=20, combiner="mean") for tag in tags]
    return models.DeepFM(columns, columns, **_DNN), _inputs(columns)


for _name, _make in MODELS.items():
    recipe(f"deepctr.{_name}", _builder(_make))
recipe("deepctr.DCNMix", _builder(MODELS["DCNMix"]), (64, 512, 2048))  # it fails in eager with one sample
recipe("deepctr.DIN", din)
recipe("deepctr.DIEN", dien, (1, 64, 256, 1024))
recipe("deepctr.DeepFMVarLen", deepfm_with_tags)
