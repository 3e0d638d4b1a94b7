"""Keeps the expected graphs in tests up to date: RECOMPILE_UPDATE_EXPECTED=1 writes what a test found into its file."""

from __future__ import annotations

import ast
import os
import sys
import textwrap
from pathlib import Path

from .errors import RecompileError

VARIABLE = "RECOMPILE_UPDATE_EXPECTED"


def is_updating() -> bool:
    """Whether tests are to be updated instead of compared."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def update(old: str, new: str, keyword: str = "expect") -> None:
    """Puts `new` in the place of the literal `old`, the argument `keyword` of the call that is running.

    Raises:
        RecompileError: the call's file has no such literal.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals["__name__"].startswith("recompile"):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    source = path.read_text(encoding="utf-8")
    found = [
        node.value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        for node in call.keywords
        if node.arg == keyword and isinstance(node.value, ast.Constant) and node.value.value == old
    ]
    if not found:
        raise RecompileError(
            f"{path.name} cannot be updated",
            expected=f"{keyword}=... as a literal in the call",
            got=repr(old)[:60],
        )
    # Line numbers are of the file as it was imported; earlier updates may have moved the literal.
    literal = min(found, key=lambda node: abs(node.lineno - frame.f_lineno))
    path.write_text(_replaced(source, literal, new), encoding="utf-8")


def _replaced(source: str, literal: ast.Constant, new: str) -> str:
    lines = source.splitlines(keepends=True)
    assert literal.end_lineno is not None and literal.end_col_offset is not None
    first, last = lines[literal.lineno - 1], lines[literal.end_lineno - 1]
    margin = " " * (len(first) - len(first.lstrip()) + 4)
    text = textwrap.indent(textwrap.dedent(new).strip("\n"), margin)
    before = first.encode()[: literal.col_offset].decode()
    after = last.encode()[literal.end_col_offset :].decode()
    lines[literal.lineno - 1 : literal.end_lineno] = [f'{before}"""\n{text}\n{margin[4:]}"""{after}']
    return "".join(lines)
