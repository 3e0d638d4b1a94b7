"""Whole models, served at four batch sizes and trained at one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.models.ranking import DLRM, DCNv2, DeepFM, MMoE
from benchmarks.models.rankmixer import RankMixer
from benchmarks.models.sequence import DIN, HSTU, SASRec
from recompile.zoo.data import NUMERIC, Data, skewed

from .case import Case, Inputs, Need, Problem, scaled

WIDTH = 64
ITEMS = 1_000_000
LONGEST, CANDIDATES = 200, 100
BATCHES = (4096, 512, 64, 1)
SLOWER = 0.97  # no model may be slower than this, though the geometric mean is what is aimed at
SERVING, TRAINING = {torch.float32: 1e-2, torch.bfloat16: 2e-2}, 5e-2
Build = Callable[[float, int], Problem]


def _ranking(kind: type[nn.Module]) -> Build:
    def build(scale: float, batch: int) -> Problem:
        tables = Data(scale).tables

        def inputs() -> Inputs:
            ids = torch.stack([skewed(rows, (batch,), None) for rows in tables], 1)
            return torch.rand(batch, NUMERIC), ids

        return Problem(kind(tables, NUMERIC, WIDTH), inputs, by_norm=True)

    return build


def _histories(items: int, batch: int, length: int) -> torch.Tensor:
    return skewed(items, (batch, length), None, low=1)


def _sequence(kind: type[SASRec | HSTU]) -> Build:
    def build(scale: float, batch: int) -> Problem:
        items, length = scaled(ITEMS, scale, 50), scaled(LONGEST, scale, 8)

        def inputs() -> Inputs:
            return _histories(items, batch, length), _histories(items, batch, CANDIDATES)

        return Problem(kind(items, WIDTH, 2, length), inputs, by_norm=True)

    return build


def _din(scale: float, batch: int) -> Problem:
    items, length = scaled(ITEMS, scale, 50), scaled(LONGEST, scale, 8)

    def inputs() -> Inputs:
        lengths = torch.randint(1, length + 1, (batch,))
        kept = torch.arange(length) < lengths[:, None]
        return _histories(items, batch, length) * kept, lengths, skewed(items, (batch,), None, low=1)

    return Problem(DIN(items, WIDTH), inputs, by_norm=True)


# Each with the dtype that it is served in. All train in float32 with TF32: with bfloat16 parameters, gradients of small
# tensors are mostly rounding.
MODELS: dict[str, tuple[Build, torch.dtype]] = {
    "DLRM": (_ranking(DLRM), torch.float32),
    "DeepFM": (_ranking(DeepFM), torch.float32),
    "DCNv2": (_ranking(DCNv2), torch.float32),
    "DIN": (_din, torch.bfloat16),
    "SASRec": (_sequence(SASRec), torch.bfloat16),
    "HSTU": (_sequence(HSTU), torch.bfloat16),
    "MMoE": (_ranking(MMoE), torch.float32),
    "RankMixer": (_ranking(RankMixer), torch.bfloat16),
}


def _case(name: str, batch: int, train: bool) -> Case:
    build, dtype = MODELS[name]
    dtype = torch.float32 if train else dtype
    needs = [Need("graphs", SLOWER)]
    if name == "DLRM" and not train:
        needs.append(Need("launches", 10, at_least=False))
    return Case(
        f"{name}, batch {batch}" + ", training" * train,
        "models",
        lambda scale: build(scale, scaled(batch, scale)),
        tuple(needs),
        train,
        dtype,
        TRAINING if train else SERVING[dtype],
        kept=0.5 if name in ("SASRec", "HSTU") else 1.0,
        quick=name == "DLRM" and batch == 512,
    )


def cases() -> Iterator[Case]:
    """Model by model: serving, then training."""
    for name in MODELS:
        yield from (_case(name, batch, False) for batch in BATCHES)
        yield _case(name, BATCHES[0], True)
