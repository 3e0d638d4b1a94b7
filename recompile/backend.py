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
from torch._dynamo.exc import RestartAnalysis
from torch._inductor.compile_fx import compile_fx

from .capture import capture
from .cost import is_region
from .dumping import dumping
from .errors import CaptureError, IndexOutOfRange, StrictError, unknown
from .options import Options
from .pipeline import ordered, parse_passes, run_passes
from .recording import Recording
from .regions import region_record
from .report import GraphRecord, Refusal, Report, forget, new_graph
from .rewrite import Pass
from .torch_private.structured_trace import artifact

log = logging.getLogger("recompile")
_BAD_ID = "recompile: index out of range: "  # how a generated kernel starts this complaint


def recompile(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, object] | None = None,
    **_: object,
) -> Callable[..., Any]:
    """Compiles one graph from Dynamo: what `torch.compile(backend="recompile")` calls.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs.
        mode: as for Inductor ("reduce-overhead", "max-autotune", ...).
        options: see `recompile.options.Options`.

    Raises:
        OptionError: an option is unknown or has a bad value.
        PassOrderError: the passes' order has a cycle.
        StrictError: a fallback to plain Inductor, a failing pass, or a failing dump, under `strict`.
    """
    chosen = Options.from_dict(options)
    passes = ordered(parse_passes(chosen.passes))
    patches = inductor_settings(mode) | dict(chosen.inductor)
    record = new_graph()
    with dumping(chosen, record) as recording:
        optimized = optimize(gm, example_inputs, chosen, passes, record, recording)
        try:
            compiled: Any = compile_fx(
                optimized, example_inputs, config_patches=_with_ours(patches, optimized) or None
            )
        except RestartAnalysis:  # how Inductor asks Dynamo to trace the graph again
            forget(record)
            raise
        except Exception as error:
            if optimized is gm:
                raise
            compiled = compile_fx(
                gm, example_inputs, config_patches=patches or None
            )  # raises if Inductor cannot either
            give_up(record, error, strict=chosen.strict)
    trace(record)
    return _naming_bad_ids(compiled)


def trace(record: GraphRecord) -> None:
    """Adds a graph's report to the structured trace, where one is written."""
    artifact("recompile_report", "string", lambda: Report(graphs=[record]).text())
    artifact("recompile_report_json", "json", lambda: Report(graphs=[record]).to_json())


def _with_ours(patches: dict[str, Any], gm: fx.GraphModule) -> dict[str, Any]:
    """Inductor's settings for a graph; the user's win over ours."""
    ours: dict[str, Any] = {}
    if any(is_region(node) for node in gm.graph.nodes):
        # Dynamo's guards have checked the inputs' sizes and strides. Inductor checks each again: 27 of the 65 us
        # that 26 one-id bags take at batch 1 (2.6 GHz Xeon).
        ours["size_asserts"] = False
    return ours | patches


def inductor_settings(mode: str | None) -> dict[str, Any]:
    """What `mode` stands for in Inductor's config.

    Raises:
        OptionError: Inductor has no such mode.
    """
    modes = torch._inductor.list_mode_options()
    if mode is not None and mode not in modes:
        raise unknown("mode", mode, modes)
    return dict(modes[mode]) if mode else {}


def optimize(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    passes: Sequence[Pass],
    record: GraphRecord,
    recording: Recording | None,
) -> fx.GraphModule:
    """`gm` captured and rewritten; or `gm` itself, and the reason in the record, where that fails.

    Raises:
        StrictError: it failed, or a pass did, under `strict`.
    """
    record.nodes_before = record.nodes_after = len(gm.graph.nodes)
    try:
        captured = capture(gm)
        record.capture_ms = captured.ms
        if recording is not None:
            recording.begin(captured.gm, captured.ms)
        ledger = run_passes(captured.gm, options, record, example_inputs, passes, recording)
        regions = [node for node in captured.gm.graph.nodes if is_region(node)]
        record.regions = [region_record(node, ledger) for node in regions]
        if recording is not None:
            recording.end(captured.gm, regions)
    except StrictError:
        raise
    except CaptureError as error:
        record.fallback = Refusal(error.why, error.node, error.line)
        if recording is not None:
            recording.fallback(gm)
    except Exception as error:  # a fault of ours must not cost the user a model that Inductor compiles
        give_up(record, error, strict=options.strict)
        return gm
    if record.fallback:
        _fall_back(record.fallback, strict=options.strict)
        return gm
    record.nodes_after = len(captured.gm.graph.nodes)
    return captured.gm


def give_up(record: GraphRecord, error: Exception, strict: bool) -> None:
    """Records a fault of ours, or of a user's region: our graph, or what Inductor made of it, did not compile.

    Raises:
        StrictError: under `strict`.
    """
    from .lowering import fault

    log.debug("%s", "".join(traceback.format_exception(error)))
    own = fault(error)
    why = (
        "; ".join(str(own).split("\n  "))
        if own
        else f"recompile has an internal error, {type(error).__name__}: {error}"
    )
    record.fallback, record.nodes_after, record.regions = Refusal(why), record.nodes_before, []
    _fall_back(record.fallback, strict)


_warned: set[str] = set()


def _fall_back(reason: Refusal, strict: bool) -> None:
    """Says, once for each reason, that plain Inductor compiles a graph."""
    if strict:
        raise StrictError("a graph fell back to plain Inductor", got=reason.why, where=reason.line)
    log.info("a graph is compiled by plain Inductor: %s (%s)", reason.why, reason.line)
    if reason.why not in _warned:
        _warned.add(reason.why)
        where = f" ({reason.line})" if reason.line else ""
        warnings.warn(
            f"recompile: plain Inductor compiles a graph, because {reason.why}{where}", stacklevel=2
        )


def _naming_bad_ids(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """`compiled`, with a generated kernel's complaint about an id raised as the error that eager raises."""
    if isinstance(compiled, torch.nn.Module):  # under torch's bisector compile_fx may return the graph itself
        return compiled

    @functools.wraps(compiled)  # with its attributes: Dynamo asks for _boxed_call and serialize
    def call(*args: Any) -> Any:
        try:
            return compiled(*args)
        except RuntimeError as error:
            if not str(error).startswith(_BAD_ID):
                raise
            sentence = str(error).removeprefix(_BAD_ID)
            raise IndexOutOfRange(
                f"index out of range: {sentence}", try_="check the ids against the table's num_embeddings"
            ) from None

    return call
