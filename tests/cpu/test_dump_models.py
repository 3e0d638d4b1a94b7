"""Dumps of models that Inductor compiles: kernels of both directions, from a cache too, and no other program for it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import recompile


class Towers(nn.Module):
    """Two groups of lookups, the second of ids that the first gives, so two regions."""

    def __init__(self):
        super().__init__()
        self.first = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
        self.second = nn.ModuleList(nn.Embedding(20, 8) for _ in range(2))

    def forward(self, ids):
        rows = torch.cat([table(ids[:, i]) for i, table in enumerate(self.first)], 1)
        best = (rows[:, :1] * 10).long().abs() % 20
        return rows.sum(1) + torch.cat(
            [table((best[:, 0] + i) % 20) for i, table in enumerate(self.second)], 1
        ).sum(1)


@pytest.fixture(autouse=True)
def afresh():
    torch._dynamo.reset()


def train(model, ids):
    torch.compile(model, backend="recompile")(ids).sum().backward()


def test_every_region_has_its_kernel_and_its_gradients(tmp_path):
    model, ids = Towers(), torch.randint(0, 20, (6, 3))
    with recompile.dump(tmp_path) as out:
        train(model, ids)
    graph = json.loads((out / "graph-0" / "graph.json").read_text())
    kernels = {node["name"]: node["kernel"] for node in graph["nodes"] if node["kernel"]}
    assert kernels == {
        "lookup_default": "kernels/lookup_default.cpp",
        "lookup_default_1": "kernels/lookup_default_1.cpp",
    }
    found = {file.name: file.read_text() for file in (out / "graph-0" / "kernels").iterdir()}
    gradients = {"lookup_default-backward.cpp", "lookup_default_1-backward.cpp"}
    assert gradients | {"inductor.py", "inductor-backward.py"} <= found.keys()
    assert "BAGS = 3" in found["lookup_default.cpp"] and "BAGS = 2" in found["lookup_default_1.cpp"]
    for name, text in found.items():
        if name.startswith("lookup"):
            assert "made by fuse-lookups" in text and Path(__file__).name in text and 'extern "C"' in text
    assert 'extern "C"' in found["inductor.py"] and "forward" in found["inductor.py"].splitlines()[0]


def test_a_recompilation_is_the_next_graph(tmp_path):
    compiled = torch.compile(Towers(), backend="recompile")
    with recompile.dump(tmp_path) as out, torch.no_grad():
        for batch in (5, 7):
            compiled(torch.randint(0, 20, (batch, 3)))
    texts = [(out / f"graph-{k}" / "00-captured.py").read_text() for k in range(2)]
    assert "i64[5, 3]" in texts[0] and "i64[s" in texts[1]
    assert not (out / "graph-2").exists()


SCRIPT = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
import recompile

torch.manual_seed(0)
tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
model = lambda ids: torch.cat([table(ids[:, i]) for i, table in enumerate(tables)], 1)
ids = torch.arange(15).reshape(5, 3)
actual = torch.compile(model, backend="recompile")(ids)
torch.testing.assert_close(actual, model(ids))
actual.sum().backward()
found = {**counters["inductor"], **counters["aot_autograd"]}
print(json.dumps({k: found.get(k, 0) for k in ("fxgraph_cache_hit", "fxgraph_cache_miss", "autograd_cache_hit")}))
"""


@pytest.mark.parametrize("autograd_cache", ["0", "1"])
def test_a_dump_changes_no_cache_key_and_shows_kernels_from_the_cache(tmp_path, autograd_cache):
    """With AOTAutograd's cache on, it answers before Inductor's."""

    def run(dump):
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
            "TORCHINDUCTOR_AUTOGRAD_CACHE": autograd_cache,
            "RECOMPILE_DUMP": str(dump) if dump else "",
        }
        command = [sys.executable, "-W", "error:recompile", "-c", SCRIPT]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return json.loads(done.stdout.splitlines()[-1])

    first = run(None)
    assert first["fxgraph_cache_hit"] == 0 < first["fxgraph_cache_miss"]
    again = run(tmp_path / "out")
    assert again["fxgraph_cache_miss"] == 0
    assert again["autograd_cache_hit"] > 0 if autograd_cache == "1" else again["fxgraph_cache_hit"] == 2
    found = {file.name for file in (tmp_path / "out" / "graph-0" / "kernels").iterdir()}
    assert {"lookup_default.cpp", "lookup_default-backward.cpp", "inductor.py"} <= found
    assert (tmp_path / "out" / "index.html").exists()


def test_what_is_measured_is_in_the_dump(tmp_path):
    with recompile.dump(tmp_path) as out, torch.no_grad():
        recompile.explain(Towers(), torch.randint(0, 20, (6, 3)), profile=True)
        report = recompile.Report.from_json((out / "report.json").read_text())
    (graph,) = report.graphs
    assert [region.measured.ms > 0 for region in graph.regions] == [True, True]
    assert graph.ceilings.bytes > 1e8 and graph.ceilings.flops > 1e8
    data = re.search(r'id="data">(.*?)</script>', (out / "index.html").read_text(), re.DOTALL)[1]
    assert json.loads(data)["report"] == json.loads(report.to_json())


def test_a_trace_shows_kernels_by_the_names_that_a_dump_gives_them(tmp_path):
    ids, named = torch.randint(0, 20, (6, 3)), {"inductor": {"cpp.enable_kernel_profile": True}}
    compiled = torch.compile(Towers(), backend="recompile", options=named)
    with recompile.dump(tmp_path / "out") as out, torch.no_grad():
        compiled(ids)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            compiled(ids)
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    ranges = {event["name"].split()[-1] for event in events if event["name"].startswith("recompile::lookup")}
    texts = [file.read_text() for file in (out / "graph-0" / "kernels").glob("lookup_default*.cpp")]
    assert ranges == {re.search(r"called (\w+) in Inductor", text)[1] for text in texts} and len(ranges) == 2
