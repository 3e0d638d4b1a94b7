"""The command line: targets, errors, and each command on a small model."""

import json

import pytest
import torch

from recompile import cli
from recompile.bench import resize
from recompile.errors import RecompileError

MODEL = """
import torch

class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.e = torch.nn.ModuleList(torch.nn.Embedding(50, 8) for _ in range(4))

    def forward(self, x):
        return torch.cat([e(x[:, i]) for i, e in enumerate(self.e)], 1).relu()

def fixed():
    return Tiny(), (torch.arange(24).reshape(6, 4),)

def alone():
    return Tiny()

def no_tuple():
    return Tiny(), torch.arange(24).reshape(6, 4)

def sized(batch=3):
    return Tiny(), (torch.zeros(batch, 4, dtype=torch.int64),)
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    (tmp_path / "tiny_target.py").write_text(MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "tiny_target"


@pytest.mark.parametrize(("wrong", "says"), [("nothing", "not a target"), ("nowhere:f", "cannot be loaded")])
def test_a_bad_target_says_what_is_expected(wrong, says, capsys):
    assert cli.main(["explain", wrong]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("command", ["explain", "bench", "bisect", "package"])
@pytest.mark.parametrize(("function", "got"), [("alone", "Tiny"), ("no_tuple", "(Tiny, Tensor)")])
def test_a_function_that_gives_no_model_with_inputs_is_told(target, command, function, got, capsys):
    assert cli.main([command, f"{target}:{function}"]) == 2
    said = capsys.readouterr().err
    assert "expected: (model, (input, ...))" in said and f"got: {got}\n" in said


def test_explain_prints_the_report_as_text_and_as_json(target, capsys):
    assert cli.main(["explain", f"{target}:fixed"]) == 0
    assert "nodes -> " in capsys.readouterr().out
    assert cli.main(["explain", f"{target}:fixed", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["graphs"]


def test_bench_gives_one_row_a_batch_size(target, capsys):
    args = ["bench", f"{target}:sized", "--batch", "2,5", "--json", "--seconds", "0", "--against", "eager"]
    assert cli.main(args) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["batch"] for row in rows] == [2, 5]
    assert all(row["error"]["recompile"] == 0 and row["ratio"]["eager"] > 0 for row in rows)


def test_bench_takes_the_inputs_as_given_without_a_batch_size(target, capsys):
    assert cli.main(["bench", f"{target}:fixed", "--seconds", "0", "--against", "eager", "--train"]) == 0
    assert "training step" in capsys.readouterr().out


def test_resize_repeats_or_cuts_what_is_as_long_as_the_first_tensor():
    inputs = (torch.arange(3), {"x": torch.arange(6).reshape(3, 2)}, torch.arange(4), 7)
    longer, mapping, other, number = resize(inputs, 5)
    assert longer.tolist() == [0, 1, 2, 0, 1]
    assert mapping["x"].shape == (5, 2)
    assert other.tolist() == [0, 1, 2, 3]
    assert number == 7


def test_an_unknown_zoo_model_names_the_nearest():
    from recompile.zoo import build

    pytest.importorskip("torch_rechub")
    with pytest.raises(RecompileError, match=r"rechub\.DeepFM"):
        build("rechub.DepFM", scale=0.01)
