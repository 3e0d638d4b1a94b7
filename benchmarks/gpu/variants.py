"""The ways a case is computed: this backend, Inductor and eager, each with and without CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from .case import Case, Variant

Make = Callable[[nn.Module], Variant]
OURS = ("recompile", "recompile graphs", "recompile autotune graphs")
INDUCTOR = ("inductor", "inductor graphs", "autotune", "autotune graphs")


def variants(case: Case, quick: bool) -> Mapping[str, Make]:
    """By name, the most telling first. A whole model has dense layers, so there ours is tuned as Inductor's is."""
    made: dict[str, Make] = {"recompile": _ours({}), "inductor": _inductor(None), "eager": Variant}
    if not quick or case.group == "models":
        made |= {"recompile graphs": _ours(_mode("reduce-overhead"))}
        made |= {"inductor graphs": _inductor("reduce-overhead")}
    if quick:
        return made
    made |= {"eager graphs": lambda model: Variant(torch.compile(model, backend="cudagraphs", dynamic=False))}
    made |= case.rivals
    made |= {
        "autotune": _inductor("max-autotune-no-cudagraphs"),
        "autotune graphs": _inductor("max-autotune"),
    }
    if case.group == "models":
        made |= {"recompile autotune graphs": _ours(_mode("max-autotune"))}
    return made


def _mode(name: str) -> dict[str, object]:
    return dict(torch._inductor.list_mode_options()[name])


def _inductor(mode: str | None) -> Make:
    return lambda model: Variant(torch.compile(model, mode=mode, dynamic=False))


def _ours(inductor: Mapping[str, object]) -> Make:
    """Strict: a fallback to plain Inductor would be measured as ours."""
    options = {"strict": True, "inductor": inductor}
    return lambda model: Variant(
        torch.compile(model, backend="recompile", options=options, dynamic=False)  # type: ignore[arg-type]
    )
