"""Dead code and common subexpressions: what goes, and what stays because somebody could notice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from recompile.passes.common_subexpressions import CommonSubexpressions
from recompile.passes.dead_code import DeadCode
from recompile.report import RuleRecord
from recompile.rewrite import Context, Pass

aten = torch.ops.aten


def run(
    step: Pass, function: Callable[..., Any] | fx.GraphModule, *args: Any
) -> tuple[fx.GraphModule, RuleRecord]:
    gm = function
    if not isinstance(gm, fx.GraphModule):
        gm = make_fx(function, pre_dispatch=True)(*args)
    ctx = Context()
    step.run(gm.graph, ctx)
    gm.graph.lint()
    gm.recompile()
    return gm, ctx.rules[step.name()]


def count(gm: fx.GraphModule, *targets: Any) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


def test_a_chain_without_users_goes() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    unused = graph.call_function(aten.sin.default, (x,))
    graph.call_function(aten.cos.default, (unused,))
    graph.output(graph.call_function(aten.relu.default, (x,)))
    gm, record = run(DeadCode(), fx.GraphModule({}, graph))
    assert [n.name for n in gm.graph.nodes] == ["x", "relu_default", "output"] and record.fired == 2


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.add_.Tensor, (1,)),
        (aten.bernoulli.default, ()),
        (aten.dropout.default, (0.5, True)),
        (aten._assert_async.msg, ("never",)),
        (torch._C._set_grad_enabled, None),
    ],
)
def test_effects_and_random_numbers_stay(target: Any, args: Any) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.call_function(target, (False,) if args is None else (x, *args))
    graph.output(x)
    gm, record = run(DeadCode(), fx.GraphModule({}, graph))
    assert count(gm, target) == 1 and record.tried == record.fired == 0


def test_batch_norm_in_training_stays_and_is_not_merged() -> None:
    graph = fx.Graph()
    x, mean, var = (graph.placeholder(name) for name in ("x", "mean", "var"))
    calls = [
        graph.call_function(aten.batch_norm.default, (x, None, None, mean, var, training, 0.1, 1e-5, False))
        for training in (True, True, False, False)
    ]
    graph.output(tuple(calls))
    with torch._subclasses.FakeTensorMode():
        for node in (x, *calls):
            node.meta["val"] = torch.empty(2, 3)
        mean.meta["val"], var.meta["val"] = torch.empty(3), torch.empty(3)
    gm, _ = run(CommonSubexpressions(), fx.GraphModule({}, graph))
    graph.output_node().args = ((x,),)
    gm, record = run(DeadCode(), gm)
    assert count(gm, aten.batch_norm.default) == 2 and record.fired == 2


X = torch.randn(3, 4)

MERGED: dict[str, tuple[Callable[..., Any], int]] = {
    "equal calls": (lambda x: x.sin() + x.sin(), 1),
    "a chain of equal calls": (lambda x: x.sin().exp() + x.sin().exp(), 2),
    "defaults written out": (lambda x: x.sum(1) + x.sum(-1, keepdim=False), 1),
    "other arguments": (lambda x: x.sum(1).sum() + x.sum(0).sum(), 0),
    "1 is not 1.0": (lambda x: (x.long() * 1).sum() + (x.long() * 1.0).sum(), 1),
    "0.0 is not -0.0": (lambda x: (x + 0.0) * (x + -0.0), 0),
    "views of one tensor": (lambda x: x.view(-1).sin() + x.view(-1).cos(), 1),
    "random numbers": (lambda x: torch.rand_like(x) + torch.rand_like(x), 0),
    "dropout": (lambda x: F.dropout(x, 0.5, True) + F.dropout(x, 0.5, True), 0),
    "a write between": (lambda x: (lambda y: y.sin() + y.add_(1).sin())(x.exp()), 0),
    "a write to something else between": (lambda x: x.sin() + x.exp().add_(1) + x.sin(), 1),
    "a write to one of them": (lambda x: x.sin().add_(1) + x.sin(), 0),
    "two outputs": (lambda x: (x.sin(), x.sin()), 0),
    "an output and a value": (lambda x: (x.sin(), x.sin().exp()), 1),
}


@pytest.mark.parametrize("case", MERGED)
def test_merges(case: str) -> None:
    function, fired = MERGED[case]
    gm, record = run(CommonSubexpressions(), function, X.clone())
    assert record.fired == fired and record.tried == fired + len(record.refused)
    if "dropout" not in case and "random" not in case:
        torch.testing.assert_close(gm(X.clone()), function(X.clone()), rtol=0, atol=0)


def test_a_refusal_says_why() -> None:
    _, record = run(CommonSubexpressions(), lambda x: (x.sin(), x.sin()), X)
    assert [r.why for r in record.refused] == ["sin_1 and sin are graph outputs, which must stay apart"]


def test_nothing_is_merged_across_a_switch_of_grad_mode() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(aten.sin.default, (x,))
    graph.call_function(torch._C._set_grad_enabled, (False,))
    second = graph.call_function(aten.sin.default, (x,))
    third = graph.call_function(aten.sin.default, (x,))
    graph.output(graph.call_function(aten.cat.default, ([first, second, third],)))
    gm, record = run(CommonSubexpressions(), fx.GraphModule({}, graph))
    assert count(gm, aten.sin.default) == 2 and record.fired == 1
