"""Generated Triton text as an importable module: Triton and Inductor read a kernel's source from its file."""

import functools
import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path
from types import ModuleType

from torch._inductor.runtime.cache_dir_utils import cache_dir


@functools.lru_cache(maxsize=1024)
def load(source: str) -> ModuleType:
    """The module with this text; its file is named after the text's hash, in Inductor's cache directory."""
    name = "recompile_" + hashlib.sha256(source.encode()).hexdigest()[:16]
    path = Path(cache_dir()) / "recompile" / f"{name}.py"
    if not path.exists():
        _write(path, source)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _write(path: Path, source: str) -> None:
    """Writes in one step: another process may be reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    with os.fdopen(handle, "w") as file:
        file.write(source)
    os.replace(draft, path)
