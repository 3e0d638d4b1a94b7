"""Walls: what nothing moves across."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx

from recompile.graph.walls import is_random, is_wall

aten = torch.ops.aten


def node(target: Any, *args: Any, op: str = "call_function", val: Any = None) -> fx.Node:
    graph = fx.Graph()
    new = graph.create_node(op, target, (graph.placeholder("x"), *args))
    if val is not None:
        new.meta["val"] = val
    return new


@pytest.mark.parametrize(
    "target",
    [
        aten.add_.Tensor,
        aten.copy_.default,
        aten.relu_.default,
        aten._assert_async.msg,
        torch.ops.higher_order.cond,
        torch._C._set_grad_enabled,
        torch.amp.autocast_mode._enter_autocast,
        operator.setitem,
    ],
)
def test_walls(target: Any) -> None:
    assert is_wall(node(target))


@pytest.mark.parametrize(
    "target", [aten.add.Tensor, aten.view.default, aten.embedding_bag.default, aten.dropout.default]
)
def test_no_walls(target: Any) -> None:
    assert not is_wall(node(target))


def test_inputs_outputs_and_attributes_are_no_walls() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"), graph.get_attr("body")))
    assert not any(is_wall(n) for n in graph.nodes)


def test_modules_and_methods_are_walls() -> None:
    assert is_wall(node("layer", op="call_module"))
    assert is_wall(node("add_", 1, op="call_method"))


def test_arithmetic_on_sizes_is_no_wall() -> None:
    assert not is_wall(node(operator.mul, 2, val=6))
    assert is_wall(node(operator.iadd, 2, val=torch.ones(1)))


def test_verbatim_but_pure() -> None:
    assert not is_wall(node(operator.getitem, [0, 1], val=torch.ones(1)))
    assert not is_wall(node(torch.tensor, val=torch.ones(1)))


def test_random() -> None:
    assert is_random(node(aten.bernoulli.default)) and is_random(node(aten.dropout.default))
    assert not is_random(node(aten.embedding.default)) and not is_random(node("layer", op="call_module"))
