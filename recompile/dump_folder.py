"""The folder of a dump: whose it is, and what is written to it when.

`recording.py` takes down what happens to a graph, `dump_graph.py` has the files of one graph.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

from .dump_graph import OWN_FILES, files
from .recording import Recording, tolerating
from .report import Report

log = logging.getLogger("recompile")


class Folder:
    """A dump that grows graph by graph. Other processes are kept out of it until it is closed."""

    def __init__(self, path: Path) -> None:
        self.path, self._claim = _claimed(path)
        self.users = 1
        self._lock = threading.RLock()
        self._recordings: list[Recording] = []
        self._graphs: dict[int, dict[str, Any]] = {}  # the parsed graph.json's
        self._sources: dict[int, dict[str, str]] = {}  # the texts under kernels/
        self._page_is_current = False
        _clear(self.path)
        self._write_report()

    def add(self, recording: Recording, strict: bool) -> None:
        """Writes one more graph. With many graphs the page is written for every 16th and at the end."""
        with tolerating(self.path, strict), self._lock:
            self._write_graph(recording, len(self._recordings))
            self._recordings.append(recording)
            self._write_report()
            self._write_page_unless_many()

    def hear(self, recording: Recording, program: str) -> None:
        """Takes in a program of Inductor; that of a backward may come after its graph was written."""
        with tolerating(self.path, False), self._lock:
            recording.programs.append(program)
            if recording in self._recordings and not self._claim.closed:
                self._write_graph(recording, self._recordings.index(recording))
                self._write_page_unless_many()

    def renew(self, report: Report) -> None:
        """Writes report and page again if graphs of `report` are in this dump."""
        records = {id(record) for record in report.graphs}
        with tolerating(self.path, False), self._lock:
            mine = any(id(recording.record) in records for recording in self._recordings)
            if mine and not self._claim.closed:
                self._write_report()
                self._write_page()

    def close(self) -> None:
        """Writes what is missing, and lets other processes in."""
        with tolerating(self.path, False), self._lock:
            if not self._page_is_current:
                self._write_page()
        self._claim.close()

    def _write_graph(self, recording: Recording, index: int) -> None:
        made = files(recording, index)
        for name, text in made.items():
            path = self.path / f"graph-{index}" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        kernels = {name: text for name, text in made.items() if name.startswith("kernels/")}
        self._graphs[index], self._sources[index] = json.loads(made["graph.json"]), kernels
        self._page_is_current = False

    def _report(self) -> str:
        records = (recording.record for recording in self._recordings)
        return Report(graphs=[replace(record, index=k) for k, record in enumerate(records)]).to_json()

    def _write_report(self) -> None:
        (self.path / "report.json").write_text(self._report(), encoding="utf-8")

    def _write_page_unless_many(self) -> None:
        if len(self._graphs) <= 16 or len(self._graphs) % 16 == 0:
            self._write_page()

    def _write_page(self) -> None:
        from .page import html

        graphs, sources = list(self._graphs.values()), list(self._sources.values())
        page = html(json.loads(self._report()), graphs, sources)
        (self.path / "index.html").write_text(page, encoding="utf-8")
        self._page_is_current = True


def _claimed(path: Path) -> tuple[Path, Any]:
    """The folder to write to, and the open report.json, whose lock keeps others out until it is closed."""
    path.mkdir(parents=True, exist_ok=True)
    report = open(path / "report.json", "a")  # noqa: SIM115  (the lock lasts as long as the file is open)
    try:
        fcntl.flock(report, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        report.close()
        own = path / f"process-{os.getpid()}"
        log.warning("another process is writing a dump to %s; this one writes to %s", path, own)
        return _claimed(own)
    return path, report


def _clear(path: Path) -> None:
    """Removes what an older dump wrote here, and nothing else."""
    (path / "index.html").unlink(missing_ok=True)
    for graph in path.glob("graph-*"):
        for pattern in OWN_FILES:
            for file in graph.glob(pattern):
                file.unlink()
        for folder in (graph / "kernels", graph):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
