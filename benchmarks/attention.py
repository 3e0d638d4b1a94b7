"""The attention cases; `batch` is theirs, and the model's sizes are in the name."""

from __future__ import annotations

import torch
from torch import Tensor

from .case import Built, Case
from .models.attention import Causal, Fields, Hstu, PublishedHstu, Target, Window

Shape = tuple[int, int, int]  # N, heads, width
HSTU: dict[tuple[int, Shape], tuple[float, float]] = {
    (32, (50, 2, 32)): (2.2, 2.5),
    (16, (200, 2, 32)): (2.7, 2.5),
    (8, (512, 4, 64)): (4.0, 2.5),
    (2, (2048, 4, 64)): (4.5, 2.5),
}
PADDED = 0.25  # the mean length of a padded history, as a part of the longest


def hstu(batch: int, shape: Shape, kind: type[Hstu] = Hstu) -> Built:
    """HSTU with items some hours apart."""
    torch.manual_seed(0)
    stamps = torch.randint(0, 10**5, (batch, shape[0] + 1)).cumsum(1)
    return kind(batch, *shape), (stamps,)


def causal(batch: int, shape: Shape) -> Built:
    """SASRec's attention, all histories full."""
    torch.manual_seed(0)
    return Causal(batch, *shape), ()


def padded(batch: int, shape: Shape, part: float) -> Built:
    """SASRec's attention with histories of `part` of the longest on average."""
    torch.manual_seed(0)
    return Causal(batch, *shape), (lengths(batch, shape[0], part),)


def lengths(batch: int, longest: int, part: float) -> Tensor:
    """Uniform around `part` of the longest; all the longest for 1."""
    if part == 1:
        return torch.full((batch,), longest)
    return torch.randint(1, max(2, int(2 * part * longest)), (batch,))


def window(batch: int, shape: Shape) -> Built:
    """A sliding window of 128."""
    torch.manual_seed(0)
    return Window(batch, *shape), ()


def fields(batch: int) -> Built:
    """AutoInt: 26 fields of width 32, 2 heads."""
    torch.manual_seed(0)
    return Fields(32, 2), (torch.randn(batch, 26, 32),)


def target(batch: int, train: bool = False) -> Built:
    """DIN: histories of up to 100 items of width 64; in training they need gradients, as looked-up rows do."""
    torch.manual_seed(0)
    candidate, history = torch.randn(batch, 64), torch.randn(batch, 100, 64)
    given = (candidate.requires_grad_(train), history.requires_grad_(train), lengths(batch, 100, 0.5))
    return Target(64), given


def _published_cases() -> list[Case]:
    """The targets are those of the same model in the plain spelling."""
    batch, shape = 8, (512, 4, 64)
    return [
        Case(
            f"{'training, ' if train else ''}HSTU as published {'x'.join(map(str, shape))}",
            batch,
            HSTU[batch, shape][train],
            lambda b: hstu(b, shape, PublishedHstu),
            train,
        )
        for train in (False, True)
    ]


def _hstu_cases() -> list[Case]:
    cases = []
    for train in (False, True):
        for (batch, shape), targets in HSTU.items():
            name = f"{'training, ' if train else ''}HSTU {'x'.join(map(str, shape))}"
            cases.append(Case(name, batch, targets[train], lambda b, shape=shape: hstu(b, shape), train))
    return cases


CASES = (
    *_hstu_cases(),
    *_published_cases(),
    Case("causal softmax 200x2x32", 64, 1.5, lambda b: causal(b, (200, 2, 32))),
    Case("training, causal softmax 200x2x32", 64, 1.0, lambda b: causal(b, (200, 2, 32)), train=True),
    Case("window of 128, 4096x2x64", 1, 8.0, lambda b: window(b, (4096, 2, 64))),
    Case("DIN 100x64", 512, 2.0, target),
    Case("training, DIN 100x64", 512, 1.5, lambda b: target(b, train=True), train=True),
    Case("AutoInt 26x2x16", 2048, 1.1, fields),
)
SEQUENCE_MODELS = {
    "rechub.SASRec": (64, 512),
    "rechub.BST": (64, 512),
    "rechub.DIN": (64, 512),
    "rechub.HSTU": (64, 128),  # at 512 its logits are 4 GB, and comparing needs several of them
}
