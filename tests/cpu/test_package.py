"""Packages of AOTInductor with our kernels in them: run in a process of their own, which never imports recompile."""

import copy
import json
import subprocess
import sys
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_map

import recompile
from benchmarks.models.attention import Causal, Hstu
from recompile import backend
from recompile.cli import main
from recompile.errors import CaptureError, OptionError, RecompileError, StrictError
from recompile.lowering import Operand, region
from recompile.report import reset
from recompile.zoo import build

module = sys.modules["recompile.package"]  # its name is that of the function

RUN = """
import json, sys, torch
run = torch._inductor.aoti_load_package(sys.argv[1])
cases, wrong = torch.load(sys.argv[2])
for given, expected in cases:
    torch.testing.assert_close(run(*given), expected, rtol=1e-4, atol=2e-5)
said = []
for given in wrong:
    try:
        run(*given)
    except Exception as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps({"said": said, "imported": "recompile" in sys.modules}))
"""


@pytest.fixture(autouse=True)
def afresh():
    reset()
    backend._warned.clear()


def in_float64(model, given):
    """Eager's outputs, computed in float64."""
    wide = tree_map(lambda x: x.double() if x.is_floating_point() else x, given)
    with torch.no_grad():
        return tree_map(lambda x: x.float(), copy.deepcopy(model).double()(*wide))


def assert_runs_afresh(path, model, inputs, wrong=(), says=None):
    """Asserts eager's numbers in another process, and that it raises for the wrong inputs and says this."""
    cases = [(given, in_float64(model, given)) for given in inputs]
    torch.save((cases, list(wrong)), f"{path}.cases")
    command = [sys.executable, "-c", RUN, path, f"{path}.cases"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found["imported"]
    assert [error.partition(":")[0] for error in found["said"]] == ["RuntimeError"] * len(wrong)
    # Older torch writes what a kernel threw to stderr, and raises "API call failed".
    said = found["said"] if torch.__version__ >= "2.13" else [done.stderr] * len(wrong)
    assert [text for text in said if says not in text] == []


def any_batch(given):
    batch = Dim("batch", min=1, max=4096)
    return tree_map(lambda _: {0: batch}, given)


def regions():
    (graph,) = recompile.last_report().graphs
    assert graph.fallback is None
    return [region.op.split(".")[1] for region in graph.regions]


def test_bags_with_offsets_of_any_batch_and_ids_out_of_range(tmp_path):
    built = build("own.DLRM", scale=0.01)
    given = built.inputs(6)
    shapes = any_batch(given)
    shapes = (shapes[0], [{0: Dim.AUTO} for _ in given[1]], shapes[2])
    path = recompile.package(
        built.model,
        given,
        dynamic_shapes=shapes,
        path=tmp_path / "made" / "dlrm.pt2",
        options={"strict": True},
    )
    assert path == str(tmp_path / "made" / "dlrm.pt2") and regions() == ["lookup"]
    bad = copy.deepcopy(given)
    bad[1][3][4] = -7
    says = "recompile: index out of range: table 'bags.3.weight' has 1000 rows, got id -7"
    assert_runs_afresh(path, built.model, [given, built.inputs(9)], [bad], says)


def test_one_id_a_field_of_any_batch(tmp_path):
    built = build("rechub.DeepFM", scale=0.01)
    given = built.inputs(4)
    program = torch.export.export(built.model.eval(), given, dynamic_shapes=any_batch(given))
    before = str(program.graph)
    path = recompile.package(program, path=tmp_path / "deepfm.pt2", options={"strict": True})
    assert regions() == ["lookup"] and str(program.graph) == before
    (bad,) = copy.deepcopy(given)
    bad["C7"][1] = 10**7
    says = "table 'embedding.embed_dict.C7.weight' has 1000 rows, got id 10000000"
    assert_runs_afresh(path, built.model, [given, built.inputs(1), built.inputs(33)], [(bad,)], says)


def test_a_history_and_its_candidate(tmp_path):
    built = build("rechub.DIN", scale=0.01)
    given = built.inputs(5)
    path = recompile.package(built.model.eval(), given, path=tmp_path / "din.pt2", options={"strict": True})
    assert regions() == ["lookup"]
    assert_runs_afresh(path, built.model, [given])


class Sasrec(nn.Module):
    """Two causal blocks over the items of a user's history, as SASRec has them."""

    def __init__(self, items=50, length=20, width=16):
        super().__init__()
        self.items, self.places = nn.Embedding(items, width), nn.Embedding(length, width)
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))

    def forward(self, history):
        x = self.items(history) + self.places.weight
        later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        for layer in self.layers:
            q, k, v = (y.unflatten(-1, (2, 8)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            scores = (q @ k.transpose(-2, -1) / 8**0.5).masked_fill(later, -1e9)
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)
        return x


def test_two_attentions_of_any_batch_and_what_the_dump_shows(tmp_path):
    model, given, more = Sasrec(), torch.randint(0, 50, (3, 20)), torch.randint(0, 50, (8, 20))
    with recompile.dump(tmp_path / "out"):
        path = recompile.package(
            model,
            (given,),
            dynamic_shapes=any_batch((given,)),
            path=tmp_path / "sasrec.pt2",
            options={"strict": True},
        )
    assert regions() == ["attention"] * 2
    kernels = {file.name for file in (tmp_path / "out" / "graph-0" / "kernels").iterdir()}
    assert {"attention.cpp", "attention_1.cpp", "inductor.cpp"} < kernels
    assert_runs_afresh(path, model, [(given,), (more,)])


def test_hstus_attention(tmp_path):
    model, stamps = Hstu(2, 40, 2, 16), torch.randint(0, 10**6, (2, 41)).cumsum(1)
    path = recompile.package(model, (stamps,), path=tmp_path / "hstu.pt2", options={"strict": True})
    assert regions() == ["attention"]
    assert_runs_afresh(path, model, [(stamps,)])


def multiple_cpp(x: Operand, out: Operand, *, threads: int, by: float) -> str:
    return f"for (int64_t i = 0; i < {x.sizes[0]} * {x.sizes[1]}; ++i) out[i] = {by} * x[i];"


@region(cpp=multiple_cpp)
def packaged_multiple(x: torch.Tensor, *, by: float) -> torch.Tensor:
    """A multiple."""
    return x * by


class Own(nn.Module):
    """Calls a region of a user's own twice."""

    def forward(self, x, y):
        return packaged_multiple(x, by=3.0) + packaged_multiple(y.relu(), by=-2.0)


def test_a_users_own_region(tmp_path):
    given = torch.randn(3, 5), torch.randn(3, 5)
    path = recompile.package(
        Own(), given, dynamic_shapes=any_batch(given), path=tmp_path / "own.pt2", options={"strict": True}
    )
    assert regions() == ["packaged_multiple"] * 2
    with zipfile.ZipFile(path) as found:
        text = "".join(found.read(name).decode() for name in found.namelist() if name.endswith(".cpp"))
    assert text.count("RECOMPILE_VECTORIZED void packaged_multiple(") == 2
    assert_runs_afresh(path, Own(), [given, (torch.randn(7, 5), torch.randn(7, 5))])


class Twice(nn.Module):
    """Two causal attentions and a bag."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(20, 4) for _ in range(2))
        self.first, self.second = Causal(2, 24, 1, 8), Causal(2, 24, 1, 8)

    def forward(self, ids):
        pooled = torch.cat([bag(ids) for bag in self.bags], 1)
        return self.first() + self.second() * pooled[:, None]


def test_inductors_cpp_wrapper_compiles_the_same_kernels(tmp_path):
    model, ids = Twice(), torch.randint(0, 20, (2, 3))
    options = {"strict": True, "inductor": {"cpp_wrapper": True}}
    with recompile.dump(tmp_path / "out"):
        compiled = torch.compile(model, backend="recompile", options=options)
        found, expected = compiled(ids), model(ids)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-5)
        gradients = [torch.autograd.grad(out.square().sum(), model.parameters()) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=2e-5)
    assert sorted(regions()) == ["attention", "attention", "lookup"]
    kernels = {file.name for file in (tmp_path / "out" / "graph-0" / "kernels").iterdir()}
    assert {"attention.cpp", "attention_1-backward.cpp", "lookup_default-backward.cpp"} < kernels
    with pytest.raises(RecompileError, match=r"table 'bags\.0\.weight' has 20 rows, got id 20"):
        compiled(ids + 20 - ids[0, 0])


def ids():
    return torch.arange(6).reshape(2, 3)


@pytest.fixture
def compiled(monkeypatch):
    """The programs that AOTInductor is given, as text, and an error for it to raise for the first; it does not run."""
    given, errors = [], []

    def compile(program, path, options):
        given.append(str(program.graph))
        with zipfile.ZipFile(path, "w"):
            pass
        if errors:
            raise errors.pop()

    monkeypatch.setattr(module, "_compile", compile)
    return given, errors


class Bags(nn.Module):
    """Two tables; the input has the name of a builtin."""

    def __init__(self):
        super().__init__()
        self.bags = nn.ModuleList(nn.EmbeddingBag(9, 4) for _ in range(2))

    def forward(self, input):
        return torch.cat([bag(input) for bag in self.bags], 1)


def test_what_cannot_be_captured_is_packaged_by_plain_aotinductor(compiled, monkeypatch, tmp_path):
    def refuse(gm):
        raise CaptureError("it holds a black box.", "box")

    monkeypatch.setattr(backend, "capture", refuse)
    with pytest.warns(UserWarning, match="it holds a black box"):
        recompile.package(Bags(), (ids(),), path=tmp_path / "bags.pt2")
    (graph,) = recompile.last_report().graphs
    assert graph.fallback.why == "it holds a black box." and "recompile" not in compiled[0][0]
    with pytest.raises(StrictError, match="it holds a black box"):
        recompile.package(Bags(), (ids(),), path=tmp_path / "bags.pt2", options={"strict": True})
    assert len(compiled[0]) == 1


def test_what_does_not_compile_with_our_passes_is_compiled_without(compiled, tmp_path):
    compiled[1].append(ValueError("no such register"))
    with pytest.warns(UserWarning, match="internal error, ValueError: no such register"):
        recompile.package(Bags(), (ids(),), path=tmp_path / "bags.pt2")
    ours, plain = compiled[0]
    assert "recompile.lookup" in ours and "recompile" not in plain
    compiled[1].append(ValueError("no such register"))
    with pytest.raises(StrictError, match="no such register"):
        recompile.package(Bags(), (ids(),), path=tmp_path / "bags.pt2", options={"strict": True})


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"path": "bags.so"}, RecompileError, r"ends in \.pt2"),
        ({"options": {"stric": True}}, OptionError, "did you mean 'strict'"),
    ],
)
def test_wrong_arguments_are_errors_before_anything_is_compiled(compiled, wrong, error, says, tmp_path):
    with pytest.raises(error, match=says):
        recompile.package(Bags(), (ids(),), **{"path": tmp_path / "bags.pt2", **wrong})
    assert not compiled[0]


def test_an_exported_program_has_its_inputs(compiled, tmp_path):
    program = torch.export.export(Bags(), (ids(),))
    with pytest.raises(RecompileError, match="has its inputs and shapes already"):
        recompile.package(program, (ids(),), path=tmp_path / "bags.pt2")


class Keywords(nn.Module):
    """Writes to a buffer, counts in a constant, returns an input and a number."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("one", torch.ones(1), persistent=False)

    def forward(self, x, *, ids, flag=None):
        self.seen.add_(self.one)
        with torch.no_grad():
            rows = self.table(ids.int())
        return {"rows": rows * x + self.seen, "x": x, "n": 3}


def test_what_else_a_program_may_hold(compiled, tmp_path):
    given = {"ids": torch.arange(3), "flag": None}
    options = {"strict": True, "verify": "numerics"}
    recompile.package(Keywords(), (torch.ones(4),), given, path=tmp_path / "a.pt2", options=options)
    program = torch.export.export(Keywords(), (torch.ones(4),), given).run_decompositions()
    recompile.package(program, path=tmp_path / "a.pt2", options=options)
    assert len(compiled[0]) == 2 and not any(graph.fallback for graph in recompile.last_report().graphs)


def test_the_command_line_packages_for_any_batch(compiled, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.modules[__name__], "target", lambda: (Bags(), [ids()]), raising=False)
    path = tmp_path / "bags.pt2"
    assert main(["package", f"{__name__}:target", "--out", str(path), "--dynamic"]) == 0
    assert "2 bags over 2 tables" in (out := capsys.readouterr().out) and out.endswith(f"{path}\n")
    assert "bytes" in out  # as expressions in the batch size
