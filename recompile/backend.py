"""The backend: the whole story on one screen."""

from __future__ import annotations

import functools
import logging
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.compile_fx import compile_fx

from .capture import capture
from .errors import CaptureError, IndexOutOfRange, RecompileError, StrictError
from .options import Options
from .pipeline import run_passes
from .report import GraphRecord, Refusal, RegionRecord, new_graph, user_line

log = logging.getLogger("recompile")


def recompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    **_: object,
) -> Callable[..., Any]:
    """Compiles one graph from Dynamo: capture, passes, Inductor. Found by `torch.compile(backend="recompile")`.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).
        options: see `recompile.options.Options`.

    Raises:
        OptionError: an option is unknown or has a bad value.
        StrictError: a fallback to plain Inductor, under `strict`.
    """
    chosen = Options.from_dict(options)
    patches = dict(torch._inductor.list_mode_options(mode)) if mode else {}
    patches |= dict(chosen.inductor)
    record = new_graph()
    optimized = _optimize(gm, chosen, record)
    return _naming_bad_ids(compile_fx(optimized, example_inputs, config_patches=patches or None))


def _optimize(gm: fx.GraphModule, options: Options, record: GraphRecord) -> fx.GraphModule:
    """`gm` captured and rewritten; or `gm` itself, with a reason in the record, where that is not possible."""
    record.nodes_before = len(gm.graph.nodes)
    try:
        captured = capture(gm)
        record.capture_ms = captured.ms
        run_passes(captured.gm, options, record)
    except RecompileError as error:
        if not isinstance(error, CaptureError):
            raise
        return _fall_back(gm, options, record, Refusal(error.why, error.node, error.line))
    except Exception as error:
        log.debug("%s", traceback.format_exc())
        return _fall_back(gm, options, record, Refusal(f"internal error: {type(error).__name__}: {error}"))
    record.nodes_after = len(captured.gm.graph.nodes)
    record.regions = [_region(n) for n in captured.gm.graph.nodes if _is_region(n)]
    return captured.gm


def _fall_back(gm: fx.GraphModule, options: Options, record: GraphRecord, why: Refusal) -> fx.GraphModule:
    record.fallback, record.nodes_after = why, record.nodes_before
    if options.strict:
        raise StrictError("a graph fell back to plain Inductor", got=why.why, where=why.line)
    warnings.warn(
        f"recompile: a graph is compiled by plain Inductor: {why.why} {why.line}".rstrip(), stacklevel=2
    )
    return gm


def _is_region(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "recompile"


def _region(node: fx.Node) -> RegionRecord:
    from .lowering import describe

    lines = sorted({user_line(n) for n in (node, *node.users) if user_line(n)})
    tables = len(node.args[0])  # type: ignore[arg-type]
    return RegionRecord(node.name, str(node.target), tables, describe(node), lines)


def _naming_bad_ids(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with a generated kernel's complaint about an id raised as the error that eager raises."""

    @functools.wraps(compiled, updated=())
    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except RuntimeError as error:
            if not str(error).startswith("recompile: index out of range"):
                raise
            raise IndexOutOfRange(
                str(error), try_="check the ids against the table's num_embeddings"
            ) from error

    if getattr(compiled, "_boxed_call", False):
        call._boxed_call = True  # type: ignore[attr-defined]
    return call
