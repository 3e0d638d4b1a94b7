"""Spellings meet: each becomes the canonical one, keeps every bit and stride, and keeps who shares memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from recompile.passes.canonicalize import Canonicalize
from recompile.passes.dead_code import DeadCode
from recompile.passes.spellings import ALIASES
from recompile.rewrite import Context

aten = torch.ops.aten


def run(function: Callable[..., Any], *args: Any, mode: str = "fake") -> tuple[fx.GraphModule, Context]:
    gm = make_fx(function, pre_dispatch=True, tracing_mode=mode)(*args)
    ctx = Context()
    for step in (Canonicalize(), DeadCode()):
        step.run(gm.graph, ctx)
    gm.graph.lint()
    gm.recompile()
    return gm, ctx


def ops(gm: fx.GraphModule) -> str:
    """The ATen operators between the leading and the final `sin`, which keep inputs and outputs apart."""
    names = [
        n.target.overloadpacket.__name__
        for n in gm.graph.nodes
        if isinstance(n.target, torch._ops.OpOverload)
    ]
    assert names[0] == names[-1] == "sin", names
    return " ".join(names[1:-1])


SPELLINGS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {  # of x[2, 3, 4]
    "whole slice": (lambda x: x[:, 0:3], ""),
    "long slice": (lambda x: aten.slice(x, 1, 0, 2**63 - 1), ""),
    "part": (lambda x: x[:, 1:3], "slice"),
    "same view": (lambda x: x.view(2, 3, 4), ""),
    "same expand": (lambda x: x.expand(2, 3, 4), ""),
    "same dtype": (lambda x: x.to(torch.float32), ""),
    "copy of the same dtype": (lambda x: x.to(torch.float32, copy=True), ""),
    "contiguous": (lambda x: x.contiguous(), ""),
    "clone": (lambda x: x.clone(), ""),
    "clone to another layout": (lambda x: x.mT.clone(memory_format=torch.contiguous_format), "permute clone"),
    "evaluation dropout": (lambda x: F.dropout(x, 0.5, False), ""),
    "dropout of nothing": (lambda x: F.dropout(x, 0.0, True), ""),
    "zeros of its kind": (lambda x: x + x.new_zeros(4), "zeros add"),
    "as many numbers": (lambda x: x * torch.full_like(x, 2), "full mul"),
    "squeeze of a long dimension": (lambda x: x.squeeze(1), ""),
    "detach cuts gradients": (lambda x: x.detach(), "detach"),
    "unbind": (lambda x: x.unbind(1)[1], "select"),
    "split": (lambda x: x.split(2, 1)[1], "slice"),
    "split by sizes": (lambda x: x.split([1, 2], 1)[1], "slice"),
    "last of unequal pieces": (lambda x: x.tensor_split(2, 1)[1], "slice"),
    "last chunk": (lambda x: x.chunk(2, 1)[-1], "slice"),
    "chunk": (lambda x: x.chunk(2, -1)[0], "slice"),
    "narrow": (lambda x: x.narrow(1, 1, 2), "slice"),
    "stack": (lambda x: torch.stack([x, x], -1), "unsqueeze unsqueeze cat"),
    "concat": (lambda x: torch.concat([x, x], 1), "cat"),
    "nested cat": (lambda x: torch.cat([torch.cat([x, x], 1), x], -2), "cat"),
    "cat of cat of another dimension": (lambda x: torch.cat([torch.cat([x, x], 1)] * 2, 0), "cat cat"),
    "cat of one": (lambda x: torch.cat([x]), ""),
    "transpose": (lambda x: x.transpose(1, 2), "permute"),
    "mT": (lambda x: x.mT, "permute"),
    "movedim": (lambda x: x.movedim(-1, 0), "permute"),
    "moveaxis of two": (lambda x: torch.moveaxis(x, (0, 1), (-1, 0)), "permute"),
    "transpose twice": (lambda x: x.transpose(1, 2).permute(2, 0, 1), "permute permute"),
    "transpose there and back": (lambda x: x.transpose(1, 2).transpose(-1, -2), "permute permute"),
    "unsqueeze, squeeze": (lambda x: x.unsqueeze(1).squeeze(1), ""),
    "squeeze, unsqueeze": (lambda x: x[:, :1].squeeze(1).unsqueeze(1), "slice"),
    "flatten": (lambda x: x.flatten(1), "reshape"),
    "reshape": (lambda x: x.reshape(-1, 4), "reshape"),
    "view": (lambda x: x.view(-1, 4), "reshape"),
    "view as integers": (lambda x: x.view(torch.int32).view(torch.float32), "view view"),
    "reshape that copies": (lambda x: x.transpose(1, 2).reshape(2, -1), "permute reshape"),
    "unflatten": (lambda x: x.unflatten(2, (2, 2)), "reshape"),
    "view_as": (lambda x: x.flatten().view_as(x), "reshape reshape"),
    "expand_as": (lambda x: x[:, :, :1].expand_as(x), "slice expand"),
    "type_as": (lambda x: x.type_as(torch.empty(0, dtype=torch.float64)), "to"),
    "multiply": (lambda x: torch.multiply(x, x + 1), "add mul"),
    "subtract twice of": (lambda x: torch.subtract(x, x + 1, alpha=2), "add sub"),
    "divide, rounded": (lambda x: torch.divide(x, 0.3, rounding_mode="floor") * x, "div mul"),
    "clip from above": (lambda x: x.clip(max=0.5), "clamp"),
    "less_equal": (lambda x: torch.where(torch.less_equal(x, 0.1), x, torch.negative(x)), "le neg where"),
    "arctan": (lambda x: x.arctan(), "atan"),
    "detach of integers": (lambda x: x * x.long().detach(), "to mul"),
    "detach of what is made of truths": (lambda x: x * (x > 0).float().mul(2).detach(), "gt to mul mul"),
    "meshgrid": (lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="ij")[1],
        "select select reshape expand"),
    "meshgrid, xy": (lambda x: torch.meshgrid(x[0, 0], x[0, :, 0], indexing="xy")[1],
        "select select reshape expand"),
    "square": (lambda x: torch.square(x), "pow"),
    "x * x": (lambda x: x * x, "pow"),
    "x * y": (lambda x: x * (x + 1), "add mul"),
    "einsum bl,bld->bd": (lambda x: torch.einsum("bl,bld->bd", x[:, :, 0], x),
        "select unsqueeze bmm squeeze"),
    "einsum bd,bld->bl": (lambda x: torch.einsum("bd,bld->bl", x[:, 0], x),
        "select unsqueeze permute bmm squeeze"),
    "einsum bld,bl->bd": (lambda x: torch.einsum("bld,bl->bd", x, x[:, :, 0]),
        "select permute unsqueeze bmm squeeze"),
    "einsum bid,bjd->bij": (lambda x: torch.einsum("bid, bjd -> bij", x, x), "permute bmm"),
    "einsum bl,bl->b": (lambda x: torch.einsum("bl,bl->b", x[:, 0], x[:, 1]),
        "select select unsqueeze unsqueeze bmm squeeze squeeze"),
    "another einsum": (lambda x: torch.einsum("bid,bjd->bijd", x, x), "einsum"),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("case", SPELLINGS)
def test_spelling(case: str, mode: str) -> None:
    function, canonical = SPELLINGS[case]

    def between(x: Tensor) -> Tensor:
        return function(x.sin()).sin()

    x = torch.randn(2, 3, 4)
    gm, _ = run(between, x, mode=mode)
    got, wanted = gm(x), between(x)
    assert torch.equal(got, wanted) and (got.dtype, got.stride()) == (wanted.dtype, wanted.stride())
    assert mode == "symbolic" or ops(gm).replace("empty ", "") == canonical
    _same_gradient(gm, between)


def _same_gradient(gm: fx.GraphModule, function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(2, 3, 4, requires_grad=True)
    got, wanted = gm(x), function(x)
    assert got.requires_grad == wanted.requires_grad
    if wanted.requires_grad:
        seed = torch.randn_like(wanted)
        grads = [torch.autograd.grad(y, x, seed)[0] for y in (got, wanted)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)  # several uses may add up in another order


@pytest.mark.parametrize("alias", ALIASES, ids=str)
def test_an_alias_is_called_like_its_operator(alias: Any) -> None:
    for name in alias.overloads():
        if not name.endswith("out") and "out_" not in name:
            own, other = (str(getattr(x, name)._schema).partition("(") for x in (alias, ALIASES[alias]))
            assert own[2] == other[2]


def test_dimensions_count_from_the_front() -> None:
    gm, _ = run(lambda x: x.sin().sum(-1).sin(), torch.randn(2, 3))
    (total,) = (n for n in gm.graph.nodes if n.target is aten.sum.dim_IntList)
    assert total.args[1] == [1]


def test_dynamic_sizes_stay_dynamic() -> None:
    def function(x: Tensor) -> Tensor:
        return (
            torch.stack([x.sin().flatten(1)], 1).flatten(1).unsqueeze(1).expand_as(x[:, :1].flatten(2)).sin()
        )

    gm, ctx = run(function, torch.randn(3, 1, 5), mode="symbolic")
    x = torch.randn(7, 1, 9)
    assert torch.equal(gm(x), function(x)) and ctx.rules["reshape-from-view"].fired


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[:, :],
        lambda x: F.dropout(x, 0.5, False),
        lambda x: (lambda y: (y, y.clone()))(x.sin()),
        lambda x: (lambda y: (y, y.view(2, 3, 4)))(x.sin()),
        lambda x: x.clone().view(-1),
        lambda x: (lambda y: (y, torch.cat([y])))(x.sin()),
    ],
)
def test_outputs_stay_apart_from_inputs_and_from_each_other(function: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 4)
    gm, _ = run(function, x)
    got, wanted = gm(x), function(x)
    got, wanted = (y if isinstance(y, tuple) else (y,) for y in (got, wanted))
    for mine, theirs in ((got, wanted),):
        pairs = [[a.data_ptr() == b.data_ptr() for a in (x, *ys) for b in ys] for ys in (mine, theirs)]
        assert pairs[0] == pairs[1]
    outputs = gm.graph.output_node().args[0]
    outputs = outputs if isinstance(outputs, (list, tuple)) else [outputs]
    assert len(set(outputs)) == len(outputs) and all(node.op != "placeholder" for node in outputs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.clone().add_(1) + x,
        lambda x: (lambda y: y.clone() + y.add_(1))(x.sin()),
        lambda x: (lambda y: (lambda c: y.view(-1).add_(1).sum() + c)(y.clone()))(x.sin()),
        lambda x: (lambda y: (lambda c: c[:, 0].zero_().sum() + y)(y.to(torch.float32, copy=True)[:, :]))(
            x.sin()
        ),
    ],
)
def test_a_copy_stays_where_something_is_written(function: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 4)
    gm, _ = run(function, x)
    assert torch.equal(gm(x.clone()), function(x.clone()))


def test_contiguous_stays_where_eager_lays_out_otherwise_than_its_fake_tensor() -> None:
    def function(x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        y = F.batch_norm(x.sin().permute(0, 2, 1), mean, var)
        return (
            y.contiguous().sin()
            + F.batch_norm(x.permute(0, 2, 1), mean, var).permute(0, 2, 1).reshape(-1, 3)[0, 0]
        )

    args = torch.randn(2, 4, 3), torch.zeros(3), torch.ones(3)
    gm, _ = run(function, *args)
    targets = [n.target for n in gm.graph.nodes]
    assert aten.contiguous.default in targets and aten.view.default not in targets
    assert torch.equal(gm(*args), function(*args))


def test_training_dropout_stays() -> None:
    gm, _ = run(lambda x: F.dropout(x.sin(), 0.5, True).sin(), torch.randn(4))
    assert ops(gm) == "dropout"


def test_what_it_does_is_recorded() -> None:
    _, ctx = run(lambda x: x.sin().square().sin(), torch.randn(4))
    record = ctx.rules["pow-from-square"]
    assert (record.tried, record.fired, record.refused) == (1, 1, [])
    assert ctx.rules["cat-from-stack"].tried == 0  # listed, though it never fired
