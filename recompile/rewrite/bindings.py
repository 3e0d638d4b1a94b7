"""What a match has bound so far, with undo."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import fx

from recompile.rewrite.pattern import Pattern

UNBOUND = object()


@dataclass
class Scope:
    """What is bound: by the whole match, or by one element of an `each`."""

    names: dict[Any, Any] = field(default_factory=dict)
    keys: dict[Any, Any] = field(default_factory=dict)  # a pattern's key -> what it matched
    dims: dict[Any, Any] = field(default_factory=dict)


class Bindings:
    """The state of one attempt to match. Everything that is bound can be undone up to a mark."""

    def __init__(self) -> None:
        self.scopes = [Scope()]
        self.inner: dict[fx.Node, None] = {}  # the nodes that operators of the pattern cover
        self.once: dict[fx.Node, None] = {}  # those that nothing else may use
        self._trail: list[tuple[dict[Any, Any], Any]] = []

    def mark(self) -> int:
        """Where to undo to."""
        return len(self._trail)

    def undo(self, mark: int) -> None:
        """Forget what was bound since `mark`."""
        while len(self._trail) > mark:
            bound, key = self._trail.pop()
            bound.pop(key, None)

    def set(self, bound: dict[Any, Any], key: Any, value: Any = None) -> None:
        """Bind `key`, in one of the dictionaries here, unless it is bound."""
        if key not in bound:
            bound[key] = value
            self._trail.append((bound, key))

    def name(self, name: str) -> Any:
        """What `name` stands for, here or further out; UNBOUND if nothing."""
        for scope in reversed(self.scopes):
            if name in scope.names:
                return scope.names[name]
        return UNBOUND

    def matched(self, pattern: Pattern) -> Any:
        """What this very pattern has matched, here or further out; UNBOUND if nothing."""
        for scope in reversed(self.scopes):
            if pattern.key in scope.keys:
                return scope.keys[pattern.key]
        return UNBOUND

    def dim(self, name: str, size: Any) -> Any:
        """The size that the dimension `name` stands for: `size` if it is new or lower case."""
        free = not name[0].isupper()
        scope = self.scopes[-1 if free else 0]
        self.set(scope.dims, name, size)
        return size if free else scope.dims[name]
