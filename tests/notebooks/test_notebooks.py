"""The notebooks run, and what is stored in them is a run from top to bottom, without traces of a machine."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from execute import NOTEBOOKS, executed

# Homes, temporary folders (a cell's warning is of one), checkouts.
PATH = re.compile(r"/(?:home|root|Users|tmp|var|work|mnt|opt)/\w|[A-Z]:\\\\")


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs(path, tmp_path):
    notebook = executed(path, tmp_path)
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_are_of_one_run(path):
    assert [cell.execution_count for cell in code_cells(path)] == [*range(1, len(code_cells(path)) + 1)]
    outputs = [output for cell in code_cells(path) for output in cell.outputs]
    assert outputs and not [output for output in outputs if output.output_type == "error"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_its_outputs_name_no_machine(path):
    for output in (output for cell in code_cells(path) for output in cell.outputs):
        drawn = {kind: text for kind, text in output.get("data", {}).items() if "image" not in kind}
        assert not PATH.findall(json.dumps([output.get("text", ""), drawn]))


def test_there_are_some():
    assert {path.stem.partition("-")[0] for path in NOTEBOOKS} >= {"1", "2", "3"}
