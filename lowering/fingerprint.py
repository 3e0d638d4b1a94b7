"""Digests: of our code generators, so that Inductor's caches miss when one changes, and of a spec."""

import functools
import hashlib
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any


@functools.lru_cache(maxsize=1)
def fingerprint() -> str:
    """Eight hexadecimal digits that change with any source file of this package.

    And with RECOMPILE_AUTOTUNE, which decides below torch's caches how many schedules are tried.
    """
    digest = hashlib.sha256(os.environ.get("RECOMPILE_AUTOTUNE", "").encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def fingerprint_of(*functions: Callable[..., Any]) -> str:
    """Eight hexadecimal digits that also change with the source files of these functions, and with what they hold.

    A function without a file, as in a notebook, has other digits each time: no cache may answer for it.
    """
    digest = hashlib.sha256(fingerprint().encode())
    for function in functions:
        code = getattr(function, "__code__", None)
        path = Path(code.co_filename) if code else Path()
        digest.update(path.read_bytes() if path.is_file() else uuid.uuid4().bytes)
        if code:
            held = [cell.cell_contents for cell in function.__closure__ or ()]
            state = code.co_firstlineno, function.__defaults__, function.__kwdefaults__, held
            digest.update(repr(state).encode())
    return digest.hexdigest()[:8]


def digest(spec: str) -> str:
    """Eight hexadecimal digits that stand for a spec where its text is too long."""
    return hashlib.sha256(spec.encode()).hexdigest()[:8]
