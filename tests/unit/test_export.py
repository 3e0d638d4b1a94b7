"""A dump for other viewers, and the report in torch's structured trace."""

import json

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
