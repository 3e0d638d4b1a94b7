"""Print the Python files longer than 150 lines; fail when one exceeds 500: that needs a reason."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("recompile", "passes", "lowering", "benchmarks", "tools", "tests")
LONG, TOO_LONG = 150, 500


def sizes() -> dict[str, int]:
    """Lines per file; files reached through a symlinked folder are counted once, at their real place."""
    files = {path.resolve() for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    return {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sorted(files)}


def main() -> int:
    lines = sizes()
    long = sorted(((n, name) for name, n in lines.items() if n > LONG), reverse=True)
    print(f"{len(lines)} files, {sum(lines.values())} lines, {len(long)} files above {LONG} lines")
    for n, name in long:
        print(f"{n:6}  {name}")
    return int(any(n > TOO_LONG for n, _ in long))


if __name__ == "__main__":
    sys.exit(main())
