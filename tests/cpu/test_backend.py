"""The backend as users meet it: how it is found, set and used; and it never fails where Inductor compiles."""

import copy
import subprocess
import sys
import threading
import warnings
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from recompile import Pass, backend, explain
from recompile.errors import CaptureError, IndexOutOfRange
from recompile.explain import compiling
from recompile.report import collect, last_report, reset
from recompile.rewrite import registry
from recompile.testing import assert_same


class Tower(nn.Module):
    """Four fields side by side, and one layer."""

    def __init__(self, dim=4):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(20, dim) for _ in range(4))
        self.top = nn.Linear(4 * dim, 2)

    def forward(self, ids):
        return self.top(torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1))


def ids(batch=5):
    return torch.randint(0, 20, (batch, 4))


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()
    reset()
    backend._warned.clear()


@pytest.fixture
def settings(monkeypatch):
    """What `compile_fx` was given as config, one entry a graph; the graph then runs as it is."""
    seen = []

    def compile_fx(gm, inputs, config_patches=None):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    return seen


def only_graph():
    (graph,) = last_report().graphs
    return graph


def test_the_entry_point_needs_no_import():
    script = """
import sys, torch
assert "recompile" not in sys.modules
assert "recompile" in torch._dynamo.list_backends()
f = torch.compile(lambda x: x.relu() + 1, backend="recompile")
torch.testing.assert_close(f(torch.tensor([-1.0, 2.0])), torch.tensor([1.0, 3.0]))
assert "recompile" in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"options": {"strickt": True}}, "OptionError: unknown option 'strickt'; did you mean 'strict'?"),
        ({"options": {"passes": "fuse-lookup"}}, "unknown pass 'fuse-lookup'; did you mean 'fuse-lookups'?"),
        ({"mode": "max-autotun"}, "unknown mode 'max-autotun'; did you mean 'max-autotune'?"),
    ],
)
def test_bad_settings_are_errors(given, sentence):
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        torch.compile(Tower(), backend="recompile", **given)(ids())
    assert sentence in str(caught.value)


def test_mode_reaches_inductor(settings):
    torch.compile(Tower(), backend="recompile", mode="max-autotune-no-cudagraphs")(ids())
    mode = torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    assert settings == [mode | {"size_asserts": False}]  # the latter is ours, for a graph with a region


def test_size_asserts_stay_where_nothing_is_fused_or_the_user_asks(settings):
    torch.compile(torch.nn.Linear(2, 2), backend="recompile")(torch.randn(1, 2))
    options = {"inductor": {"size_asserts": True}}
    torch.compile(Tower(), backend="recompile", options=options)(ids())
    assert not settings[0] and settings[1]["size_asserts"] is True


def test_inductor_settings_win_over_mode(settings):
    def call(gm, inputs):
        options = {"inductor": {"max_autotune": False}}
        return backend.recompile(gm, inputs, mode="max-autotune", options=options, name="of a later torch")

    torch.compile(Tower(), backend=call)(ids())
    assert settings[0]["max_autotune"] is False and settings[0]["triton.cudagraphs"] is True


def test_inductor_settings_reach_inductor():
    options = {"inductor": {"epilogue_fusion": False, "cpp.threads": 1}}
    assert_same(Tower(), [ids()], options=options)


def refuse(gm):
    raise CaptureError("it holds a black box.", "box", "model.py:3 in forward: box(x)")


def test_a_graph_that_cannot_be_captured_goes_to_inductor_and_says_so_once(monkeypatch):
    monkeypatch.setattr(backend, "capture", refuse)
    model, x = Tower(), ids()
    with pytest.warns(UserWarning, match="it holds a black box") as caught:
        compiled = torch.compile(model, backend="recompile")
        torch.testing.assert_close(compiled(x), model(x))
        torch.testing.assert_close(compiled(ids(1)[:, :]).shape, torch.Size([1, 2]))
    assert len([w for w in caught if "black box" in str(w.message)]) == 1
    assert "(model.py:3 in forward: box(x))" in str(caught[0].message)
    for graph in last_report().graphs:
        assert (graph.fallback.why, graph.fallback.node) == ("it holds a black box.", "box")


def test_the_graph_that_goes_to_inductor_is_dynamos_own(monkeypatch, settings):
    given = []

    def change_and_fail(gm, *_):
        given.append(str(gm.graph))
        gm.graph.erase_node(gm.graph.output_node())
        raise ZeroDivisionError("our fault")

    def call(gm, inputs):
        before = str(gm.graph)
        result = backend.recompile(gm, inputs)
        assert str(gm.graph) == before
        return result

    monkeypatch.setattr(backend, "run_passes", change_and_fail)
    model, x = Tower(), ids()
    with pytest.warns(UserWarning, match="because recompile has an internal error, ZeroDivisionError: our"):
        torch.testing.assert_close(torch.compile(model, backend=call)(x), model(x))
    assert given and only_graph().fallback is not None


def test_strict_makes_a_fallback_an_error(monkeypatch):
    monkeypatch.setattr(backend, "capture", refuse)
    with pytest.raises(Exception, match="StrictError: a graph fell back to plain Inductor") as caught:
        torch.compile(Tower(), backend="recompile", options={"strict": True})(ids())
    assert "model.py:3 in forward" in str(caught.value)


@dataclass(frozen=True)
class Clumsy(Pass):
    after = ("fuse-lookups",)

    def run(self, graph, ctx):
        graph.erase_node(graph.output_node())
        raise ValueError("oops")


def test_a_pass_that_raises_is_undone(monkeypatch):
    monkeypatch.setitem(registry._known, "clumsy", Clumsy)
    report = assert_same(Tower(), [ids()], train=True, options={"strict": False})
    (graph,) = report.graphs
    assert [p.error for p in graph.passes if p.error] == ["ValueError: oops"]
    assert len(graph.regions) == 1 and graph.fallback is None


def test_a_pass_that_raises_is_an_error_under_strict(monkeypatch):
    monkeypatch.setitem(registry._known, "clumsy", Clumsy)
    with pytest.raises(Exception, match="StrictError: pass clumsy failed"):
        torch.compile(Tower(), backend="recompile", options={"strict": True})(ids())
    with pytest.raises(Exception, match="StrictError: pass clumsy failed"):
        assert_same(Tower(), [ids()])


def test_inductors_own_errors_pass_through(monkeypatch):
    def compile_fx(*_, **__):
        raise KeyError("of Inductor")

    monkeypatch.setattr(backend, "compile_fx", compile_fx)
    with pytest.raises(Exception, match="KeyError: 'of Inductor'"):
        torch.compile(Tower(), backend="recompile")(ids())
    assert only_graph().fallback is None


def test_a_kernels_complaint_about_an_id_is_eagers_error():
    def compiled(sentence):
        raise RuntimeError(sentence)

    compiled._boxed_call = True
    call = backend._naming_bad_ids(compiled)
    assert call._boxed_call
    with pytest.raises(IndexOutOfRange, match=r"^index out of range: table 'a' has 3 rows, got id 5\n"):
        call("recompile: index out of range: table 'a' has 3 rows, got id 5")
    with pytest.raises(RuntimeError, match=r"^recompile: the offsets are not monotonic$") as caught:
        call("recompile: the offsets are not monotonic")
    assert type(caught.value) is RuntimeError


def count_graphs(name, mark=False, **how):
    """How many graphs five batch sizes need; the results are compared with eager's."""
    torch._dynamo.reset()
    counter, model = CompileCounterWithBackend(name), Tower()
    compiled = torch.compile(model, backend=counter, fullgraph=True, **how)
    for batch in (2, 7, 64, 2) if mark or how else (1, 2, 7, 64, 1):
        x = ids(batch)
        if mark:
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x), model(x))
    return counter.frame_count


@pytest.mark.parametrize(
    "how", [{}, {"dynamic": True}, {"mark": True}], ids=["automatic", "dynamic", "marked"]
)
def test_batch_sizes_need_no_more_graphs_than_inductor(how):
    count = count_graphs("recompile", **how)
    graphs = last_report().graphs
    # Inductor may have a graph traced again, but only when it compiles it for the first time.
    assert count in (len(graphs), len(graphs) + 1)
    with torch._inductor.config.patch(force_disable_caches=True):
        assert count_graphs("recompile", **how) == count_graphs("inductor", **how)
    assert all(graph.fallback is None and graph.regions for graph in graphs), graphs


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(context):
    model, x = Tower(), ids()
    with context():
        actual = torch.compile(model, backend="recompile")(x)
        torch.testing.assert_close(actual, model(x))
    assert not actual.requires_grad and only_graph().regions


def test_training_steps_equal_eagers():
    eager = Tower().double()
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend="recompile")
    for step, m in [(eager, eager), (compiled, model)]:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(m.parameters(), 0.1)
        for batch in (5, 7, 5):
            optimizer.zero_grad()
            step(ids(batch)).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(dict(model.state_dict()), dict(eager.state_dict()))


def test_autocast():
    model, x = Tower(16), ids()
    with torch.autocast("cpu", torch.bfloat16):
        compiled = torch.compile(model, backend="recompile")
        actual, expected = compiled(x), model(x)
        actual.float().sum().backward()
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
    assert model.tables[0].weight.grad is not None


def test_autocast_inside_the_model():
    class Inside(Tower):
        def forward(self, ids):
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(ids)

    model, x = Inside(16), ids()
    torch.testing.assert_close(torch.compile(model, backend="recompile")(x), model(x), rtol=2e-2, atol=2e-2)
    assert only_graph().fallback is None


def test_several_models_in_one_process():
    models = [Tower(dim) for dim in (3, 4, 8)]
    compiled = [torch.compile(model, backend="recompile") for model in models]
    for _ in range(2):
        for model, call in zip(models, compiled, strict=True):
            x = ids()
            torch.testing.assert_close(call(x), model(x))
    assert [graph.index for graph in last_report().graphs] == [0, 1, 2]


def test_threads():
    failures = []

    def work(dim):
        try:
            model = Tower(dim)
            compiled = torch.compile(model, backend="recompile")
            for batch in (5, 7):
                x = ids(batch)
                torch.testing.assert_close(compiled(x), model(x))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(dim,)) for dim in (3, 5, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(graph.fallback is None for graph in last_report().graphs)


def test_nothing_is_warned_about_a_model_that_is_captured():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="recompile")
        torch.compile(Tower(), backend="recompile")(ids())


def test_explain_reports_only_its_own_graphs_and_always_compiles(settings):
    model, x = Tower(), ids()
    torch.compile(model, backend="recompile")(x)
    for train in (False, True):
        report = explain(model, x, train=train)
        assert len(report.graphs) == 1
        assert "4 lookups over 4 tables -> concat" in report.text()
        assert "test_backend.py" in report.text()
    assert len(last_report().graphs) == 3


def test_what_was_compiled_before_stays_compiled(settings):
    model, x = Tower(), ids()
    compiled = torch.compile(model, backend="recompile")
    compiled(x)
    explain(model, x)
    count = len(settings)
    compiled(x)
    assert len(settings) == count


def test_reports_of_one_block(settings):
    with compiling() as (report, fresh):
        torch.compile(Tower(), backend=fresh)(ids())
        torch.compile(lambda x: x + 1, backend=fresh)(torch.ones(2))
    assert len(report.graphs) == 2


def test_a_graph_that_inductor_refuses_from_us_is_compiled_as_it_was(monkeypatch):
    """Inductor's own patterns may stumble over a graph that only we hand it."""
    plain = backend.compile_fx

    def stumble(gm, inputs, **settings):
        if any(str(node.target).startswith("recompile.") for node in gm.graph.nodes):
            raise RuntimeError("a pattern stumbled")
        return plain(gm, inputs, **settings)

    monkeypatch.setattr(backend, "compile_fx", stumble)
    model, x = Tower(), ids()
    torch._dynamo.reset()
    with collect() as report, pytest.warns(UserWarning, match="a pattern stumbled"):
        torch.testing.assert_close(torch.compile(model, backend="recompile")(x), model(x))
    assert "a pattern stumbled" in report.graphs[0].fallback.why and not report.graphs[0].regions
    torch._dynamo.reset()
    with pytest.raises(Exception, match="fell back to plain Inductor"):
        torch.compile(model, backend="recompile", options={"strict": True})(x)
