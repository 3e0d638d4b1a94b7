"""What the tests of capture share: a backend that captures, runs, and checks that nothing of the graph was lost."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.debugging import aot_eager
from torch._subclasses.fake_tensor import FakeTensor

from recompile import backend
from recompile.capture import Captured, capture

aten = torch.ops.aten


@contextmanager
def without_inductor() -> Iterator[None]:
    """What the passes make runs by the reference of each region op: Inductor's code takes seconds to compile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: aot_eager(gm, inputs))
        yield


class Backend:
    """Captures, then hands over to AOTAutograd alone, without code generation; checks every graph."""

    def __init__(self, then: Callable[..., Any] = aot_eager) -> None:
        self.then = then
        self.captured: list[Captured] = []

    def __call__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> Any:
        before, guards = _picture(gm), _guards(gm)
        captured = capture(gm)
        assert (_picture(gm), _guards(gm)) == (before, guards)
        _check_interface(gm, captured.gm)
        self.captured.append(captured)
        return self.then(captured.gm, inputs)

    def nodes(self) -> list[fx.Node]:
        return [node for captured in self.captured for node in captured.gm.graph.nodes]

    def targets(self) -> list[Any]:
        return [node.target for node in self.nodes()]

    def opaque(self) -> list[str]:
        return [node.meta["opaque"] for node in self.nodes() if "opaque" in node.meta]


def _picture(gm: fx.GraphModule) -> list[tuple[Any, ...]]:
    return [
        (n, n.op, n.target, n.args, n.kwargs, {k: id(v) for k, v in n.meta.items()}) for n in gm.graph.nodes
    ]


def _guards(gm: fx.GraphModule) -> tuple[int, ...]:
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if isinstance(value, FakeTensor) and (env := value.fake_mode.shape_env) is not None:
            return (
                len(env.guards),
                len(env.replacements),
                sum(map(len, env.deferred_runtime_asserts.values())),
            )
    return ()


def _check_interface(gm: fx.GraphModule, captured: fx.GraphModule) -> None:
    captured.graph.lint()
    old, new = ([n for n in g.graph.nodes if n.op == "placeholder"] for g in (gm, captured))
    assert [n.name for n in old] == [n.name for n in new]
    for a, b in zip(old, new, strict=True):
        assert {**a.meta, "val": None} == {**b.meta, "val": None}
        assert getattr(a, "_dynamo_source", None) == getattr(b, "_dynamo_source", None)
    for node in captured.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns:
            assert "val" in node.meta, node
    assert len(gm.graph.output_node().args[0]) == len(captured.graph.output_node().args[0])


def run(model: Any, args: tuple[Any, ...], train: bool = True) -> tuple[Any, ...]:
    """Outputs, then the gradients of parameters and inputs, then buffers, then the inputs after the call."""
    args = tuple(_leaf(arg) for arg in args)
    torch.manual_seed(0)
    inputs = [a.clone() if isinstance(a, Tensor) and a.requires_grad else a for a in args]
    out = model(*inputs)
    leaves = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]
    floats = [t for t in leaves if t.requires_grad]
    if train and floats:
        sum(t.real.double().pow(2).sum() + t.real.double().sum() for t in floats).backward()
    module = model if isinstance(model, nn.Module) else nn.Module()
    grads = [p.grad for p in module.parameters()] + [a.grad for a in args if isinstance(a, Tensor)]
    return out, grads, list(module.buffers()), inputs


def _leaf(arg: Any) -> Any:
    if not isinstance(arg, Tensor):
        return arg
    return arg.detach().clone().requires_grad_(arg.requires_grad)


def check(
    model: Any,
    make: Callable[[int], tuple[Any, ...]],
    *,
    batches: tuple[int, ...] = (7, 2, 1),
    then: Callable[..., Any] = aot_eager,
    **options: Any,
) -> Backend:
    """Compare `model` compiled through capture with eager at each batch size."""
    torch._dynamo.reset()
    backend = Backend(then)
    if isinstance(model, nn.Module):
        model = model.double() if not options.pop("keep", False) else model
    other = copy.deepcopy(model)
    compiled = torch.compile(other, backend=backend, fullgraph=True, **options)
    for batch in batches:
        torch.manual_seed(batch)
        args = make(batch)
        torch.testing.assert_close(run(compiled, args), run(model, args), rtol=1e-9, atol=1e-9)
        for module in (model, other):
            if isinstance(module, nn.Module):
                module.zero_grad()
    assert backend.captured
    return backend
