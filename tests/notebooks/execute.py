"""Runs notebooks from top to bottom; `python tests/notebooks/execute.py [NOTEBOOK...]` stores their outputs in them."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
# All that is kept of a notebook's metadata: the rest is about who ran it last.
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
SECONDS = 300  # for one cell, on a busy machine


def executed(path: Path, folder: Path) -> NotebookNode:
    """The notebook with the outputs of a run in `folder`, by the interpreter that runs this.

    Raises:
        CellExecutionError: a cell failed.
        CellTimeoutError: a cell took longer than `SECONDS`.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", resources=resources, record_timing=False
    ).execute()
    return notebook


def store(notebook: NotebookNode, path: Path) -> None:
    """Writes a notebook without what differs from run to run, but for its outputs."""
    notebook.metadata = METADATA
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = _joined(cell.outputs)
    nbformat.write(notebook, path)


def _joined(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs with each run of pieces of one stream as one output: how it is cut up is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if (
            joined
            and output.output_type == joined[-1].output_type == "stream"
            and output.name == joined[-1].name
        ):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def main(paths: list[Path]) -> None:
    """Runs the notebooks, all of them without arguments, and stores what they print and draw."""
    for path in paths or NOTEBOOKS:
        with tempfile.TemporaryDirectory() as folder:
            store(executed(path, Path(folder)), path)
        print(path.name)


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
