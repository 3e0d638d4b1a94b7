"""Which passes run and in which order: the text of the `passes` option, and the passes' own constraints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields

import networkx as nx

from .errors import OptionError, PassOrderError, unknown
from .rewrite import Pass, registered

_ITEM = re.compile(r"(?P<minus>-?)(?P<name>[\w-]+)(\{(?P<settings>[^{}]*)\})?")
_COMMA = re.compile(r",(?![^{]*\})")  # those between items, not those between settings
_BOOL = {"true": True, "false": False}


def parse_passes(text: str) -> list[Pass]:
    """The passes that e.g. `default,fuse-lookups{min-tables=8},-pool-sequences` names, in no special order.

    `default` is all registered passes; a name adds a pass or replaces it by one with other settings; a minus
    takes one out.

    Raises:
        OptionError: an unknown pass or setting, a setting of the wrong type, or text that is none of these.
    """
    known = registered()
    chosen: dict[str, Pass] = {}
    for item in filter(None, map(str.strip, _COMMA.split(text))):
        if item == "default":
            chosen |= {name: cls() for name, cls in known.items()}
            continue
        minus, name, settings = _read(item, known)
        if minus:
            chosen.pop(name, None)
        else:
            chosen[name] = known[name](**_settings(known[name], settings))
    return list(chosen.values())


def spelled(passes: Iterable[Pass]) -> str:
    """The shorter text that `parse_passes` reads as these passes: changes to `default`, or all their names."""
    texts = {p.name(): p.name() + _changed(p) for p in passes}
    known = registered()
    own = [text for name, text in texts.items() if name not in known or text != name]
    return min(
        ",".join(["default", *own, *(f"-{name}" for name in known if name not in texts)]),
        ",".join(texts.values()),
        key=len,
    )


def _changed(p: Pass) -> str:
    """The settings that are not their default's: `{min-tables=8}`, or ""."""
    values = {
        f.name.replace("_", "-"): getattr(p, f.name) for f in fields(p) if getattr(p, f.name) != f.default
    }
    settings = [f"{name}={_written(value)}" for name, value in values.items()]
    return f"{{{','.join(settings)}}}" if settings else ""


def _written(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def ordered(chosen: Iterable[Pass]) -> list[Pass]:
    """The passes in an order that their `after` and `before` allow; ties by name, so that it never varies.

    Raises:
        PassOrderError: the constraints form a cycle; the message names it.
    """
    by_name = {p.name(): p for p in chosen}
    order = nx.DiGraph()
    order.add_nodes_from(sorted(by_name))
    for name, p in by_name.items():
        order.add_edges_from((a, name) for a in p.after if a in by_name)
        order.add_edges_from((name, b) for b in p.before if b in by_name)
    try:
        return [by_name[n] for n in nx.lexicographical_topological_sort(order)]
    except nx.NetworkXUnfeasible as error:
        cycle = [a for a, _ in nx.find_cycle(order)]
        raise PassOrderError(
            "the passes' order has a cycle: " + " -> ".join([*cycle, cycle[0]]),
            try_="drop one of the `after` or `before` constraints of these passes",
        ) from error


def _read(item: str, known: Mapping[str, object]) -> tuple[bool, str, str]:
    """Whether to take the pass out, its name, and the text of its settings."""
    found = _ITEM.fullmatch(item)
    if found is None or (found["minus"] and found["settings"] is not None):
        raise OptionError(
            "option 'passes' cannot be read",
            expected="names with commas between, such as default,fuse-lookups{min-tables=8},-dead-code",
            got=item,
        )
    if found["name"] not in known:
        raise unknown("pass", found["name"], ["default", *known])
    return bool(found["minus"]), found["name"], found["settings"] or ""


def _settings(cls: type[Pass], text: str) -> dict[str, object]:
    """`min-tables=8` as a keyword argument for the pass's dataclass."""
    kinds = {f.name.replace("_", "-"): type(f.default) for f in fields(cls)}
    values: dict[str, object] = {}
    for part in filter(None, map(str.strip, text.split(","))):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise unknown(f"setting of pass {cls.name()}:", key, kinds)
        values[key.replace("-", "_")] = _typed(f"setting {key!r} of pass {cls.name()}", kinds[key], value)
    return values


def _typed(what: str, kind: type, value: str) -> object:
    try:
        return _BOOL[value] if kind is bool else kind(value)
    except (KeyError, ValueError) as error:
        expected = "true or false" if kind is bool else kind.__name__
        raise OptionError(f"{what} has the wrong type", expected=expected, got=repr(value)) from error
