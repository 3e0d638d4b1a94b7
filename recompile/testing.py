"""For tests of rules and passes: the graph a rule sees, and assertions about what becomes of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_map

from . import capture as _capture
from .expected import is_updating, update
from .explain import compiling
from .options import Options
from .pipeline import run_passes
from .report import GraphRecord, Refusal, Report
from .rewrite import Pass
from .wording import plural


@dataclass
class Seen:
    """A graph as a rule sees it, with real inputs to run it on."""

    gm: fx.GraphModule
    inputs: Sequence[Any]


def capture(model: Callable[..., Any], *args: Any, dynamic: bool | None = False) -> fx.GraphModule:
    """The graph that a rule sees: ATen operators before autograd, functionalized and canonicalized.

    Args:
        args: what the model is called with.
        dynamic: as for `torch.compile`; with None it depends on the sizes that the model was captured with before.

    Raises:
        torch._dynamo.exc.Unsupported: the model is more than one graph.
    """
    return _see(model, args, dynamic).gm


def assert_rewrites(
    rule: Pass | type[Pass],
    model: Callable[..., Any],
    args: Sequence[Any],
    expect: str | None = None,
    dynamic: bool | None = False,
) -> fx.GraphModule:
    """Asserts that the rule fires on the model, breaks nothing and keeps the numbers; returns the graph.

    Args:
        rule: a rule or pass, or its class.
        args: what the model is called with.
        expect: the graph afterwards, as `text` writes it; indentation does not matter. With
            RECOMPILE_UPDATE_EXPECTED=1 in the environment it is written into the test instead: start with `expect=""`.
        dynamic: as for `torch.compile`.
    """
    seen = _see(model, args, dynamic)
    record, each = _apply(rule, seen)
    refused = "".join(f"\n  {refusal.why} [{refusal.node}]" for refusal in _refusals(record))
    tried = sum(rule.tried for done in record.passes for rule in done.rules)
    why = refused or f": it tried {plural(tried, 'node')}, and none was near"
    assert _fired(record), f"{each.name()} did not fire{why}\n{text(seen.gm)}"
    if expect is not None and is_updating() and _lines(text(seen.gm)) != _lines(expect):
        update(expect, text(seen.gm))
    elif expect is not None:
        assert _lines(text(seen.gm)) == _lines(expect), f"the graph afterwards is\n{text(seen.gm)}"
    return seen.gm


def assert_refuses(
    rule: Pass | type[Pass],
    model: Callable[..., Any],
    args: Sequence[Any],
    why: str = "",
    at: str = "",
    dynamic: bool | None = False,
) -> Refusal:
    """Asserts that the rule leaves the model alone and says so; returns the refusal.

    Args:
        why: a part of the sentence.
        at: a part of the blamed node's name.
        dynamic: as for `torch.compile`.
    """
    seen = _see(model, args, dynamic)
    record, each = _apply(rule, seen)
    assert not _fired(record), f"{each.name()} fired\n{text(seen.gm)}"
    found = [refusal for refusal in _refusals(record) if why in refusal.why and at in refusal.node]
    others = "".join(f"\n  {refusal.why} [{refusal.node}]" for refusal in _refusals(record)) or " nothing"
    assert found, f"{each.name()} does not refuse with {why!r} at {at!r}; it says{others}"
    return found[0]


def assert_same(
    model: torch.nn.Module,
    args: Sequence[Any],
    train: bool = False,
    options: Mapping[str, object] | None = None,
    dtype: torch.dtype = torch.float64,
) -> Report:
    """Asserts that the compiled model equals eager in float64: outputs, buffers and, in training, gradients.

    Args:
        args: what the model is called with; floating point tensors are widened too.
        train: compare the gradients of parameters and inputs as well.
        options: as for `torch.compile(backend="recompile")`, but strict unless they say otherwise: a pass that fails
            or a fallback is an error.
        dtype: what the compiled model computes in, and to whose tolerance it is compared. Eager computes in float64
            from the same rounded numbers. Only a dtype for which kernels are generated tests them: where there is
            none, float64 for most, a region's reference runs.

    Returns:
        What the backend did.
    """
    copied = copy.deepcopy(model).to(dtype)
    eager = copy.deepcopy(copied).double()
    given = tree_map(lambda x: _floats(x, dtype), list(args))
    with compiling({"strict": True, **(options or {})}) as (report, backend):
        compiled = torch.compile(copied, backend=backend)
        actual = _results(copied, compiled, given, train, dtype)
    expected = _results(eager, eager, given, train, torch.float64)
    torch.testing.assert_close(actual, tree_map(lambda x: _rounded(x, dtype), expected), equal_nan=True)
    return report


def assert_rewritten_same(
    model: torch.nn.Module, args: Sequence[Any], dynamic: bool | None = False
) -> tuple[fx.Graph, GraphRecord]:
    """Asserts that the rewritten graph, run operator by operator, gives eager's values and gradients.

    No kernel is compiled, so it takes a fraction of `assert_same`'s time: region ops run as their reference.

    Args:
        model: its parameters' gradients are compared, for random gradients of the outputs.
        args: what the model is called with; the gradients of those that ask for one are compared, too.
        dynamic: as for `torch.compile`.

    Returns:
        The graph after all passes, and what they did.

    Raises:
        torch._dynamo.exc.Unsupported: the model is more than one graph.
    """
    record, graphs = GraphRecord(), list[fx.Graph]()

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = _capture.capture(gm).gm
        run_passes(captured, Options(strict=True), record)
        graphs.append(captured.graph)
        return captured.forward

    with torch._dynamo.config.patch(recompile_limit=1 << 16):
        call = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
        actual, expected = _with_gradients(model, call, args), _with_gradients(model, model, args)
    torch.testing.assert_close(actual, expected, equal_nan=True)
    return graphs[0], record


def _with_gradients(model: torch.nn.Module, call: Callable[..., Any], args: Sequence[Any]) -> Any:
    outputs = call(*args)
    found = [out for out in tree_leaves(outputs) if _learns(out)]
    torch.manual_seed(0)
    seeds = [torch.randn_like(out) for out in found]
    sources = [*model.parameters(), *(x for x in tree_leaves(args) if _learns(x))]
    return outputs, torch.autograd.grad(found, sources, seeds, allow_unused=True) if sources else ()


def _learns(x: object) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def text(gm: fx.GraphModule) -> str:
    """A graph as short text: one line a node, operators without their overload.

    e = embedding(weight, ids)
    return (e,)
    """
    return "\n".join(_line(node) for node in gm.graph.nodes if node.op != "placeholder")


def _line(node: fx.Node) -> str:
    given = [str(arg) for arg in node.args] + [f"{key}={arg}" for key, arg in node.kwargs.items()]
    if node.op == "output":
        return f"return {given[0]}"
    name = getattr(node.target, "overloadpacket", node.target)
    return f"{node.name} = {getattr(name, '__name__', name)}({', '.join(given)})"


def _lines(graph: str) -> list[str]:
    return [line.strip() for line in graph.strip().splitlines()]


def _see(model: Callable[..., Any], args: Sequence[Any], dynamic: bool | None = False) -> Seen:
    seen: list[Seen] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        captured = _capture.capture(gm).gm
        run_passes(captured, Options(strict=True, passes="functionalize,canonicalize"), GraphRecord())
        seen.append(Seen(captured, [x.clone() if isinstance(x, torch.Tensor) else x for x in inputs]))
        return gm.forward

    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1 << 16):
        torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return seen[0]


def _apply(rule: Pass | type[Pass], seen: Seen) -> tuple[GraphRecord, Pass]:
    """Runs just this pass, with every check; a failure is an error."""
    each = rule() if isinstance(rule, type) else rule
    record = GraphRecord()
    options = Options(strict=True, verify="numerics", numerics="fast")
    run_passes(seen.gm, options, record, seen.inputs, [each])
    return record, each


def _fired(record: GraphRecord) -> int:
    return sum(rule.fired for entry in record.passes for rule in entry.rules)


def _refusals(record: GraphRecord) -> list[Refusal]:
    return [refusal for entry in record.passes for rule in entry.rules for refusal in rule.refused]


def _results(
    model: torch.nn.Module, call: Callable[..., Any], args: Sequence[Any], train: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """Outputs, buffers and gradients of one run in `dtype`, from the same random numbers every time."""
    inputs = tree_map(lambda x: _floats(x, dtype, train), list(args))
    torch.manual_seed(0)
    with torch.set_grad_enabled(train):
        outputs = call(*inputs)
    results = {"outputs": outputs, "buffers": dict(model.named_buffers())}
    if train:
        found = [out for out in tree_leaves(outputs) if _learns(out)]
        drawn = [torch.randint(-8, 9, out.shape).to(out) / 8 for out in found]  # exact in every dtype
        torch.autograd.backward(found, drawn)
        sources = [*model.parameters(), *(x for x in tree_leaves(inputs) if isinstance(x, torch.Tensor))]
        results["gradients"] = [x.grad for x in sources if x.grad is not None]
    return results


def _floats(value: Any, dtype: torch.dtype, train: bool = False) -> Any:
    """A copy of an input: floating point as `dtype`, with a gradient where one is wanted."""
    if not isinstance(value, torch.Tensor):
        return value
    if not value.is_floating_point():
        return value.clone()
    return value.detach().to(dtype, copy=True).requires_grad_(train)


def _rounded(value: Any, dtype: torch.dtype) -> Any:
    """A result in float64 as `dtype`."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.dtype is torch.float64 else value
