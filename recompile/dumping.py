"""Which compilations go into which dump: `recompile.dump` blocks, the option `dump`, and backwards that come later."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

from torch._dynamo.exc import RestartAnalysis
from torch._guards import CompileContext

from .dump_folder import Folder
from .errors import RecompileError
from .options import Options
from .recording import Recording, tolerating
from .report import GraphRecord, Report
from .torch_private.generated_code import hear

_inside: ContextVar[Folder | None] = ContextVar("recompile_dump", default=None)
_now: ContextVar[tuple[Folder, Recording] | None] = ContextVar("recompile_dump_now", default=None)
_compiling: dict[Any, tuple[Folder, Recording]] = {}  # by Dynamo's id, which a later backward has too
_folders: dict[Path, Folder] = {}  # those that are open
_folders_lock = threading.Lock()


@contextmanager
def inside(path: Path) -> Iterator[Path]:
    """See `recompile.dump`."""
    try:
        folder = _open(path)
    except OSError as error:
        raise RecompileError(
            f"no dump can be written to {path}", got=str(error), try_="another folder"
        ) from error
    token = _inside.set(folder)
    try:
        yield folder.path
    finally:
        _inside.reset(token)
        _leave(folder)


@contextmanager
def dumping(options: Options, record: GraphRecord) -> Iterator[Recording | None]:
    """What takes down the graph compiled inside the block, None where no dump is asked for; then it is written.

    Raises:
        StrictError: the dump cannot be written, under `strict`.
    """
    folder = _inside.get()
    if folder is None and options.dump:
        with tolerating(options.dump, options.strict):
            folder = _standing(Path(options.dump))
    if folder is None:
        yield None
        return
    recording = Recording(record, folder.path, options.strict)
    _hear_programs()
    token = _now.set((folder, recording))
    if (compilation := CompileContext.current_compile_id()) is not None:
        _compiling[compilation] = (folder, recording)
    try:
        yield recording
    except RestartAnalysis:  # Dynamo traces the graph again
        raise
    except BaseException:
        folder.add(recording, strict=False)
        raise
    else:
        folder.add(recording, options.strict)
    finally:
        _now.reset(token)


def renew(report: Report) -> None:
    """Writes the dumps again that are open and show graphs of a report in which something was filled in."""
    with _folders_lock:
        folders = set(_folders.values())
    for folder in folders:
        folder.renew(report)


def _open(path: Path) -> Folder:
    """The folder at `path`, opened unless another thread has it open."""
    path = path.absolute()
    with _folders_lock:
        folder = _folders.get(path)
        if folder is None:
            folder = _folders[path] = Folder(path)
        else:
            folder.users += 1
        return folder


@cache
def _standing(path: Path) -> Folder:
    """The folder of an option, open until the process ends."""
    folder = _open(path)
    atexit.register(_leave, folder)
    return folder


def _leave(folder: Folder) -> None:
    with _folders_lock:
        folder.users -= 1
        if not folder.users:
            folder.close()
            for path in [path for path, other in _folders.items() if other is folder]:
                del _folders[path]
            for compilation in [key for key, (other, _) in _compiling.items() if other is folder]:
                del _compiling[compilation]


@cache
def _hear_programs() -> None:
    hear(_heard)


def _heard(program: str) -> None:
    found = _now.get() or _compiling.get(CompileContext.current_compile_id())
    if found is not None:
        folder, recording = found
        folder.hear(recording, program)
