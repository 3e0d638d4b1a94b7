"""The report for people: `render` gives something that rich can print, `plain` gives text."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from .report import CostRecord, GraphRecord, PassRecord, Refusal, RegionRecord, Report
from .wording import counted, plural

_SENTENCES = 10  # different ones a rule
_NAMES = 3  # of rules that did nothing
_BEST = {"memory": "a large copy", "compute": "a large matrix product"}


def plain(report: Report, width: int) -> str:
    """The report without colours, `width` characters wide, without trailing spaces."""
    out = io.StringIO()
    console = Console(file=out, width=width, color_system=None, highlight=False, force_jupyter=False)
    console.print(render(report))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


def render(report: Report) -> RenderableType:
    """Graph by graph: what each pass did, the regions, and what was not done and why."""
    if not report.graphs:
        return Text("No graph was compiled with recompile yet.")
    return Group(*(part for graph in report.graphs for part in _graph(graph)))


def _graph(graph: GraphRecord) -> Iterator[RenderableType]:
    if graph.fallback:
        yield Text(
            f"graph {graph.index}: {plural(graph.nodes_before, 'node')}, compiled by plain Inductor",
            style="bold",
        )
        yield Text(f"  because {_sentence(graph.fallback)}\n", style="yellow")
        return
    counts = f"{plural(graph.nodes_before, 'node')} -> {graph.nodes_after}"
    yield Text(f"graph {graph.index}: {counts}, captured in {graph.capture_ms:.1f} ms", style="bold")
    if graph.passes:
        yield _passes(graph.passes)
    if graph.chosen:
        yield _Indented(Text("passes: " + ", ".join(graph.chosen.split(","))), 2)
    for region in graph.regions:
        yield _Indented(Text(f"{region.name}: {region.summary}", style="green"), 2)
        yield from (_Indented(Text(line, style="cyan"), 6) for line in _told(region))
        yield from (_Indented(Text(line), 6) for line in _folded(region.lines))
    lines = [*(line for record in graph.passes for line in _not_done(record)), *_idle(graph.passes)]
    yield from (_Indented(Text(line), 2) for line in lines)
    yield Text("")


@dataclass(frozen=True)
class _Indented:
    """A line that its continuations stand behind."""

    text: Text
    by: int

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        more = self.by + 4
        first, *rest = self.text.wrap(console, max(options.max_width - more, 20))
        yield Padding(first, (0, 0, 0, self.by))
        yield from (Padding(line, (0, 0, 0, more)) for line in rest)


def _told(region: RegionRecord) -> Iterator[str]:
    """What a region reads and writes, its cost beside that of what it replaced, what limits it, and its kernel."""
    before, after = region.before, region.after
    if region.reads:
        yield f"reads {counted(region.reads.values())}; writes {counted(region.writes)}"
    if before and after:
        moved = f"{_amount(before.example_bytes)}B -> {_amount(after.example_bytes)}B moved"
        flops = f"{_amount(before.example_flops)}FLOP -> {_amount(after.example_flops)}FLOP"
        yield f"each operator alone -> fused: {moved}, {flops}"
        if not after.bytes.isdigit():
            yield f"bytes {before.bytes} -> {after.bytes}"
            yield f"FLOP {before.flops} -> {after.flops}"
    if region.kernel:
        yield f"kernel: {region.kernel} in the dump"
    if measured := region.measured:
        best = _BEST.get(measured.bound)
        reached = f", {measured.reached:.0%} of the speed of {best}" if best else ""
        yield f"{measured.ms:.3f} ms, bound by {measured.bound}{reached}"
    elif after:
        yield _predicted(after, region)
    if region.unmeasured:
        yield region.unmeasured


def _predicted(after: CostRecord, region: RegionRecord) -> str:
    """The operations for each byte moved, and what follows from them."""
    flops = after.example_flops / max(after.example_bytes, 1)
    by = f", bound by {region.bound or 'memory or compute, as the CPU is'}" if region.device == "cpu" else ""
    return f"{flops:.2g} FLOP a byte{by}" if flops < 10 else f"{flops:.0f} FLOP a byte{by}"


def _amount(number: int) -> str:
    """`1.68 M`, with a decimal prefix."""
    for prefix, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number} "


def _passes(records: list[PassRecord]) -> Table:
    table = Table("pass", "numerics", "nodes", "ms", "what happened", box=None, padding=(0, 2))
    for record in records:
        nodes = f"{record.nodes_before} -> {record.nodes_after}"
        what = "\n".join(_what(record))
        table.add_row(record.name, record.numerics, nodes, f"{record.ms:.1f}", escape(what))
    return table


def _what(record: PassRecord) -> Iterator[str]:
    if record.skipped:
        yield f"did not run: {record.skipped}"
    elif record.error:
        yield f"was undone: {record.error.splitlines()[0]}"
    elif not any(rule.fired or rule.refused for rule in record.rules):
        tried = record.rules[0].tried if _is_alone(record) else 0
        idle = f"tried {tried}, and nothing fitted" if tried else "nothing to do"
        yield idle if record.nodes_before == record.nodes_after else "changed the graph"
    for rule in record.rules:
        name = "" if rule.name == record.name else f"{rule.name} "
        if rule.fired or rule.refused:
            fired = f"{name}fired {plural(rule.fired, 'time')}"
            every = rule.fired == rule.tried and not rule.refused
            yield fired if every else f"{fired}, tried {rule.tried}, refused {len(rule.refused)}"


def _idle(records: list[PassRecord]) -> Iterator[str]:
    """The rules that neither fired nor refused, in two lines for all passes."""
    idle = [
        r for record in records if not _is_alone(record) for r in record.rules if not (r.fired or r.refused)
    ]
    tried = sorted((r for r in idle if r.tried), key=lambda r: -r.tried)
    if tried:
        yield "tried, and nothing fitted: " + _few([f"{r.tried} x {r.name}" for r in tried])
    if never := [r.name for r in idle if not r.tried]:
        yield "met no candidate: " + _few(never)


def _is_alone(record: PassRecord) -> bool:
    """Whether a pass is one rule of its own name, which its line tells about."""
    return [rule.name for rule in record.rules] == [record.name]


def _few(names: list[str]) -> str:
    """The first names, and how many more there are: the JSON has all."""
    more = len(names) - _NAMES
    return ", ".join(names[:_NAMES]) + (f" and {plural(more, 'more rule')}" if more > 0 else "")


def _not_done(record: PassRecord) -> Iterator[str]:
    """One line for each refusal sentence; the same sentence at other nodes is folded into a count."""
    for rule in record.rules:
        first: dict[str, Refusal] = {}
        counts = Counter(refusal.why for refusal in rule.refused)
        for refusal in rule.refused:
            first.setdefault(refusal.why, refusal)
        for why, refusal in [*first.items()][:_SENTENCES]:
            more = f" (and {counts[why] - 1} more like it)" if counts[why] > 1 else ""
            yield f"{rule.name} did not fire: {_sentence(refusal)}{more}"
        if others := [*first][_SENTENCES:]:
            times = plural(sum(counts[why] for why in others), "time")
            yield f"{rule.name} did not fire {times} for {plural(len(others), 'other reason')}: see a dump's page"


def _sentence(refusal: Refusal) -> str:
    node = f" [{refusal.node}]" if refusal.node else ""
    line = f" at {refusal.line}" if refusal.line else ""
    return refusal.why + node + line


def _folded(lines: list[str]) -> Iterator[str]:
    for line, count in Counter(lines).items():
        yield f"{line}  x{count}" if count > 1 else line
