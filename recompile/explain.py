"""What the backend does to a model, as a record: for each rule, what fired, what did not, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from .report import Report, collect


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, object] | None = None, **kwargs: Any
) -> Report:
    """Compiles `model` for these inputs, runs it once, and returns the report of just its graphs.

    Args:
        model: a module or a function.
        args, kwargs: what it is called with. Call under `torch.no_grad()` to see the inference graphs.
        options: as for `torch.compile(backend="recompile", options=...)`.
    """
    chosen: dict[str, Any] = dict(options or {})
    torch._dynamo.reset()
    with collect() as report:
        torch.compile(model, backend="recompile", options=chosen)(*args, **kwargs)
    return report
