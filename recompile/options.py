"""What a user can set with `torch.compile(..., options={...})`: typed, validated, documented in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

from .errors import OptionError, unknown


def _option(default: Any, doc: str, allowed: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"doc": doc, "allowed": allowed})


@dataclass(frozen=True)
class Options:
    """The options of one compilation. `repr` is the canonical text: equal options have equal text."""

    strict: bool = _option(False, "A fallback to plain Inductor or a failing pass is an error.")
    passes: str = _option(
        "default",
        "Which passes run, such as `default,fuse-lookups{min-tables=8},-pool-sequences,my-pass`. "
        "The environment variable `RECOMPILE_PASSES` sets the default.",
    )
    rewrite_limit: int = _option(
        -1,
        "Stop after so many rewrites in this process (see `recompile bisect`); -1: never. "
        "The environment variable `RECOMPILE_REWRITE_LIMIT` sets the default.",
    )
    verify: str = _option(
        "shapes", "What is checked after every pass that changed the graph.", ("none", "shapes", "numerics")
    )
    numerics: str = _option(
        "reassociate",
        "How far a rewrite may go: bitwise equal, another order of summation, or approximations.",
        ("exact", "reassociate", "fast"),
    )
    dump: str = _option(
        "",
        "A folder to write every graph to, stage by stage, with the generated kernels and a page that shows them. "
        "The environment variable `RECOMPILE_DUMP` sets the default.",
    )
    inductor: tuple[tuple[str, object], ...] = _option(
        (), "A dictionary of `torch._inductor.config` settings for this model; wins over `mode`."
    )

    @classmethod
    def from_dict(cls, given: Mapping[str, object] | None) -> Options:
        """Options from what the user wrote.

        Raises:
            OptionError: an unknown key, a value of the wrong type, or one that is not allowed.
        """
        known = {f.name: f for f in fields(cls)}
        values = _environment()
        for key, value in (given or {}).items():
            if key not in known:
                raise unknown("option", key, known)
            value = os.fspath(value) if isinstance(value, os.PathLike) else value
            values[key] = _inductor(value) if key == "inductor" else _checked(known[key], value)
        return cls(**values)

    def inductor_setting(self, name: str) -> Any:
        """A setting of Inductor, as it will be while Inductor compiles this model."""
        import torch._inductor.config  # it needs Dynamo, which takes a second to import

        return dict(self.inductor).get(name, getattr(torch._inductor.config, name))


def _environment() -> dict[str, Any]:
    """The options that environment variables set.

    Raises:
        OptionError: the limit is no number.
    """
    found: dict[str, Any] = {
        key: os.environ[variable]
        for key in ("passes", "dump", "rewrite_limit")
        if (variable := f"RECOMPILE_{key.upper()}") in os.environ
    }
    if "rewrite_limit" in found:
        try:
            found["rewrite_limit"] = int(found["rewrite_limit"])
        except ValueError as error:
            got = found["rewrite_limit"]
            raise OptionError(
                "RECOMPILE_REWRITE_LIMIT is no number", expected="such as 12", got=got
            ) from error
    return found


def _checked(option: Field[Any], value: object) -> object:
    """`value` if it has the type of the option's default and is allowed."""
    kind, allowed = type(option.default), option.metadata["allowed"]
    if not isinstance(value, kind):
        raise OptionError(
            f"option {option.name!r} has the wrong type",
            expected=kind.__name__,
            got=f"{value!r} ({type(value).__name__})",
        )
    if allowed and value not in allowed:
        raise unknown(f"value of option {option.name!r}:", value, allowed)
    return value


def _inductor(value: object) -> tuple[tuple[str, object], ...]:
    """Inductor settings as sorted pairs, so that equal settings have equal text."""
    if not isinstance(value, Mapping):
        raise OptionError(
            "option 'inductor' has the wrong type", expected="a dictionary of settings", got=repr(value)
        )
    from torch._inductor import list_options

    allowed = set(list_options())
    names = {str(key).replace("-", "_"): setting for key, setting in value.items()}
    for name in names:
        if name not in allowed:
            raise unknown("Inductor setting", name, allowed)
    return tuple(sorted(names.items()))


def options_table() -> str:
    """The options as a Markdown table: name, type, default, meaning. `docs/options.md` holds it."""
    rows = ["| option | type | default | meaning |", "|---|---|---|---|"]
    for option in fields(Options):
        allowed = option.metadata["allowed"]
        kind = " or ".join(f"`{name}`" for name in allowed) or f"{type(option.default).__name__}"
        shown = ("dict", "{}") if option.name == "inductor" else (kind, repr(option.default))
        rows.append(f"| `{option.name}` | {shown[0]} | `{shown[1]}` | {option.metadata['doc']} |")
    return "\n".join(rows)
