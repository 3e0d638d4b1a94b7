"""The commands that read a dump: `recompile show`, `diff`, `repro` and `export`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add(commands: Any) -> None:
    """The commands that read a dump."""
    show = _dump(commands.add_parser("show", help="a dump's graphs, stages and regions"))
    show.add_argument("--json", action="store_true", help="machine-readable output")
    show.set_defaults(run=_show)
    diff = _dump(commands.add_parser("diff", help="what each pass changed, as text"))
    diff.add_argument("--pass", dest="name", help="this pass alone: fuse-lookups")
    diff.add_argument("--json", action="store_true", help="machine-readable output")
    diff.set_defaults(run=_diff)
    repro = _dump(commands.add_parser("repro", help="a script that runs one region, fused and unfused"))
    repro.add_argument("region", help="a region's node, such as lookup_default, or region-0")
    repro.add_argument("--output", type=Path, help="where to write it; default: repro_REGION.py")
    repro.set_defaults(run=_repro)
    export = _dump(commands.add_parser("export", help="a graph for Graphviz or Model Explorer"))
    export.add_argument("--format", choices=("dot", "model-explorer"), default="dot")
    export.add_argument("--pass", dest="name", help="after this pass; default: the last one")
    export.set_defaults(run=_export)


def _dump(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("folder", type=Path, help="the folder of a dump")
    command.add_argument("--graph", type=int, help="the number of a graph; default: the one with most nodes")
    return command


def _show(args: argparse.Namespace) -> int:
    from .dump_read import read
    from .show import show, summary

    dump = read(args.folder)
    if args.json:
        graphs = summary(dump)
        print(json.dumps(graphs if args.graph is None else graphs[dump.chosen(args.graph)], indent=2))
    else:
        _console().print(show(dump, args.graph))
    return 0


def _diff(args: argparse.Namespace) -> int:
    from .dump_read import read
    from .show import coloured, diffs

    found = diffs(read(args.folder), args.name, args.graph)
    if args.json:
        print(json.dumps([{"pass": name, "diff": lines} for name, lines in found], indent=2))
        return 0
    console = _console()
    for _, lines in found:
        for line in coloured(lines):
            console.print(line, soft_wrap=True)
    return 0


def _export(args: argparse.Namespace) -> int:
    from .dump_read import read
    from .export import export

    print(export(read(args.folder), args.format, args.graph, args.name), end="")
    return 0


def _console() -> Any:
    """The terminal; 130 characters wide where there is none."""
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=130)


def _repro(args: argparse.Namespace) -> int:
    from .dump_read import read
    from .repro_script import script

    text = script(read(args.folder), args.region, args.graph)
    output = args.output or Path(f"repro_{args.region}.py")
    output.write_text(text, encoding="utf-8")
    print(f"python {output}")
    return 0
