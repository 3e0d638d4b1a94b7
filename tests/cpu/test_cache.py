"""A second process finds in Inductor's FX-graph cache what the first one compiled, and has a full report."""

import json
import os
import subprocess
import sys

import pytest

SCRIPT = """
import json, sys, torch
from torch import nn
from torch._dynamo.utils import counters
from recompile import last_report

torch.manual_seed(0)
tables = nn.ModuleList(nn.Embedding(20, 4) for _ in range(3))
model = lambda ids: torch.cat([table(ids[:, i]) for i, table in enumerate(tables)], 1)
options = json.loads(sys.argv[1])
ids = torch.arange(15).reshape(5, 3)
actual = torch.compile(model, backend="recompile", options=options)(ids)
torch.testing.assert_close(actual, model(ids))
actual.sum().backward()
(graph,) = last_report().graphs
found = counters["inductor"]
print(json.dumps({
    "hits": found["fxgraph_cache_hit"],
    "misses": found["fxgraph_cache_miss"],
    "bypasses": found["fxgraph_cache_bypass"],
    "regions": [region.summary for region in graph.regions],
    "passes": len(graph.passes),
}))
"""


@pytest.fixture
def compile_in_a_process(tmp_path):
    def run(options=None, before=""):
        environment = os.environ | {
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
            "TORCHINDUCTOR_FX_GRAPH_CACHE": "1",
        }
        # AOTAutograd's cache sits above this one and would answer first.
        environment["TORCHINDUCTOR_AUTOGRAD_CACHE"] = "0"
        command = [sys.executable, "-c", before + SCRIPT, json.dumps(options or {})]
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
        return json.loads(output.splitlines()[-1])

    return run


def test_a_second_process_hits_the_cache_and_other_options_miss_it(compile_in_a_process):
    first = compile_in_a_process()
    assert (first["hits"], first["bypasses"]) == (0, 0) and first["misses"] == 2  # forward and backward
    second = compile_in_a_process()
    assert (second["hits"], second["misses"], second["bypasses"]) == (2, 0, 0)
    assert second["regions"] == first["regions"] and len(second["regions"]) == 1
    assert second["passes"] == first["passes"] > 0
    other = compile_in_a_process({"passes": "default,-fuse-lookups"})
    assert other["misses"] > 0 and other["regions"] == []


def test_a_changed_generator_misses_the_cache(compile_in_a_process):
    compile_in_a_process()
    changed = "import recompile.lowering.lookup.spec as spec; spec.fingerprint = lambda: 'another'"
    other = compile_in_a_process(before=changed)
    assert other["hits"] == 0 and other["misses"] == 2


def test_the_fingerprint_changes_with_a_generator(tmp_path, monkeypatch):
    from recompile.lowering import fingerprint as module

    (tmp_path / "cpp.py").write_text("one = 1")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "fingerprint.py"))
    first = module.fingerprint.__wrapped__()
    (tmp_path / "cpp.py").write_text("one = 2")
    assert module.fingerprint.__wrapped__() != first
