"""Digests: of our code generators, so that Inductor's caches miss when one changes, and of a spec."""

import functools
import hashlib
from pathlib import Path


@functools.lru_cache(maxsize=1)
def fingerprint() -> str:
    """Eight hexadecimal digits that change with any source file of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def digest(spec: str) -> str:
    """Eight hexadecimal digits that stand for a spec where its text is too long."""
    return hashlib.sha256(spec.encode()).hexdigest()[:8]
