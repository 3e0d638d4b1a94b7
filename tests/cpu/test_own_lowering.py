"""A region operator of a user's own: it fires, equals eager, falls back, is cached truthfully, and fails with a name.

The user's file is made of the blocks of docs/writing-a-lowering.md that define something.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recompile
from recompile.cli import main
from recompile.errors import RegionError
from recompile.lowering import region, regions
from recompile.rewrite import registry
from recompile.testing import assert_refuses, assert_rewrites, assert_same

PAGE = Path(__file__).parents[2] / "docs" / "writing-a-lowering.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
SOURCE = "\n\n".join(block for block in BLOCKS if re.search(r"^(class|@region)", block, re.MULTILINE))
NO_KERNEL = "no kernel for float64 on cpu: its reference is compiled"


@pytest.fixture
def own(tmp_path, monkeypatch):
    """The user's file as a module; what it registers is gone after the test."""
    torch._dynamo.reset()
    monkeypatch.setattr(registry, "_known", dict(registry.registered()))
    (tmp_path / "page.py").write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("page", tmp_path / "page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def drawn(batch, count=27, width=16):
    torch.manual_seed(batch)
    return [torch.randn(batch, width) for _ in range(count)]


def outcome(call, given, dtype):
    """The output and the gradients for a fixed gradient of it, computed in `dtype`, as float32."""
    inputs = [x.to(dtype).requires_grad_() for x in given]
    out = call(inputs[0], inputs[1:])
    torch.manual_seed(0)
    grad = torch.randn(out.shape, dtype=torch.float64).to(dtype)
    return [x.float() for x in (out, *torch.autograd.grad(out, inputs, grad))]


def assert_equals_eager_in_float64(own, call, given):
    found = outcome(call, given, torch.float32)
    expected = outcome(own.DotInteraction(), given, torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def test_it_fires_and_the_products_are_gone(own):
    x = drawn(5, count=3)
    gm = assert_rewrites(own.FuseInteraction, own.DotInteraction(), (x[0], x[1:]))
    (made,) = (node for node in gm.graph.nodes if node.target is own.interaction.op)
    assert made.args[2] == own.interaction.spec() and made.args[2].startswith("Spec()  # ")
    left = {str(node.target) for node in gm.graph.nodes if node.op == "call_function"}
    assert left == {"aten.unsqueeze.default", "aten.cat.default", "recompile.interaction.default"}


def test_it_refuses_the_pairs_of_other_fields(own):
    def model(dense, fields):
        i, j = torch.tril_indices(4, 4, offset=-1)
        return torch.cat([dense, (fields @ fields.mT)[:, i, j]], dim=1)

    given = torch.randn(3, 8), torch.randn(3, 5, 8)
    assert_refuses(own.FuseInteraction, model, given, "the pairs are not those of 5 fields")


@pytest.mark.parametrize("dynamic", [False, None, True])
def test_it_equals_eager_forward_and_backward(own, dynamic):
    options = {"strict": True}
    compiled = torch.compile(own.DotInteraction(), backend="recompile", dynamic=dynamic, options=options)
    for batch in (7, 64, 1):
        assert_equals_eager_in_float64(own, compiled, drawn(batch))


def test_fields_and_widths_that_fill_no_register(own):
    for count, width in ((2, 1), (17, 5)):
        torch._dynamo.reset()
        compiled = torch.compile(own.DotInteraction(), backend="recompile", options={"strict": True})
        assert_equals_eager_in_float64(own, compiled, drawn(3, count, width))


def test_strided_inputs_are_copied(own):
    fields = torch.randn(6, 9, 4).transpose(1, 2)
    model = own.interaction.reference
    found = torch.compile(lambda x, f: own.interaction.op(x, f, own.interaction.spec()), backend="recompile")
    dense = torch.randn(9, 6).T
    torch.testing.assert_close(found(dense, fields), model(dense, fields))


def test_a_dtype_without_a_kernel_is_compiled_from_the_reference(own):
    x = drawn(6)
    report = assert_same(own.DotInteraction(), (x[0], x[1:]), train=True)
    (found,) = report.graphs[0].regions
    assert found.op == "recompile.interaction.default" and found.summary.endswith(NO_KERNEL)


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2.0 * x


def test_only_the_dtype_that_a_kernel_is_for_tells_that_it_is_wrong(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setitem(registry._known, "fuse-multiple", FuseMultiple)
    region(cpp=multiple_cpp)(multiple)
    assert_same(Twice(), (torch.randn(4),), train=True, dtype=torch.float32)
    region(cpp=lambda x, out, *, threads, by: multiple_cpp(x, out, threads=threads, by=by + 1))(multiple)
    assert_same(Twice(), (torch.randn(4),))
    with pytest.raises(AssertionError, match="not close"):
        assert_same(Twice(), (torch.randn(4),), dtype=torch.float32)


def test_the_report_and_the_dump_show_it(own, tmp_path, capsys):
    x = [x.requires_grad_() for x in drawn(6)]
    with recompile.dump(tmp_path / "out") as out:
        torch.compile(own.DotInteraction(), backend="recompile")(x[0], x[1:]).sum().backward()
    assert main(["show", str(out)]) == 0
    line = "Pairwise dot products of the fields, behind the dense vector; dense [6, 16], fields [6, 27, 16]"
    assert f"interaction: {line}" in " ".join(capsys.readouterr().out.split())
    kernels = {path.name: path.read_text() for path in (out / "graph-0" / "kernels").iterdir()}
    forward, backward = (kernels[f"interaction{way}.cpp"] for way in ("", "-backward"))
    assert "region interaction, made by fuse-interaction" in forward
    assert "void interaction(const float* __restrict__ dense, const float* __restrict__ fields" in forward
    assert "gradients of region interaction" in backward and "dense_grad[b * 16 + d] = *g++;" in backward


def test_no_script_is_written_for_it(own, tmp_path, capsys):
    x = drawn(6)
    with recompile.dump(tmp_path / "out") as out, torch.no_grad():
        torch.compile(own.DotInteraction(), backend="recompile")(x[0], x[1:])
    assert main(["repro", str(out), "interaction"]) == 2
    assert "interaction is a region of your own" in capsys.readouterr().err


CACHED = """
import json, torch, page
from torch._dynamo.utils import counters

x = [torch.ones(4, 3) for _ in range(5)]
out = torch.compile(page.DotInteraction(), backend="recompile", options={"strict": True})(x[0], x[1:])
found = {**counters["inductor"], **counters["aot_autograd"]}
keys = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass", "autograd_cache_hit")
print(json.dumps([out.sum().item(), *(found.get(key, 0) for key in keys)]))
"""


def test_a_changed_generator_misses_the_caches(tmp_path):
    """AOTAutograd's cache answers before Inductor's, and both have the operator's spec in their key."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
        "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": "1",
        "PYTHONPATH": str(tmp_path),
        "PYTHONDONTWRITEBYTECODE": "1",  # which a change within the same second would not renew
    }

    def run(source):
        (tmp_path / "page.py").write_text(source)
        command = [sys.executable, "-c", CACHED]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    total, *first = run(SOURCE)
    assert total == 4 * (3 + 10 * 3) and first == [0, 1, 0, 0]
    again, *hits = run(SOURCE)
    assert again == total and hits == [1, 0, 0, 1]
    doubled, *other = run(SOURCE.replace("*o++ = dots[j]", "*o++ = 2 * dots[j]"))
    assert doubled == 4 * (3 + 10 * 6) and other == [0, 1, 0, 0]


def multiple_cpp(x, out, *, threads, by):
    return f"for (int64_t b = 0; b < {x.sizes[0]}; ++b) out[b] = {by} * x[b];"


def multiple(x: Tensor, *, by: float = 2.0) -> Tensor:
    """A multiple."""
    return by * x


def compiled(made, **constants):
    return torch.compile(lambda x: made.op(x, made.spec(**constants)), backend="recompile")


def test_constants_and_gradients_through_the_reference():
    torch._dynamo.reset()
    made = region(cpp=multiple_cpp)(multiple)
    x = torch.randn(5, requires_grad=True)
    out = compiled(made, by=3.0)(x)
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close((out, grad), (3 * x, torch.full((5,), 3.0)))
    assert made.parse(made.spec(by=3.0)) == {"by": 3.0}
    torch.testing.assert_close(made(x), 2 * x)


def capped(x: Tensor, c: Tensor, *, most: float = float("inf"), least: float = float("-inf")) -> Tensor:
    """Twice the square of x, times that of a complex c."""
    return (2 * x * x).clamp(least, most) * (c * c.conj()).real


def test_a_gradient_of_a_gradient_complex_inputs_and_infinite_constants():
    x, c = torch.randn(3, requires_grad=True), torch.randn(3, dtype=torch.complex64, requires_grad=True)

    def twice(function):
        out = function(x, c)
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return out, *torch.autograd.grad((slope**2 + x * slope).sum() + out.sum(), (x, c))

    torch.testing.assert_close(twice(region()(capped)), twice(capped))


def picked(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and where they are from."""
    return x[ids] * 2, ids + 1


def test_whole_numbers_have_no_gradient():
    torch._dynamo.reset()
    made = region()(picked)
    x, ids = torch.randn(5, 3, requires_grad=True), torch.tensor([4, 4, 0])
    call = torch.compile(lambda x, ids: made.op(x, ids, made.spec()), backend="recompile")
    rows, places = call(x, ids)
    (grad,) = torch.autograd.grad(rows.sum(), x)
    assert places.tolist() == [5, 5, 1] and grad[:, 0].tolist() == [2, 0, 0, 0, 4]


def test_the_same_definition_again_replaces_the_region():
    torch._dynamo.reset()
    x = torch.ones(3)
    for text in ("x[b] + 1", "x[b] + 2"):
        body = f"for (int b = 0; b < 3; ++b) out[b] = {text};"
        made = region(cpp=lambda x, out, *, body=body, **_: body)(multiple)
        torch._dynamo.reset()
        assert compiled(made)(x).tolist() == [float(text[-1]) + 1] * 3


def test_a_function_without_a_file_is_in_no_cache():
    scope = {"Tensor": Tensor, "__name__": "notebook"}
    exec("def halved(x: Tensor) -> Tensor:\n    return x / 2", scope)
    assert region()(scope["halved"]).spec() != region()(scope["halved"]).spec()
    assert region(cpp=multiple_cpp)(multiple).spec() == region(cpp=multiple_cpp)(multiple).spec()


def broken_python(x, out, *, threads, by):
    return f"{x.size_of_it};"


def broken_cpp(x, out, *, threads, by):
    return "int n = 0;\nfor (;;) out[0] = undeclared;"


def no_out(x, *, threads, by):
    return ""


def no_text(x, out, *, threads, by):
    return None


@dataclass(frozen=True)
class FuseMultiple(recompile.Rule):
    """2 * x -> recompile.multiple(x)"""

    def pattern(self, op):
        return op.mul(op.var("x"), 2.0)

    def rewrite(self, m):
        return m.builder.call(regions["multiple"].op, m["x"], regions["multiple"].spec())


@pytest.mark.parametrize(
    "cpp, sentence",
    [
        (
            broken_python,
            r"the C\+\+ generator of region multiple failed; got: AttributeError.*size_of_it.*broken_python",
        ),
        (
            broken_cpp,
            r"the C\+\+ of region multiple does not compile; got: line 2: .undeclared. was not declared",
        ),
        (no_text, r"the C\+\+ generator of region multiple gives no text; expected: str; got: None"),
    ],
    ids=["python", "cpp", "no-text"],
)
def test_a_broken_generator_costs_the_kernel_and_says_so(cpp, sentence, monkeypatch):
    monkeypatch.setitem(registry._known, "fuse-multiple", FuseMultiple)
    region(cpp=cpp)(multiple)
    x = torch.randn(4)
    with pytest.warns(UserWarning, match=sentence):
        report = recompile.explain(lambda x: 2.0 * x, x)
    assert re.search(sentence, report.graphs[0].fallback.why) and not report.graphs[0].regions
    assert "try: " in report.graphs[0].fallback.why
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=sentence):
        recompile.explain(lambda x: 2.0 * x, x, options={"strict": True})


def constant_first(scale: float, x: Tensor) -> Tensor:
    return scale * x


def lookup(x: Tensor) -> Tensor:
    return x


def no_result(x: Tensor):
    return x


def test_definitions_that_cannot_work():
    with pytest.raises(RegionError, match=r"region constant_first cannot have the parameter `scale: float`"):
        region()(constant_first)
    with pytest.raises(RegionError, match="two region operators are called 'lookup'"):
        region()(lookup)
    with pytest.raises(
        RegionError,
        match=r"the backward of region multiple has another name(.|\n)*expected: multiple_backward\(by\)",
    ):
        region(backward=region()(multiple))(multiple)
    made = region()(multiple)
    with pytest.raises(
        RegionError, match=r"was given other constants\n  expected: by\n  got: \{'times': 3\}"
    ):
        made.spec(times=3)
