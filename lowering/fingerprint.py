"""A digest of our code generators: part of every spec, so that Inductor's caches miss when a generator changes."""

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
