"""A folder that shows what happened to every graph: `with recompile.dump("out/")`; docs/dump.md tells what is in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def dump(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Writes what this thread compiles inside the `with` block to a folder; `index.html` shows it.

    Gives the folder, which is made if it is missing. An older dump's files in it are replaced. A backward is
    compiled when it first runs: run it inside the block too.

    Raises:
        RecompileError: the folder cannot be made or written to.
    """
    from .dumping import inside  # it needs Dynamo, which takes seconds to import

    with inside(Path(path)) as folder:
        yield folder
