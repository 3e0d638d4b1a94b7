"""Expected graphs that a test run writes into the tests."""

import subprocess
import sys

import pytest

from recompile.errors import RecompileError
from recompile.expected import VARIABLE, update

TEST = '''
from dataclasses import dataclass

import torch

from recompile import Rule
from recompile.testing import assert_rewrites


@dataclass(frozen=True)
class DoubleNegative(Rule):
    def pattern(self, op):
        return op.neg(op.neg(op.var("x")))

    def rewrite(self, m):
        return m["x"]


def test_two():
    assert_rewrites(DoubleNegative, lambda x: -(-x) + 1, (torch.ones(2),), expect="")
    assert_rewrites(
        DoubleNegative,
        lambda x: (-(-x)).relu(),
        (torch.ones(2),),
        expect="""
            something else
        """,
    )
'''


def run(path, **env):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(path)]
    return subprocess.run(command, env={"PATH": "", **env}, capture_output=True, text=True, cwd=path.parent)


def test_a_run_with_the_variable_writes_what_the_next_one_compares_with(tmp_path):
    path = tmp_path / "test_mine.py"
    path.write_text(TEST)
    assert "the graph afterwards is" in run(path).stdout
    assert run(path, **{VARIABLE: "1"}).returncode == 0
    text = path.read_text()
    assert "relu(l_x_)" in text and "add(l_x_, 1)" in text and "something else" not in text
    assert run(path).returncode == 0


def test_a_literal_that_is_not_there():
    with pytest.raises(RecompileError, match=r"test_expected\.py cannot be updated"):
        update("no literal of this file" + "!", "")
