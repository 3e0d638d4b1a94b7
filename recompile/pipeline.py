"""Which passes run, in which order, and what is checked after each."""

from __future__ import annotations

import logging
import re
import time
import traceback
from collections.abc import Iterable
from dataclasses import fields

import networkx as nx
import torch
from torch import fx

from .errors import OptionError, PassOrderError, RecompileError, StrictError, unknown
from .options import Options
from .report import GraphRecord, PassRecord
from .rewrite import Context, Pass, registered

log = logging.getLogger("recompile")


def run_passes(gm: fx.GraphModule, options: Options, record: GraphRecord) -> None:
    """Runs the chosen passes over `gm.graph`, in place, and records each.

    A pass that raises, or breaks the graph, is undone and recorded; the others still run.

    Raises:
        StrictError: such a failure, under `strict`.
    """
    for chosen in ordered(parse_passes(options.passes)):
        entry = PassRecord(chosen.name(), chosen.numerics, nodes_before=len(gm.graph.nodes))
        record.passes.append(entry)
        start = time.perf_counter()
        saved = fx.Graph()
        output = saved.graph_copy(gm.graph, copied := {})
        ctx = Context(options)
        try:
            before = _signature(gm.graph)
            chosen.run(gm.graph, ctx)
            gm.graph.lint()
            if options.verify != "none":
                _same_outputs(before, _signature(gm.graph))
        except Exception as error:
            entry.error = f"{type(error).__name__}: {error}"
            log.warning("pass %s failed and was undone: %s", entry.name, entry.error)
            log.debug("%s", traceback.format_exc())
            _restore(gm, saved, output, copied)
            if options.strict:
                raise StrictError(f"pass {entry.name} failed", got=entry.error) from error
        gm.recompile()
        entry.rules = list(ctx.rules.values())
        entry.nodes_after = len(gm.graph.nodes)
        entry.ms = (time.perf_counter() - start) * 1e3


def _restore(gm: fx.GraphModule, saved: fx.Graph, output: object, copied: dict[fx.Node, fx.Node]) -> None:
    """Puts the copy of the graph back, with its output node's metadata."""
    saved.output(output)
    for old, new in copied.items():
        new.meta = dict(old.meta)
    gm.graph = saved


def _signature(graph: fx.Graph) -> list[object]:
    """Shape, dtype and device of every tensor that the graph returns."""
    found: list[object] = []
    for node in graph.output_node().all_input_nodes:
        val = node.meta.get("val")
        found.append(
            (tuple(val.shape), val.dtype, val.device) if isinstance(val, torch.Tensor) else type(val)
        )
    return found


def _same_outputs(before: list[object], after: list[object]) -> None:
    if [str(x) for x in before] != [str(x) for x in after]:
        raise RecompileError("the pass changed the graph's outputs", expected=str(before), got=str(after))


def ordered(chosen: Iterable[Pass]) -> list[Pass]:
    """The passes in an order that their `after` and `before` allow; ties by name.

    Raises:
        PassOrderError: the constraints form a cycle; the message names it.
    """
    by_name = {p.name(): p for p in chosen}
    order = nx.DiGraph()
    order.add_nodes_from(by_name)
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


def parse_passes(text: str) -> list[Pass]:
    """The passes that e.g. `default,fuse-lookups{min-tables=8},-pool-sequences` names.

    Raises:
        OptionError: an unknown pass or field, or a value of the wrong type.
    """
    known = registered()
    chosen: dict[str, Pass] = {}
    for item in filter(None, (t.strip() for t in re.split(r",(?![^{]*\})", text))):
        if item == "default":
            chosen |= {name: cls() for name, cls in known.items()}
            continue
        name, _, rest = item.lstrip("-").partition("{")
        if name not in known:
            raise unknown("pass", name, known)
        if item.startswith("-"):
            chosen.pop(name, None)
        else:
            chosen[name] = known[name](**_settings(known[name], rest.rstrip("}")))
    return list(chosen.values())


def _settings(cls: type[Pass], text: str) -> dict[str, object]:
    kinds = {f.name.replace("_", "-"): type(f.default) for f in fields(cls)}
    values: dict[str, object] = {}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in kinds:
            raise unknown(f"setting of pass {cls.name()}:", key, kinds)
        try:
            values[key.replace("-", "_")] = value == "true" if kinds[key] is bool else kinds[key](value)
        except ValueError as error:
            raise OptionError(
                f"setting {key!r} of pass {cls.name()} has the wrong type",
                expected=kinds[key].__name__,
                got=value,
            ) from error
    return values
