"""What the backend does to a model, as a record: for each rule, what fired, what did not, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from .options import Options
from .pass_list import ordered, parse_passes
from .report import Report, collect


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, object] | None = None,
    train: bool = False,
    profile: bool = False,
    **kwargs: Any,
) -> Report:
    """Compiles `model` for these inputs, runs it once, and returns the report of just its graphs.

    Args:
        model: a module or a function. What was compiled of it before stays compiled.
        args, kwargs: what it is called with.
        options: as for `torch.compile(backend="recompile", options=...)`.
        train: compile for training, with autograd; otherwise for inference, under `torch.no_grad()`.
        profile: run it some more times, and measure each region's forward kernel; on CPUs only, elsewhere it says so.
            A dump that shows the graphs is written again with it.

    Raises:
        OptionError, PassOrderError: of `options`.
    """
    from .torch_private.generated_code import programs  # it needs Dynamo

    options = _profiled(options or {}) if profile else options
    with compiling(options) as (report, backend), programs() as found, torch.set_grad_enabled(train):
        compiled = torch.compile(model, backend=backend)
        compiled(*args, **kwargs)
    if profile:
        from .dumping import renew
        from .profile import measure

        with torch.set_grad_enabled(train):
            measure(report, found, lambda: compiled(*args, **kwargs))
        renew(report)
    return report


def _profiled(options: Mapping[str, object]) -> dict[str, object]:
    inductor: Any = options.get("inductor", {})
    return {**options, "inductor": {**inductor, "cpp.enable_kernel_profile": True}}


@contextmanager
def compiling(
    options: Mapping[str, object] | None = None,
) -> Iterator[tuple[Report, Callable[..., Any]]]:
    """A report that fills up inside the `with` block, and a backend that nothing was compiled with before.

    Dynamo keeps what it compiled by backend: with `backend="recompile"` it would find earlier graphs again.
    """
    from .backend import recompile

    # An error here is not wrapped in one of Dynamo's.
    ordered(parse_passes(Options.from_dict(options).passes))

    def afresh(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return recompile(gm, inputs, options=options)

    with collect() as report, torch._dynamo.config.patch(recompile_limit=1 << 16):
        yield report, afresh
