"""The cases with a target ratio against Inductor; inference unless `train`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from recompile.zoo.data import generator, skewed

from .case import Built, Case
from .models.lookups import TABLES, Bags, FirstStage, MaskedMeans, OneHot, Sums


def _bag_ids(rows: int, batch: int, length: int) -> tuple[list[Tensor], list[Tensor]]:
    draw = generator(batch)
    ids = [skewed(rows, (batch * length,), draw) for _ in range(TABLES)]
    return ids, [torch.arange(0, batch * length, length) for _ in range(TABLES)]


def bags(rows: int, length: int) -> Callable[[int], Built]:
    """26 bags of `length` ids."""
    return lambda batch: (Bags(rows), _bag_ids(rows, batch, length))


def masked_means(rows: int, length: int) -> Callable[[int], Built]:
    """26 sequences of `length`, about half of them padding."""

    def build(batch: int) -> Built:
        draw = generator(batch)
        ids = [skewed(rows, (batch, length), draw) for _ in range(TABLES)]
        kept = [i * (torch.rand(batch, length, generator=draw) < 0.5) for i in ids]
        return MaskedMeans(rows), (kept,)

    return build


def sums(rows: int, length: int) -> Callable[[int], Built]:
    """26 tables of width 64, `length` ids each."""
    return lambda batch: (Sums(rows), (skewed(rows, (batch, TABLES, length), generator(batch)),))


def one_hot(rows: int) -> Callable[[int], Built]:
    """One id a field, concatenated."""
    return lambda batch: (OneHot(rows), (skewed(rows, (batch, TABLES), generator(batch)),))


def first_stage(rows: int) -> Callable[[int], Built]:
    """DeepFM's first stage."""
    return lambda batch: (FirstStage(rows), (skewed(rows, (batch, TABLES), generator(batch)),))


CASES = (
    Case("bags of 1", 1, 15.0, bags(10_000, 1)),
    Case("bags of 1", 64, 10.0, bags(10_000, 1)),
    Case("bags of 20", 64, 4.0, bags(10_000, 20)),
    Case("bags of 20", 512, 1.3, bags(10_000, 20)),
    Case("bags of 20, 1M rows", 512, 1.0, bags(1_000_000, 20)),
    Case("masked mean of 20", 64, 4.0, masked_means(10_000, 20)),
    Case("masked mean of 20", 512, 4.0, masked_means(10_000, 20)),
    Case("gather + sum of 10, width 64", 2048, 8.0, sums(10_000, 10)),
    *(Case("one id + cat", batch, 0.97, one_hot(100_000)) for batch in (1, 64, 512, 2048)),
    Case("DeepFM's first stage", 512, 1.1, first_stage(100_000)),
    Case("training, bags of 1", 2048, 1.3, bags(10_000, 1), train=True),
)
