"""Frozen dataclasses as canonical text: `Table(name='user', dim=16)`, with only what differs from the defaults."""

import ast
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any


def to_text(value: Any, types: Mapping[str, Any]) -> str:
    """The text of a record, of a tuple, or of a constant; `types` are the records there are, by name."""
    if type(value).__name__ in types:
        shown = [
            f"{f.name}={to_text(getattr(value, f.name), types)}"
            for f in fields(value)
            if f.default is MISSING or getattr(value, f.name) != f.default
        ]
        return f"{type(value).__name__}({', '.join(shown)})"
    if isinstance(value, tuple):
        return "(" + "".join(f"{to_text(v, types)}, " for v in value).rstrip() + ")"
    return repr(value)


def from_text(text: str, types: Mapping[str, Any]) -> Any:
    """What `to_text` printed as `text`.

    Raises:
        ValueError: the text is something else.
    """
    return _value(ast.parse(text, mode="eval").body, types)


def _value(node: ast.expr, types: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in types:
        return types[node.func.id](**{k.arg: _value(k.value, types) for k in node.keywords if k.arg})
    if isinstance(node, ast.Tuple):
        return tuple(_value(e, types) for e in node.elts)
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):  # as Python prints them
        return float(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, types)
    return ast.literal_eval(node)
