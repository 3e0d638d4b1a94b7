"""The command line: explain and bench on a model of the user's, and errors that say what to write."""

import json

import pytest
import torch
from torch import nn

from recompile import cli


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.tables = nn.ModuleList(nn.EmbeddingBag(20, 4, mode="sum") for _ in range(2))

    def forward(self, ids):
        return torch.cat([t(ids) for t in self.tables], 1)


def two():
    return Two(), (torch.randint(0, 20, (5, 3)),)


@pytest.fixture
def target(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "users_module", type("M", (), {"two": staticmethod(two)}))
    return "users_module:two"


def test_explain_prints_what_fired(target, capsys):
    assert cli.main(["explain", target]) == 0
    assert "2 bags over 2 tables -> concat" in capsys.readouterr().out


def test_explain_json(target, capsys):
    assert cli.main(["explain", target, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"][0]["fallback"] is None


def test_bench_compares(target, capsys):
    assert cli.main(["bench", target, "--json", "--seconds", "0.1", "--against", "eager"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert set(rows) == {"recompile", "eager"} and rows["recompile"]["ms"] > 0


def test_a_bad_target_says_what_to_write(capsys):
    assert cli.main(["explain", "nothing"]) == 2
    assert "package.module:function" in capsys.readouterr().err
