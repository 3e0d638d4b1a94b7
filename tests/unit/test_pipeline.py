"""Which passes run, in which order, what is checked after each, and that a failing one is undone."""

import re
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import fx, nn

from recompile import Pass, Refuse, Rule
from recompile.errors import OptionError, PassOrderError, StrictError
from recompile.options import Options
from recompile.pipeline import ordered, parse_passes, run_passes
from recompile.report import GraphRecord
from recompile.testing import assert_refuses, assert_rewrites, capture, text

aten = torch.ops.aten


def names(text):
    return [p.name() for p in ordered(parse_passes(text))]


def test_default_is_every_registered_pass_in_declared_order():
    found = names("default")
    assert {"canonicalize", "dead-code", "common-subexpressions", "pool-sequences", "fuse-lookups"} <= set(
        found
    )
    assert found.index("canonicalize") < found.index("pool-sequences") < found.index("fuse-lookups")


def test_a_minus_takes_a_pass_out_and_a_name_adds_it():
    assert "dead-code" not in names("default,-dead-code")
    assert names(" dead-code , canonicalize ,") == ["canonicalize", "dead-code"]
    assert names("") == []


def test_settings_are_typed():
    (fuse,) = parse_passes("fuse-lookups{min-tables=8}")
    assert fuse.min_tables == 8
    (fuse,) = [p for p in parse_passes("default,fuse-lookups{min-tables=3}") if p.name() == "fuse-lookups"]
    assert fuse.min_tables == 3


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("default,fuse-lookup", "unknown pass 'fuse-lookup'; did you mean 'fuse-lookups'?"),
        ("-fuse-lookup", "did you mean 'fuse-lookups'?"),
        (
            "fuse-lookups{min-table=8}",
            "unknown setting of pass fuse-lookups: 'min-table'; did you mean 'min-tables'",
        ),
        ("fuse-lookups{min-tables=many}", "has the wrong type\n  expected: int\n  got: 'many'"),
        ("fuse-lookups{min-tables=8", "option 'passes' cannot be read"),
        ("-fuse-lookups{min-tables=8}", "option 'passes' cannot be read"),
    ],
)
def test_bad_text_is_named(text, sentence):
    with pytest.raises(OptionError) as caught:
        parse_passes(text)
    assert sentence in str(caught.value)


@dataclass(frozen=True)
class First(Pass):
    def run(self, graph, ctx):
        """Leaves the graph alone."""


@dataclass(frozen=True)
class Second(First):
    after = ("first", "not-installed")


@dataclass(frozen=True)
class Another(First):
    before = ("first",)


def test_order_follows_constraints_then_names():
    assert [p.name() for p in ordered([Second(), First(), Another()])] == ["another", "first", "second"]


def test_a_cycle_is_named():
    @dataclass(frozen=True)
    class Third(First):
        after = ("second",)
        before = ("first",)

    with pytest.raises(PassOrderError) as caught:
        ordered([Third(), Second(), First()])
    cycle = str(caught.value).splitlines()[0].removeprefix("the passes' order has a cycle: ").split(" -> ")
    assert cycle[0] == cycle[-1] and set(cycle) == {"first", "second", "third"}


def model(x, y):
    return (x.relu() + 1).sum(1), y * 2


def inputs():
    return torch.randn(3, 4), torch.randn(2)


def run(*passes, verify="shapes", model=model, inputs=inputs, **options):
    """The graph after the passes, and their records."""
    given = inputs()
    gm, record = capture(model, *given), GraphRecord()
    run_passes(gm, Options(verify=verify, **options), record, given, passes)
    for expected, actual in zip(model(*given), gm(*given), strict=True):
        torch.testing.assert_close(actual, expected)
    gm.graph.lint()
    return gm, record.passes


def node(graph, name):
    return next(n for n in graph.nodes if n.op == "call_function" and n.target._opname == name)


def swap(graph, name, target, *args):
    """Replaces the operator `name` by a call of `target`, without saying its value."""
    old = node(graph, name)
    with graph.inserting_before(old):
        new = graph.call_function(target, args or old.args)
    old.replace_all_uses_with(new)
    graph.erase_node(old)
    return new


@dataclass(frozen=True)
class Bad(Pass):
    """Does to the graph what its class attribute says."""

    what: ClassVar = None

    def run(self, graph, ctx):
        ctx.fired("bad")
        self.what(graph)


def bad(what):
    return type("Bad", (Bad,), {"what": staticmethod(what)})()


def raises(graph):
    node(graph, "relu").replace_all_uses_with(node(graph, "mul"))
    raise ValueError("halfway")


def dangling(graph):
    other = fx.Graph().placeholder("elsewhere")
    node(graph, "relu").args = (other,)


def wrong_shape(graph):
    swap(graph, "sum", aten.sum.dim_IntList, node(graph, "add"), [0])


def wrong_dtype(graph):
    total = node(graph, "sum")
    total.kwargs = {"dtype": torch.float64}


def wrong_claim(graph):
    new = swap(graph, "relu", aten.sum.default)
    new.meta["val"] = new.args[0].meta["val"]


def impossible(graph):
    swap(graph, "add", aten.mm.default, node(graph, "relu"), node(graph, "relu"))


def fewer_outputs(graph):
    out = graph.output_node()
    out.args = (out.args[0][:1],)


def output_is_input(graph):
    out, given = graph.output_node(), next(n for n in graph.nodes if n.op == "placeholder")
    (other,) = [n for n in graph.nodes if n.op == "placeholder" and n is not given]
    out.args = ((out.args[0][0], other),)


def new_input(graph):
    with graph.inserting_before(next(iter(graph.nodes))):
        graph.placeholder("one_more")


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (raises, "ValueError: halfway"),
        (dangling, "RuntimeError"),
        (wrong_shape, "the pass changed output 0"),
        (wrong_dtype, "another value than its meta['val'] says"),
        (wrong_claim, "another value than its meta['val'] says"),
        (impossible, "cannot be computed"),
        (fewer_outputs, "the pass changed the number of outputs"),
        (output_is_input, "the pass changed what output 1 is"),
        (new_input, "the pass changed the graph's inputs"),
    ],
)
def test_a_failing_pass_is_undone_and_the_others_run(what, sentence, caplog):
    gm, (record, last) = run(bad(what), Second())
    assert sentence in record.error
    assert record.rules == [] and last.error == ""
    assert record.nodes_before == record.nodes_after
    assert "pass bad failed and was undone" in caplog.text
    assert node(gm.graph, "relu").args[0].op == "placeholder"


def test_under_strict_it_is_an_error():
    with pytest.raises(StrictError, match="pass bad failed\n  got: ValueError: halfway"):
        run(bad(raises), strict=True)


def test_a_value_that_a_pass_leaves_out_is_filled_in():
    gm, (record,) = run(
        bad(lambda graph: swap(graph, "relu", aten.clamp_min.default, node(graph, "relu").args[0], 0))
    )
    assert record.error == ""
    assert node(gm.graph, "clamp_min").meta["val"].shape == (3, 4)


def wrong_number(graph):
    node(graph, "mul").args = (node(graph, "mul").args[0], 3)


def new_and_wrong(graph):
    old = node(graph, "mul")
    line = old.meta["stack_trace"]  # as the API gives it to what a rule makes
    swap(graph, "mul", aten.mul.Tensor, old.args[0], 3).meta["stack_trace"] = line


def wrong_early(graph):
    node(graph, "relu").target = aten.neg.default


@pytest.mark.parametrize(
    ("what", "named"), [(wrong_number, "node mul"), (new_and_wrong, "node mul_"), (wrong_early, "node relu")]
)
def test_wrong_numbers_are_found_when_asked_for_and_their_node_is_named(what, named):
    _, (wrong, right) = run(bad(what), Second(), verify="numerics")
    assert re.search(rf"the pass changed the numbers of output \d, first those of {named}", wrong.error)
    assert "test_pipeline.py" in wrong.error and right.error == ""


def test_nothing_is_checked_when_not_asked_for():
    gm, record = capture(model, *inputs()), GraphRecord()
    run_passes(gm, Options(verify="none"), record, (), [bad(wrong_number)])
    assert record.passes[0].error == ""


def test_effects_keep_their_order():
    def writes(x, y):
        a, b = x.clone(), y.clone()
        a.detach().add_(1)  # it stays a write
        b.detach().mul_(2)
        return a, b

    def swapped(graph):
        node(graph, "mul_").append(node(graph, "add_"))

    _, (record,) = run(bad(swapped), model=writes)
    assert "the order of nodes with effects" in record.error
    assert "test_pipeline.py" in record.error


def reached_from_outside(x, y):
    x.add_(1)
    z = x * 2
    return z, y[:1], z.relu()


def forgets(graph):
    write = node(graph, "add_")
    write.replace_all_uses_with(write.args[0])
    graph.erase_node(write)


def writes_again(graph):
    write = node(graph, "add_")
    with graph.inserting_after(write):
        graph.call_function(write.target, write.args)


def copies(graph):
    view = node(graph, "slice")
    with graph.inserting_after(view):
        copy = graph.call_function(aten.clone.default, (view,))
    view.replace_all_uses_with(copy, delete_user_cb=lambda user: user is not copy)


def copies_what_a_view_is_of(graph):
    view = node(graph, "slice")
    with graph.inserting_before(view):
        copy = graph.call_function(aten.clone.default, view.args[:1])
    view.update_arg(0, copy)  # its meta["val"] is still a view of the input


def makes_a_view_of_nothing(graph):
    view = node(graph, "slice")
    view.target, view.args = aten.slice_copy.Tensor, view.args


def returns_a_view(graph):
    swap(graph, "relu", aten.view.default, node(graph, "relu").args[0], [3, 4])


def returns_a_view_of_an_input(graph):
    given = next(n for n in graph.nodes if n.op == "placeholder")
    swap(graph, "relu", aten.view.default, given, [3, 4])


WRITTEN = "the pass changed what is written to input l_x_\n  expected: 1 write\n  got: "
SHARED = "the pass changed what output {} shares memory with\n  expected: {}\n  got: {}"


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (forgets, f"{WRITTEN}0\n  where: test_pipeline.py"),
        (writes_again, f"{WRITTEN}2"),
        (copies, SHARED.format(1, "input l_y_", "nothing")),
        (copies_what_a_view_is_of, SHARED.format(1, "input l_y_", "nothing")),
        (makes_a_view_of_nothing, SHARED.format(1, "input l_y_", "nothing")),
        (returns_a_view, SHARED.format(2, "nothing", "output 0")),
        (returns_a_view_of_an_input, SHARED.format(2, "nothing", "input l_x_")),
    ],
)
def test_writes_to_inputs_and_shared_memory_are_preserved(what, sentence):
    gm, record = capture(reached_from_outside, *inputs()), GraphRecord()
    before = text(gm)
    run_passes(gm, Options(), record, (), [bad(what), Second()])
    assert sentence in record.passes[0].error and record.passes[1].error == ""
    assert text(gm) == before


def test_a_graph_with_effects_is_not_run_for_its_numbers(caplog):
    _, (record,) = run(Second(), verify="numerics", model=lambda x, y: ((x * 2).detach().add_(1), y * 1))
    assert record.error == "" and "verify=numerics is not possible" in caplog.text


def test_a_pass_beyond_the_wanted_numerics_is_skipped():
    @dataclass(frozen=True)
    class Approximate(Pass):
        numerics = "fast"

        def run(self, graph, ctx):
            raise AssertionError("it must not run")

    _, (record,) = run(Approximate())
    assert record.skipped == "its numerics are fast, and reassociate was asked for" and not record.error


def test_dynamic_sizes_get_no_guards():
    gm = None

    def backend(captured, given):
        nonlocal gm
        from recompile.capture import capture

        gm = capture(captured).gm
        env = next(n.meta["val"] for n in gm.graph.nodes if n.op == "placeholder").node.shape_env
        before = len(env.guards)
        change = bad(
            lambda graph: swap(graph, "relu", aten.clamp_min.default, node(graph, "relu").args[0], 0)
        )
        record = GraphRecord()
        run_passes(gm, Options(strict=True), record, given, [change])
        assert len(env.guards) == before
        return captured.forward

    torch.compile(lambda x: x.relu() + 1, backend=backend, dynamic=True)(torch.randn(5, 3))
    assert all(isinstance(size, torch.SymInt) for size in node(gm.graph, "clamp_min").meta["val"].shape)


@dataclass(frozen=True)
class DoubleByAdding(Rule):
    """x * 2 -> x + x"""

    numerics = "exact"

    def pattern(self, op):
        return op.mul(op.var("x"), 2)

    def check(self, m):
        if m.val("x").dim() > 1:
            raise Refuse("x is a matrix", at=m["x"])

    def rewrite(self, m):
        return m.op.add(m["x"], m["x"])


class Twice(nn.Module):
    def forward(self, x):
        return x.relu() * 2


def test_assert_rewrites_compares_text_and_numbers():
    assert_rewrites(
        DoubleByAdding,
        Twice(),
        [torch.randn(3)],
        expect="""
            relu = relu(l_x_)
            add = add(relu, relu)
            return (add,)
        """,
    )


def test_assert_rewrites_says_why_it_did_not():
    with pytest.raises(AssertionError, match=r"double-by-adding did not fire\n  x is a matrix \[relu\]"):
        assert_rewrites(DoubleByAdding, Twice(), [torch.randn(3, 3)])


def test_assert_refuses_asks_for_the_sentence():
    refusal = assert_refuses(DoubleByAdding(), Twice(), [torch.randn(3, 3)], why="a matrix", at="relu")
    assert "return x.relu() * 2" in refusal.line
    with pytest.raises(AssertionError, match="it says\n  x is a matrix"):
        assert_refuses(DoubleByAdding(), Twice(), [torch.randn(3, 3)], why="a vector")
    with pytest.raises(AssertionError, match="double-by-adding fired"):
        assert_refuses(DoubleByAdding(), Twice(), [torch.randn(3)])
