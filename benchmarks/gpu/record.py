"""What was measured, in a file that is complete after each case."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

VERSION = 1  # of the file; raised when a field changes its meaning or goes away


@dataclass
class Record:
    """One case. Dictionaries are keyed by variant; `skipped` and `failed` are sentences.

    `bytes`, `asked` and `flops` are as in `work.Work`.
    """

    case: str
    group: str
    tolerance: float = 0.0
    bytes: float = 0.0
    asked: float = 0.0
    flops: float = 0.0
    ms: dict[str, float] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    compile_s: dict[str, float] = field(default_factory=dict)
    launches: dict[str, int | None] = field(default_factory=dict)
    peak_mib: dict[str, float | None] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    failed: str = ""
    seconds: float = 0.0


@dataclass
class Results:
    """A run: where it was measured (`facts`), the device's ceilings, and the cases so far.

    `running` names the case that is being measured, so that one that takes the process with it is known. `slow` are the
    variants that were too slow, by case, and why.
    """

    path: Path
    facts: Mapping[str, Any]
    ceilings: dict[str, float] = field(default_factory=dict)
    running: str = ""
    slow: dict[str, dict[str, str]] = field(default_factory=dict)
    records: dict[str, Record] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Results:
        """What `save` wrote.

        Raises:
            ValueError: the file is of another version.
        """
        held = json.loads(path.read_text())
        if held["version"] != VERSION:
            raise ValueError(f"{path} has version {held['version']}, expected {VERSION}")
        records = {row["case"]: Record(**row) for row in held["records"]}
        return cls(path, held["facts"], held["ceilings"], held["running"], held["slow"], records)

    def save(self) -> None:
        """Writes in one step: what is there stays whole if the process ends."""
        held = asdict(self) | {"version": VERSION, "records": [asdict(r) for r in self.records.values()]}
        del held["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix(".tmp")
        draft.write_text(json.dumps(held, indent=1) + "\n")
        os.replace(draft, self.path)

    def begin(self, case: str) -> None:
        """Says which case runs now."""
        self.running = case
        self.save()

    def add(self, record: Record) -> None:
        """Keeps a finished case."""
        self.records[record.case] = record
        self.running = ""
        self.save()


def find(folder: Path, stem: str, facts: Mapping[str, Any], date: str, fresh: bool) -> Results:
    """The newest results with the same facts, to go on with; else, or when `fresh`, empty ones under a new name."""
    for path in sorted(folder.glob(f"{stem}-*.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        if not fresh and json.loads(path.read_text())["facts"] == facts:
            return Results.load(path)
    names = (folder / f"{stem}-{date}{'' if n == 1 else f'-{n}'}.json" for n in range(1, 1000))
    return Results(next(path for path in names if not path.exists()), facts)
