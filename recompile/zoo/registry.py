"""Which models there are, by name: `rechub.DeepFM`, `deepctr.DIN`, `own.DLRM`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from recompile.errors import RecompileError

from .data import Data

Inputs = Callable[[int], tuple[Any, ...]]
Builder = Callable[[Data], tuple[nn.Module, Inputs]]

# The modules that define each family: importing one registers its recipes.
_FAMILIES = {"rechub": ("rechub", "rechub_history"), "deepctr": ("deepctr",), "own": ("dlrm",)}
_NEEDS = {"rechub": "torch-rechub", "deepctr": "deepctr-torch"}


class Built(NamedTuple):
    """A model, a function from a batch size to its inputs, and the batch sizes it is usually served with."""

    model: nn.Module
    inputs: Inputs
    batches: tuple[int, ...]


@dataclass(frozen=True)
class _Recipe:
    builder: Builder
    batches: tuple[int, ...]


_recipes: dict[str, _Recipe] = {}


def recipe(name: str, builder: Builder, batches: tuple[int, ...] = (1, 64, 512, 2048)) -> None:
    """Register a model under `family.Model`."""
    _recipes[name] = _Recipe(builder, batches)


def names() -> list[str]:
    """All models, family by family.

    Raises:
        RecompileError: a model library is not installed.
    """
    for family in _FAMILIES:
        _load(family)
    return list(_recipes)


def build(name: str, scale: float = 1.0, seed: int = 0) -> Built:
    """The model called `name`, its weights drawn from `seed`.

    Args:
        name: such as "rechub.DeepFM".
        scale: factor on the number of rows of every table (1.0: 26 tables, 2.8M rows).
        seed: of the weights; inputs depend only on the batch size.

    Raises:
        RecompileError: no such model, or its library is not installed.
    """
    family = name.partition(".")[0]
    if family in _FAMILIES:
        _load(family)
    if name not in _recipes:
        near = difflib.get_close_matches(name, names(), n=1)
        raise RecompileError(f"no model {name!r} in the zoo", try_=near[0] if near else ", ".join(names()))
    found = _recipes[name]
    torch.manual_seed(seed)
    model, inputs = found.builder(Data(scale))
    _liven(model)
    return Built(model, inputs, found.batches)


def _liven(model: nn.Module) -> None:
    """Give tables the values of a trained model's size.

    Both libraries start them at 1e-4, where outputs hardly depend on ids and a wrong row would go unseen.
    """
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            nn.init.normal_(module.weight, std=0.1)
            if module.padding_idx is not None:
                module.weight.data[module.padding_idx] = 0


def _load(family: str) -> None:
    try:
        for module in _FAMILIES[family]:
            importlib.import_module(f"{__package__}.{module}")
    except ModuleNotFoundError as error:
        if family not in _NEEDS:
            raise
        raise RecompileError(
            f"the zoo's {family} models cannot be loaded: no module {error.name!r}",
            try_=f"`make setup`, or install recompile[zoo] and then, with --no-deps, {_NEEDS[family]}",
        ) from error
