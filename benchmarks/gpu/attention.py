"""The attention cases: HSTU's, softmax attention in several shapes, DIN's unit and AutoInt's layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from benchmarks.models.attention import Causal, Fields, Hstu, Relative, Target, Window

from .case import Case, Inputs, Need, Problem, scaled
from .rivals import flash, flex

HEADS = 4
HSTU = ((8, 8192), (16, 4096), (32, 2048), (64, 1024))  # batch, N: as many pairs of a sample and an item each
SOFTMAX = (16, 2048, HEADS, 64)
WINDOW = 128
BF16 = {"dtype": torch.bfloat16, "tolerance": 2e-2}
QKV = ("q", "k", "v")


def hstu(batch: int, length: int, width: int, train: bool) -> Case:
    """With items some hours apart."""

    def build(scale: float) -> Problem:
        b, n = scaled(batch, scale), scaled(length, scale, 8)

        def inputs() -> Inputs:
            return (torch.randint(0, 10**5, (b, n + 1)).cumsum(1),)

        return Problem(Hstu(b, n, HEADS, width), inputs, 1, QKV)

    needs = [Need("inductor", 3.0)]
    if length >= 4096 and width == 128 and not train:
        needs.append(Need("tflops", 250))
    name = f"HSTU, batch {batch}, N {length}, {HEADS} heads of {width}" + ", training" * train
    quick = (length, width) == (4096, 128)
    return Case(name, "hstu", build, tuple(needs), train, kept=0.5, quick=quick, **BF16)


def _softmax() -> Iterator[Case]:
    batch, length, heads, width = SOFTMAX

    def build(kind: type[Causal | Relative], scale: float) -> Problem:
        b, n = scaled(batch, scale), scaled(length, scale, 8)
        return Problem(kind(b, n, heads, width), tuple, 1, QKV)

    def window(scale: float) -> Problem:
        b, n = scaled(batch, scale), scaled(length, scale, 8)
        return Problem(Window(b, n, heads, width, scaled(WINDOW, scale, 3)), tuple, 1, QKV)

    def padded(scale: float) -> Problem:
        made = build(Causal, scale)
        b, _, n, _ = made.model.q.shape
        return Problem(made.model, lambda: (torch.randint(1, n + 1, (b,)),), made.rows, made.split)

    size = f"batch {batch}, N {length}, {heads} heads of {width}"
    faster, rivals = (Need("inductor", 2.0),), {"flex": flex}
    causal = {"flash": flash, "flex": flex}
    yield _one(f"causal softmax, {size}", lambda s: build(Causal, s), (Need("flash", 0.9),), 0.5, causal)
    yield _one(f"causal window of {WINDOW}, {size}", window, faster, WINDOW / length, rivals)
    # Rows beyond a history's end attend as well: of N^2 pairs 1/2 - 1/6 are kept on average.
    yield _one(f"causal softmax, padded, {size}", padded, faster, 1 / 3, rivals)
    yield _one(f"softmax with relative bias, {size}", lambda s: build(Relative, s), faster, 0.5, rivals)


def _one(
    name: str, build: Callable[[float], Problem], needs: tuple[Need, ...], kept: float, rivals: dict
) -> Case:
    return Case(name, "softmax", build, needs, kept=kept, rivals=rivals, **BF16)


def _units() -> Iterator[Case]:
    """float32, whose products may use TF32."""

    def din(scale: float) -> Problem:
        batch = scaled(4096, scale)

        def inputs() -> Inputs:
            lengths = torch.randint(1, 101, (batch,))
            return torch.randn(batch, 64), torch.randn(batch, 100, 64), lengths

        return Problem(Target(64), inputs)

    def autoint(scale: float) -> Problem:
        batch = scaled(4096, scale)
        return Problem(Fields(32, 2), lambda: (torch.randn(batch, 26, 32),))

    needs = (Need("inductor", 2.0),)
    yield Case(
        "DIN's unit, history 100 of width 64, batch 4096", "units", din, needs, tolerance=1e-2, quick=True
    )
    yield Case(
        "AutoInt's layer, 26 fields, 2 heads of 16, batch 4096", "units", autoint, needs, tolerance=1e-2
    )


def cases() -> Iterator[Case]:
    """Forward before training, long before short."""
    yield from (hstu(*size, width, train) for train in (False, True) for width in (128, 64) for size in HSTU)
    forward = list(_softmax())
    yield from forward
    yield from (replace(c, name=f"{c.name}, training", train=True) for c in forward)
    yield from _units()
