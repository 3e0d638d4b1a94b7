"""Scripts that run one region of a dump: they run, by themselves, and would tell a wrong kernel."""

import ast
import functools
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

import recompile
from recompile import backend, cli, repro
from recompile.dump_read import read
from recompile.repro_script import script


@pytest.fixture
def dumped(tmp_path, monkeypatch):
    """Dumps a model without compiling it; gives the folder."""

    def make(model, *inputs, dynamic=False):
        torch._dynamo.reset()
        for x in inputs if dynamic else ():
            torch._dynamo.mark_dynamic(x, 0)
        with monkeypatch.context() as patch:
            patch.setattr(backend, "compile_fx", lambda gm, inputs, config_patches=None: gm.forward)
            with recompile.dump(tmp_path / "out") as out, torch.no_grad():
                torch.compile(model.eval(), backend="recompile")(*inputs)
        return out

    return make


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a region's script, measuring as little as can be; gives what it printed."""
    short = functools.partial(repro.interleave, min_rounds=1, warmup=1)
    monkeypatch.setattr(repro, "interleave", lambda calls, seconds, sync: short(calls, seconds=0, sync=sync))

    def go(folder, region="region-0"):
        output = tmp_path / "script.py"
        assert cli.main(["repro", str(folder), region, "--output", str(output)]) == 0
        torch._dynamo.reset()
        runpy.run_path(str(output))
        return capsys.readouterr().out

    return go


class Fields(nn.Module):
    """Columns of one matrix; each table has its own range, and the last one's ids are moved and wrapped."""

    rows = (7, 20, 300)

    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 4) for n in self.rows)

    def forward(self, ids, dense):
        moved = [ids[:, 0], ids[:, 1] - 5, (ids[:, 2] + 3) % 300]
        return torch.cat([*(table(x) for table, x in zip(self.tables, moved, strict=True)), dense], 1)


def fields(batch=6):
    return torch.zeros(batch, 3, dtype=torch.int64) + 5, torch.randn(batch, 2)


class Bags(nn.Module):
    """Offsets with and without the last one, and a mean over a masked history."""

    def __init__(self):
        super().__init__()
        self.sums = nn.EmbeddingBag(30, 4, mode="sum", padding_idx=0)
        self.means = nn.EmbeddingBag(40, 4, mode="mean", include_last_offset=True)
        self.items = nn.Embedding(50, 4)

    def forward(self, ids, starts, more, bounds, history, lengths):
        keep = torch.arange(history.shape[1]) < lengths[:, None]
        pooled = (self.items(history) * keep.unsqueeze(-1)).sum(1)
        return torch.cat([self.sums(ids, starts), self.means(more, bounds), pooled], 1)


def bags():
    ids, starts = torch.arange(9) % 30, torch.tensor([0, 2, 2, 8])
    more, bounds = torch.arange(12) % 40, torch.tensor([0, 3, 6, 6, 12])
    return ids, starts, more, bounds, torch.zeros(4, 5, dtype=torch.int64), torch.tensor([0, 5, 2, 3])


class Attention(nn.Module):
    """Causal, over the kept keys, with a bias by distance in time."""

    def __init__(self):
        super().__init__()
        self.project = nn.Linear(8, 24)
        self.bias = nn.Parameter(torch.randn(16))

    def forward(self, x, times, keep):
        q, k, v = self.project(x).chunk(3, -1)
        apart = (times[:, :, None] - times[:, None, :]).abs().clamp(0, 15)
        scores = q @ k.mT / 3.0 + self.bias[apart]
        n = x.shape[1]
        mask = torch.tril(torch.ones(n, n, dtype=torch.bool)) & keep[:, None, :]
        return scores.masked_fill(~mask, -1e9).softmax(-1) @ v


def attention(batch=3, n=9):
    return torch.randn(batch, n, 8), torch.arange(n).expand(batch, n), torch.ones(batch, n, dtype=torch.bool)


CASES = [(Fields, fields, False), (Fields, fields, True), (Bags, bags, False)]
CASES += [(Attention, attention, False), (Attention, attention, True)]


@pytest.mark.parametrize(("model", "inputs", "dynamic"), CASES)
def test_a_region_runs_fused_and_unfused_and_both_agree(dumped, run, model, inputs, dynamic):
    printed = run(dumped(model(), *inputs(), dynamic=dynamic))
    assert "largest difference: " in printed and "fused is " in printed


def drawn(text):
    """(low, high) of each `whole` in a script, in order."""
    calls = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return [
        tuple(ast.literal_eval(arg) for arg in call.args[3:5]) for call in calls if call.func.id == "whole"
    ]


def test_ids_stay_inside_their_tables(dumped):
    text = script(read(dumped(Fields(), *fields())), "region-0")
    plain, moved, wrapped = drawn(text)
    assert plain == (0, 7) and moved == (5, 25)
    assert wrapped[1] - wrapped[0] > 300  # any id is right


def test_strides_are_those_of_the_model(dumped):
    text = script(read(dumped(Fields(), *fields())), "region-0")
    assert "whole(torch.int64, [6], [3], 0, 7)" in text


def test_the_script_needs_only_torch_and_recompile(dumped, tmp_path):
    output = tmp_path / "alone.py"
    assert (
        cli.main(["repro", str(dumped(Fields(), *fields())), "lookup_default", "--output", str(output)]) == 0
    )
    tree = ast.parse(output.read_text())
    modules = {n.module for n in tree.body if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    assert modules == {"torch", "recompile.repro"}
    done = subprocess.run(
        [sys.executable, str(output)], check=True, capture_output=True, text=True, cwd=tmp_path
    )
    assert "unfused: " in done.stdout


def test_a_wrong_kernel_is_told(dumped, run, monkeypatch):
    folder = dumped(Fields(), *fields())
    right = repro.reference
    monkeypatch.setattr(repro, "reference", lambda *args: [x + 0.01 for x in right(*args)])
    with pytest.raises(AssertionError, match="fused and unfused differ by"):
        run(folder)


def test_a_region_that_several_graphs_have_asks_for_one(dumped, tmp_path, capsys):
    class Broken(Fields):
        def forward(self, ids, dense):
            first = super().forward(ids, dense)
            torch._dynamo.graph_break()
            return first + super().forward(ids, dense)

    folder = dumped(Broken(), *fields())
    assert cli.main(["repro", str(folder), "lookup_default"]) == 2
    assert "several graphs have a region 'lookup_default'" in capsys.readouterr().err
    output = tmp_path / "one.py"
    args = ["repro", str(folder), "lookup_default", "--graph", "1", "--output", str(output)]
    assert cli.main(args) == 0 and "of graph 1" in output.read_text()


@pytest.mark.parametrize(
    ("shape", "stride"), [((3, 4), (1, 3)), ((3, 4), (0, 1)), ((2, 1, 5), (5, 5, 1)), ((4,), (7,))]
)
def test_tensors_lie_in_memory_as_recorded(shape, stride):
    made = repro.real(torch.float32, shape, stride)
    assert made.shape == shape and made.stride() == stride and made.isfinite().all()
    truths = repro.whole(torch.bool, shape, stride, 0, 2)
    assert truths.stride() == stride and truths.dtype is torch.bool


@pytest.mark.parametrize("last", [False, True])
def test_offsets_are_in_order_and_start_at_zero(last):
    made = repro.offsets(torch.int32, [6], 10, last)
    assert made[0] == 0 and (made.diff() >= 0).all() and made.dtype is torch.int32
    assert made[-1] == 10 if last else made[-1] <= 10
