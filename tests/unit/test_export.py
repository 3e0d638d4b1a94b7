"""A dump for other viewers, and the report in torch's structured trace."""

import importlib.util
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
from recompile import cli
from recompile.dump_read import read
from recompile.export import export


class Tables(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(50, 4) for _ in range(3))
        self.tower = nn.Sequential(nn.Linear(12, 4), nn.ReLU())

    def forward(self, ids):
        return self.tower(torch.cat([table(ids[:, k]) for k, table in enumerate(self.tables)], 1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch._dynamo.reset()
    path = tmp_path_factory.mktemp("dump")
    with torch.no_grad(), recompile.dump(path):
        torch.compile(Tables(), backend="recompile")(torch.zeros(6, 3, dtype=torch.int64))
    return path


def test_dot_has_every_node_and_edge(folder, capsys):
    assert cli.main(["export", str(folder)]) == 0
    text = capsys.readouterr().out
    assert text.startswith('digraph "graph 0 after scale-queries" {') and text.endswith("}\n")
    assert '"lookup_default" [label="lookup_default: recompile.lookup.default' in text
    assert "fillcolor=lightgreen" in text and '"linear" -> "relu";' in text


def test_dot_is_quoted(folder):
    dump = read(folder)
    dump.graphs[0]["nodes"][0]["line"] = 'a "b" \\ c'
    assert 'a \\"b\\" \\\\ c' in export(dump, "dot", 0, "captured")


def test_model_explorer_has_layers_and_edges(folder):
    found = json.loads(export(read(folder), "model-explorer", 0, "captured"))
    nodes = {node["id"]: node for node in found["graphs"][0]["nodes"]}
    assert nodes["linear"]["namespace"] == "tower/0" and nodes["linear"]["label"] == "aten.linear.default"
    assert {edge["sourceNodeId"] for edge in nodes["cat"]["incomingEdges"]} == {
        "embedding",
        "embedding_1",
        "embedding_2",
    }
    assert nodes["cat"]["outputsMetadata"][0]["attrs"] == [{"key": "tensor_shape", "value": "f32[6, 12]"}]


def test_model_explorer_s_own_classes_take_it(folder):
    """Its package without what it requires: one file has the classes of the format, of dataclasses only."""
    dacite = pytest.importorskip("dacite")
    package = importlib.util.find_spec("model_explorer")
    if package is None:
        pytest.skip("needs ai-edge-model-explorer")
    spec = importlib.util.spec_from_file_location(
        "graph_builder", Path(package.origin).with_name("graph_builder.py")
    )
    builder = sys.modules["graph_builder"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    found = json.loads(export(read(folder), "model-explorer", 0))
    collection = dacite.from_dict(builder.GraphCollection, found, dacite.Config(strict=True))
    nodes = {node.id: node for node in collection.graphs[0].nodes}
    assert nodes["lookup_default"].style.backgroundColor == "lightgreen" and nodes["relu"].style is None
    assert {edge.sourceNodeId for node in nodes.values() for edge in node.incomingEdges} <= {*nodes}


def test_an_unknown_pass_names_the_nearest(folder, capsys):
    assert cli.main(["export", str(folder), "--pass", "fuse-lookup"]) == 2
    assert "did you mean 'fuse-lookups'" in capsys.readouterr().err


def test_the_report_is_in_the_structured_trace(monkeypatch):
    traced = {}
    monkeypatch.setattr(
        "recompile.torch_private.structured_trace.trace_structured",
        lambda kind, metadata_fn, payload_fn: traced.update({(kind, *metadata_fn().values()): payload_fn()}),
    )
    torch._dynamo.reset()
    with torch.no_grad():
        recompile.explain(Tables(), torch.zeros(6, 3, dtype=torch.int64))
    assert "lookup_default: 3 lookups" in traced["artifact", "recompile_report", "string"]
    assert json.loads(traced["artifact", "recompile_report_json", "json"])["graphs"][0]["regions"]


def test_tlparse_shows_the_report(tmp_path):
    tlparse = Path(sys.executable).with_name("tlparse")
    if not tlparse.exists():
        pytest.skip("needs tlparse")
    code = (
        "import torch; from tests.unit.test_export import Tables\n"
        "call = torch.compile(Tables(), backend='recompile')\n"
        "with torch.no_grad(): call(torch.zeros(6, 3, dtype=torch.int64))"
    )
    environment = {**os.environ, "TORCH_TRACE": str(tmp_path / "trace")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=300)
    (trace,) = (tmp_path / "trace").iterdir()
    pages = tmp_path / "pages"
    subprocess.run([tlparse, trace, "-o", pages, "--no-browser", "--strict"], check=True, capture_output=True)
    (link,) = re.findall(r'href="([^"]*recompile_report_\d+\.txt)"', (pages / "index.html").read_text())
    assert "lookup_default: 3 lookups over 3 tables" in (pages / link).read_text()
