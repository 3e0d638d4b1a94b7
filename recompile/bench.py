"""A model against other backends, batch by batch: is it the same, is it faster, with how many kernels?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import compare
from .measure import interleave
from .torch_private.generated_code import launches, programs

OURS = "recompile"
Inputs = Callable[[int], tuple[Any, ...]]


@dataclass(frozen=True)
class Row:
    """One batch size of one model; dictionaries are keyed by backend, eager included."""

    model: str
    batch: int
    ms: Mapping[str, float]
    spread: Mapping[str, float]
    ratio: Mapping[str, float]  # how many times faster recompile is: ratio of the medians
    round_ratio: Mapping[str, float]  # the same: median of the per-round ratios
    error: Mapping[str, float | None]  # against eager; None where eager differs from itself (dropout)
    kernels: Mapping[str, int]


def bench(
    name: str,
    model: nn.Module,
    inputs: Inputs,
    batches: Sequence[int],
    *,
    against: Sequence[str] = ("eager", "inductor"),
    train: bool = False,
    seconds: float = 2.0,
    step: Callable[[str], object] = lambda what: None,
) -> Iterator[Row]:
    """Compile `model` with each backend, then yield one row per batch size.

    Args:
        name: for the rows.
        model: it runs in evaluation mode without gradients, or with `train` in training mode with a backward.
        inputs: from a batch size to the model's arguments.
        batches: batch sizes; dimensions that differ between their inputs are compiled as dynamic.
        against: backends to compare with; "eager" is the model as it is.
        seconds: of measuring, per row.
        step: told before each compilation and measurement what it is.
    """
    torch._dynamo.reset()
    model.train(train)
    given = _marked({batch: inputs(batch) for batch in batches})
    variants = {backend: _compiled(model, backend) for backend in dict.fromkeys((*against, OURS))}
    # All variants share Dynamo's cache of a frame: the last ones would run out of entries, and run in eager.
    with torch._dynamo.config.patch(recompile_limit=len(variants) * torch._dynamo.config.recompile_limit):
        checked = {batch: _check(name, model, variants, given[batch], train, step) for batch in batches}
    kernels: dict[str, int] = {}
    for batch in batches:
        step(f"{name}, batch {batch}: measuring")
        calls = {b: partial(_step, call, model, given[batch], train) for b, call in variants.items()}
        found = interleave(calls, seconds=seconds)
        errors, compiled = checked[batch]
        kernels = kernels | compiled  # a batch size that compiled nothing runs what is there
        yield Row(
            model=name,
            batch=batch,
            ms={b: t.median_ms for b, t in found.timings.items()},
            spread={b: t.spread for b, t in found.timings.items()},
            ratio={b: found.ratio(b, OURS) for b in variants},
            round_ratio={b: found.round_ratio(b, OURS) for b in variants},
            error=errors,
            kernels=kernels,
        )


def table(rows: Sequence[Row], title: str) -> Table:
    """The rows for the terminal."""
    backends = list(rows[0].ms)
    shown = Table(title=title, caption="ratio: other / recompile; > 1 means that recompile is faster")
    for column in ("model", "batch", *(f"{b} ms" for b in backends)):
        shown.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    others = [b for b in backends if b != OURS]
    for column in (*(f"ratio to {b}" for b in others), "max error", "spread", "kernels"):
        shown.add_column(column, justify="right")
    for row in rows:
        shown.add_row(*_cells(row, backends, others))
    return shown


def terminal() -> Console:
    """A console that records; 130 characters wide where it is not a terminal."""
    console = Console(record=True)
    return console if console.is_terminal else Console(record=True, width=130)


def rows_of(inputs: tuple[Any, ...]) -> int:
    """The batch size of `inputs`: the first dimension of the first tensor that has one, or 1."""
    return next((len(t) for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.dim()), 1)


def resize(inputs: tuple[Any, ...], batch: int) -> tuple[Any, ...]:
    """`inputs` with every tensor as long as the first one cut or repeated to `batch` rows."""
    rows = rows_of(inputs)

    def resized(tensor: Tensor) -> Tensor:
        if not tensor.dim() or len(tensor) != rows:
            return tensor
        return tensor[torch.arange(batch, device=tensor.device) % rows]

    return tuple(tree_map_only(Tensor, resized, inputs))


def _cells(row: Row, backends: list[str], others: list[str]) -> list[str]:
    error = row.error[OURS]
    kernels = " -> ".join(str(row.kernels[b]) for b in backends if b in row.kernels)
    return [
        row.model,
        str(row.batch),
        *(f"{row.ms[b]:.3f}" for b in backends),
        *(f"{row.ratio[b]:.2f}x" for b in others),
        "random" if error is None else f"{error:.0e}",
        f"{max(row.spread.values()):.0%}",
        kernels,
    ]


def _compiled(model: nn.Module, backend: str) -> Callable[..., Any]:
    return model if backend == "eager" else torch.compile(model, backend=backend)


def _marked(given: dict[int, tuple[Any, ...]]) -> dict[int, tuple[Any, ...]]:
    """The same inputs, with every dimension that varies between batch sizes marked as dynamic.

    Left to itself, Dynamo learns from the first backend which dimensions vary: the second one would get
    dynamic graphs where the first got static ones.
    """
    leaves = [[leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)] for inputs in given.values()]
    for same in zip(*leaves, strict=True):
        varying = [d for d in range(same[0].dim()) if len({leaf.shape[d] for leaf in same}) > 1]
        for leaf in same:
            torch._dynamo.maybe_mark_dynamic(leaf, varying)
    return given


def _check(
    name: str,
    model: nn.Module,
    variants: Mapping[str, Callable[..., Any]],
    inputs: tuple[Any, ...],
    grad: bool,
    step: Callable[[str], object],
) -> tuple[dict[str, float | None], dict[str, int]]:
    """Each variant's error against eager, and the kernels it launches."""
    expected = compare.run(model, model, inputs, grad=grad)
    errors: dict[str, float | None] = {}
    kernels: dict[str, int] = {}
    random = compare.error(compare.run(model, model, inputs, grad=grad, seed=1), expected) > 1e-6
    for backend, call in variants.items():
        step(f"{name}: {backend}")
        with programs() as made:
            found = compare.run(call, model, inputs, grad=grad)
        errors[backend] = None if random else compare.error(found, expected)
        if made:
            kernels[backend] = sum(map(launches, made))
    return errors, kernels


def _step(call: Callable[..., Any], model: nn.Module, inputs: tuple[Any, ...], train: bool) -> None:
    """What is timed: a forward, or a forward and a backward into fresh gradients."""
    if not train:
        with torch.no_grad():
            call(*inputs)
        return
    model.zero_grad(set_to_none=True)
    outputs = [leaf for leaf in tree_leaves(call(*inputs)) if isinstance(leaf, Tensor) and leaf.requires_grad]
    torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
