"""The passes that the pipeline knows."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.metadata import entry_points
from types import ModuleType
from typing import TypeVar, overload

from recompile.errors import RecompileError
from recompile.rewrite.base import Pass

P = TypeVar("P", bound=type[Pass])
_known: dict[str, type[Pass]] = {}


@overload
def register(cls: P) -> P: ...
@overload
def register(*, after: tuple[str, ...] = ..., before: tuple[str, ...] = ...) -> Callable[[P], P]: ...
def register(
    cls: P | None = None, *, after: tuple[str, ...] = (), before: tuple[str, ...] = ()
) -> P | Callable[[P], P]:
    """Make a pass known to the pipeline under its name: `@register`, or `@register(after=("canonicalize",))`.

    Registering a class again, as a notebook does, replaces it.

    Args:
        after: names of passes that this one follows, beside those of the class's own `after`.
        before: names of passes that follow this one, likewise.

    Raises:
        RecompileError: another class has this name.
    """

    def add(cls: P) -> P:
        name, other = cls.name(), _known.get(cls.name())
        if other is not None and (other.__module__, other.__qualname__) != (cls.__module__, cls.__qualname__):
            raise RecompileError(
                f"two passes are called {name!r}",
                got=f"{other.__module__}.{other.__qualname__} and {cls.__module__}.{cls.__qualname__}",
                try_="rename one of the classes",
            )
        cls.after, cls.before = (*cls.after, *after), (*cls.before, *before)
        _known[name] = cls
        return cls

    return add if cls is None else add(cls)


def registered() -> dict[str, type[Pass]]:
    """All known passes by name: ours, and those that packages offer as entry points `recompile.passes`.

    One that fails to load or whose name is taken is left out, with a warning.
    """
    _load()
    return dict(_known)


@cache
def _load() -> None:
    from recompile import passes  # noqa: F401  (importing it registers ours)

    for entry in entry_points(group="recompile.passes"):
        try:
            _take(entry.load())
        except Exception as error:  # a package that fails must not cost its user every model
            package = entry.dist.name if entry.dist else "?"
            warnings.warn(
                f"recompile: the entry point {entry.name} = {entry.value} of package {package} is left out: "
                f"{type(error).__name__}: {error}",
                stacklevel=2,
            )


def _take(found: object) -> None:
    """Registers what an entry point names: a pass, or a module, which has registered some."""
    if isinstance(found, type) and issubclass(found, Pass):
        found()  # as `passes="default"` makes it
        register(found)
    elif not isinstance(found, ModuleType):
        raise TypeError(f"{found!r} is neither a pass nor a module that registers some")
