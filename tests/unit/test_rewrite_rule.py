"""Rules as their authors meet them: a whole rule, what holds it back, and what keeps it safe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from recompile.errors import RecompileError
from recompile.graph.walls import is_wall
from recompile.report import RuleRecord
from recompile.rewrite import Context, Match, Ops, Pass, Pattern, Refuse, Rule, any_of, register
from recompile.rewrite.registry import _known

aten = torch.ops.aten


@dataclass(frozen=True)
class PoolMaskedSum(Rule):
    """sum over l of m[b, l] * W[ids[b, l]] is a matrix product of m[b] with the rows."""

    numerics = "reassociate"
    max_length: int = 100

    def pattern(self, op: Ops) -> Pattern:
        rows = op.embedding(op.var("table", dims=("V", "D")), op.var("ids", dims=("B", "L")), op.const("pad"))
        mask = op.var("mask", dims=("B", "L", 1))
        return op.sum(any_of(op.mul(rows, mask).used_once(), rows, tag="spelling"), dim=[1])

    def check(self, m: Match) -> None:
        if m["spelling"] == 1:
            raise Refuse("nothing masks the looked-up rows", at=m.node("table"))
        if isinstance(m.dims["L"], int) and m.dims["L"] > self.max_length:
            raise Refuse(f"a sequence of {m.dims['L']} is too long")

    def rewrite(self, m: Match) -> fx.Node:
        rows = m.op.embedding(m["table"], m["ids"], m["pad"])
        return m.op.squeeze(m.op.bmm(m.op.permute(m["mask"], [0, 2, 1]), rows), 1)


def trace(function: Callable[..., Any], *args: Any, mode: str = "fake") -> fx.GraphModule:
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*args)


def run(rule: Rule, function: Callable[..., Any], *args: Any, mode: str = "fake") -> tuple[Any, RuleRecord]:
    """The rewritten module and the record."""
    gm, ctx = trace(function, *args, mode=mode), Context()
    rule.run(gm.graph, ctx)
    gm.graph.lint()
    gm.recompile()
    return gm, ctx.rules[rule.name()]


def targets(gm: fx.GraphModule) -> list[Any]:
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


W, IDS, MASK = torch.randn(10, 4), torch.randint(0, 10, (3, 5)), torch.rand(3, 5, 1)


def masked_sum(w: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return (F.embedding(ids, w, padding_idx=2) * mask).sum(1)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_users_rule_fires_and_keeps_the_numbers(mode: str) -> None:
    gm, record = run(PoolMaskedSum(), masked_sum, W, IDS, MASK, mode=mode)
    assert (record.tried, record.fired, record.refused) == (1, 1, [])
    assert targets(gm) == [
        aten.embedding.default, aten.permute.default, aten.bmm.default, aten.squeeze.dim
    ]  # fmt: skip
    for new in gm.graph.nodes:
        assert new.op != "call_function" or new.meta["recompile_rule"] == "pool-masked-sum"
    w, mask = W.clone().requires_grad_(), MASK.clone().requires_grad_()
    got, wanted = gm(w, IDS, mask), masked_sum(w, IDS, mask)
    torch.testing.assert_close(got, wanted)
    seed = torch.randn_like(wanted)
    got_grads = torch.autograd.grad(got, [w, mask], seed)
    torch.testing.assert_close(got_grads, torch.autograd.grad(wanted, [w, mask], seed))


def test_dynamic_sizes_stay_dynamic() -> None:
    gm, _ = run(PoolMaskedSum(), masked_sum, W, IDS, MASK, mode="symbolic")
    args = torch.randn(20, 4), torch.randint(0, 20, (7, 9)), torch.rand(7, 9, 1)
    torch.testing.assert_close(gm(*args), masked_sum(*args))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda w, i, m: F.embedding(i, w).sum(1), "nothing masks the looked-up rows"),
        (lambda w, i, m: (F.embedding(i, w) * m).sum(2), "expected sum with dim [1], found [2]"),
        (
            lambda w, i, m: (lambda p: p.sum(1) + p.exp().sum(1))(F.embedding(i, w) * m),
            "mul is also used by exp",
        ),
        (
            lambda w, i, m: (F.embedding(i, w) * m.expand(3, 5, 4)).sum(1),
            "expected a tensor mask of shape [B, L, 1], found [3, 5, 4]",
        ),
    ],
)
def test_refuses_with_a_sentence(function: Callable[..., Any], why: str) -> None:
    gm, record = run(PoolMaskedSum(), function, W, IDS, MASK)
    assert not record.fired and why in [r.why for r in record.refused]
    torch.testing.assert_close(gm(W, IDS, MASK), function(W, IDS, MASK))


def test_a_refusal_names_its_node() -> None:
    _, record = run(PoolMaskedSum(), lambda w, i, m: F.embedding(i, w).sum(1), W, IDS, MASK)
    assert record.refused[0].node == "w_1"
    _, record = run(PoolMaskedSum(max_length=3), masked_sum, W, IDS, MASK)
    assert (record.refused[0].why, record.refused[0].node) == ("a sequence of 5 is too long", "sum_1")


# -- what stands between


@dataclass(frozen=True)
class ReluOfSin(Rule):
    """relu(sin(x)) -> clamp_min(sin(x), 0)"""

    def pattern(self, op: Ops) -> Pattern:
        return op.relu(op.sin(op.var("x")))

    def rewrite(self, m: Match) -> fx.Node:
        return m.op.clamp_min(m.op.sin(m["x"]), 0)


def sin_then_relu(between: Callable[[fx.Graph, fx.Node], Any]) -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    sin = graph.call_function(aten.sin.default, (x,))
    between(graph, x)
    graph.output(graph.call_function(aten.relu.default, (sin,)))
    with torch._subclasses.FakeTensorMode():
        for node in list(graph.nodes)[:-1]:
            node.meta["val"] = None if node.args and is_wall(node) else torch.empty(2)
    return graph


@pytest.mark.parametrize(
    ("between", "why"),
    [
        (
            lambda g, x: g.call_function(aten.add_.Tensor, (x, 1)),
            "add__tensor stands between sin_default and relu_default",
        ),
        (
            lambda g, x: g.call_function(torch._C._set_grad_enabled, (False,)),
            "_set_grad_enabled stands between sin_default and relu_default",
        ),
    ],
)
def test_nothing_moves_across_a_wall(between: Any, why: str) -> None:
    graph, ctx = sin_then_relu(between), Context()
    ReluOfSin().run(graph, ctx)
    assert [r.why for r in ctx.rules["relu-of-sin"].refused] == [why]


def test_a_write_to_something_else_is_no_obstacle() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        s = x.sin()
        y.add_(1)
        return s.relu()

    _, record = run(ReluOfSin(), function, torch.randn(3), torch.randn(3))
    assert record.fired == 1


def test_new_nodes_are_computed_under_the_autocast_that_is_open() -> None:
    @dataclass(frozen=True)
    class MulOfSum(Rule):
        def pattern(self, op: Ops) -> Pattern:
            return op.mm(op.relu(op.var("x")), op.var("w"))

        def rewrite(self, m: Match) -> fx.Node:
            return m.op.mm(m.op.clamp_min(m["x"], 0), m["w"])

    enter, leave = torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    mode = graph.call_function(enter, ("cpu", torch.bfloat16, True, False))
    relu = graph.call_function(aten.relu.default, (x,))
    mm = graph.call_function(aten.mm.default, (relu, w))
    graph.call_function(leave, (mode,))
    graph.output(mm)
    with torch._subclasses.FakeTensorMode():
        for node, dtype in (
            (x, torch.float32),
            (w, torch.float32),
            (relu, torch.float32),
            (mm, torch.bfloat16),
        ):
            node.meta["val"] = torch.empty(2, 2, dtype=dtype)
    ctx = Context()
    MulOfSum().run(graph, ctx)
    assert ctx.rules["mul-of-sum"].fired == 1
    assert not torch.is_autocast_enabled("cpu")


# -- what keeps it safe


def rule(name: str, build: Callable[[Ops], Any], result: Callable[[Match], Any]) -> Rule:
    made = type(name, (Rule,), {"pattern": lambda self, op: build(op), "rewrite": lambda self, m: result(m)})
    return made()  # type: ignore[no-any-return]


def test_a_rule_that_changes_the_shape_is_an_error() -> None:
    wrong = rule("Wrong", lambda op: op.sum(op.var("x"), 1), lambda m: m.op.sum(m["x"], [0]))
    with pytest.raises(RecompileError, match="wrong changes what sum_1 is"):
        run(wrong, lambda x: x.sum(1), torch.randn(2, 3))


@pytest.mark.parametrize("said", [False, True, "why not"])
def test_a_check_that_gives_something_is_an_error(said: Any) -> None:
    class Checked(ReluOfSin):
        def check(self, m: Match) -> Any:
            return said

    with pytest.raises(RecompileError, match=r"check gives .*, which means nothing\n  try: raise Refuse"):
        run(Checked(), lambda x: x.sin().relu(), torch.randn(3))


def test_an_operator_that_aten_has_not_is_an_error() -> None:
    wrong = rule("misspelled", lambda op: op.relu(op.var("x")), lambda m: m.op.rellu(m["x"]))
    with pytest.raises(RecompileError, match="aten has no operator 'rellu'"):
        run(wrong, lambda x: x.relu(), torch.randn(3))


def test_a_call_that_fails_says_so() -> None:
    wrong = rule("Wrong", lambda op: op.relu(op.var("x")), lambda m: m.op.mm(m["x"], m["x"]))
    with pytest.raises(RecompileError, match=r"mm\(float32\[2, 3\], float32\[2, 3\]\) fails"):
        run(wrong, lambda x: x.relu(), torch.randn(2, 3))


def test_another_layout_is_made_contiguous() -> None:
    other = rule(
        "Other",
        lambda op: op.relu(op.var("x")),
        lambda m: m.op.permute(m.op.relu(m.op.contiguous(m.op.permute(m["x"], [1, 0]))), [1, 0]),
    )
    gm, record = run(other, lambda x: x.relu().view(-1), torch.randn(2, 3))
    assert record.fired == 1 and aten.contiguous.default in targets(gm)
    x = torch.randn(2, 3)
    assert torch.equal(gm(x), x.relu().view(-1))


DROP_CLONE = rule("DropClone", lambda op: op.clone(op.var("x")), lambda m: m["x"])


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda x: x.clone(), "clone is a graph output, which must not become the input x_1"),
        (lambda x: x.clone().view(-1), "it would change which inputs and outputs of the graph share memory"),
        (
            lambda x: (lambda y: (y, y.clone()))(x.sin()),
            "clone and sin are graph outputs, which must stay apart",
        ),
        (lambda x: x.clone().add_(1).sin(), "add_ writes in place to this memory"),
        (lambda x: (lambda c: x.add_(1) + c)(x.clone()), "add_ writes in place to this memory"),
    ],
)
def test_a_copy_that_somebody_could_see_stays(function: Callable[..., Any], why: str) -> None:
    _, record = run(DROP_CLONE, function, torch.randn(2, 3))
    assert not record.fired and [r.why for r in record.refused] == [why]


def test_a_copy_that_nobody_could_see_goes_and_its_views_follow() -> None:
    gm, record = run(DROP_CLONE, lambda x: (x.clone().view(-1)).clone().sin(), torch.randn(2, 3))
    assert record.fired == 2 and targets(gm) == [aten.view.default, aten.sin.default]
    x, view, _, _ = gm.graph.nodes
    assert x.meta["val"].untyped_storage()._cdata == view.meta["val"].untyped_storage()._cdata


def test_parts_of_a_tuple_are_replaced_one_by_one() -> None:
    parts = rule(
        "Parts",
        lambda op: op.split(op.var("x"), 2, dim=1),
        lambda m: (m.op.slice(m["x"], 1, 0, 2), m.op.slice(m["x"], 1, 2, 4)),
    )
    gm, record = run(parts, lambda x: (lambda a, b: a.sin() + b)(*x.split(2, 1)), torch.randn(3, 4))
    assert record.fired == 1 and targets(gm)[:2] == [aten.slice.Tensor] * 2
    x = torch.randn(3, 4)
    assert torch.equal(gm(x), x[:, :2].sin() + x[:, 2:])


def test_two_outputs_at_once() -> None:
    def build(op: Ops) -> tuple[Pattern, ...]:
        x = op.var("x")
        return op.sin(x), op.cos(x)

    both = rule("Both", build, lambda m: (m.op.neg(m["x"]), m.op.neg(m["x"])))
    gm, record = run(both, lambda x: x.sin() + x.cos(), torch.randn(3))
    assert record.fired == 1 and targets(gm) == [aten.neg.default, aten.neg.default, aten.add.Tensor]
    _, record = run(both, lambda x: x.cos() + x.sin().exp().sin(), torch.randn(3))
    assert record.fired == 1
    _, record = run(both, lambda x: (lambda s: s + (x + s * 0).cos())(x.sin()), torch.randn(3))
    assert not record.fired


# -- names and registration


def test_names_come_from_the_class() -> None:
    assert PoolMaskedSum.name() == "pool-masked-sum"


def test_registration() -> None:
    @register(after=("canonicalize",), before=("fuse-lookups",))
    @dataclass(frozen=True)
    class ForThisTest(Pass):
        after = ("dead-code",)

    try:
        assert _known["for-this-test"] is ForThisTest
        assert (ForThisTest.after, ForThisTest.before) == (("dead-code", "canonicalize"), ("fuse-lookups",))
        other = type("ForThisTest", (Pass,), {})
        with pytest.raises(RecompileError, match="two passes are called 'for-this-test'"):
            register(other)
    finally:
        del _known["for-this-test"]
