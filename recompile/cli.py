"""The command line: `recompile demo`, `zoo`; `explain`, `bench`, `package` for a model of yours; what reads a dump."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from . import cli_dump
from .errors import RecompileError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit status: 0, 1 where a check failed, 2 where the command could not run.
    """
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except RecompileError as error:
        print(error, file=sys.stderr)
        return 2


def load(target: str) -> Callable[..., Any]:
    """The function that a target names; it returns a model and example inputs, and may take `batch`.

    Raises:
        RecompileError: the target is not `package.module:function`, or cannot be imported.
    """
    module, colon, function = target.partition(":")
    if not colon:
        raise RecompileError(
            "not a target",
            expected="package.module:function; for explain, or the folder of a dump",
            got=target,
        )
    sys.path.insert(0, "")
    try:
        found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecompileError(
            "the target cannot be loaded", expected="package.module:function", got=str(error)
        ) from error
    return found


def built(build: Callable[[], Any]) -> tuple[Any, tuple[Any, ...]]:
    """The model and the example inputs that a target's function returns.

    Raises:
        RecompileError: it returns something else.
    """
    found = build()
    pair = isinstance(found, (tuple, list)) and len(found) == 2
    if not (pair and callable(found[0]) and isinstance(found[1], (tuple, list))):
        got = f"({', '.join(type(part).__name__ for part in found)})" if pair else type(found).__name__
        raise RecompileError(
            "the function gives no model with its example inputs", expected="(model, (input, ...))", got=got
        )
    return found[0], tuple(found[1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="recompile", description=__doc__)
    commands = parser.add_subparsers(required=True)
    demo = commands.add_parser("demo", help="five real models against Inductor")
    demo.add_argument("--out", type=Path, default=Path("out"), help="folder for demo.json and demo.txt")
    demo.add_argument("--scale", type=float, default=1.0, help="factor on the rows of every table")
    demo.add_argument("--batch", type=_numbers, default=(1, 64, 512, 2048), help="batch sizes: 1,64")
    demo.add_argument("--seconds", type=float, default=2.0, help="of measuring per row")
    demo.set_defaults(run=_demo)
    zoo = commands.add_parser("zoo", help="every model of the zoo against eager")
    zoo.add_argument("--only", type=_words, default=(), help="parts of names: rechub.DeepFM,DIN")
    zoo.add_argument("--batches", type=_numbers, default=(2, 7, 64), help="batch sizes: 2,7,64")
    zoo.add_argument("--scale", type=float, default=0.01, help="factor on the rows of every table")
    zoo.add_argument("--jobs", type=int, default=2, help="models checked at a time")
    zoo.set_defaults(run=_zoo)
    explain = _target(commands.add_parser("explain", help="what was rewritten, what was not, and why"))
    explain.add_argument("--profile", action="store_true", help="measure each region's kernel")
    explain.set_defaults(run=_explain)
    cli_dump.add(commands)
    bisect = commands.add_parser("bisect", help="the first rewrite that changes the numbers")
    bisect.add_argument("target", help="package.module:function, which returns (model, example_inputs)")
    bisect.add_argument("--train", action="store_true", help="compare gradients, too")
    bisect.add_argument("--tolerance", type=float, default=1e-4, help="of the largest magnitude in a tensor")
    bisect.set_defaults(run=_bisect)
    package = commands.add_parser(
        "package", help="a file of AOTInductor with our kernels, for Python and C++"
    )
    package.add_argument("target", help="package.module:function, which returns (model, example_inputs)")
    package.add_argument(
        "--out", type=Path, default=Path("model.pt2"), help="the file; its name ends in .pt2"
    )
    package.add_argument("--dynamic", action="store_true", help="the first size of every input may vary")
    package.set_defaults(run=_package)
    bench = _target(commands.add_parser("bench", help="a model against other backends"))
    bench.add_argument("--against", type=_words, default=("eager", "inductor"), help="inductor,eager")
    bench.add_argument("--batch", type=_numbers, default=(), help="batch sizes; default: the inputs as given")
    bench.add_argument("--train", action="store_true", help="time a forward and a backward")
    bench.add_argument("--seconds", type=float, default=2.0, help="of measuring per row")
    bench.set_defaults(run=_bench)
    return parser


def _target(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument(
        "target", help="package.module:function, which returns (model, example_inputs); explain: or a dump"
    )
    command.add_argument("--json", action="store_true", help="machine-readable output")
    return command


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _demo(args: argparse.Namespace) -> int:
    from .demo import demo

    return demo(args.out, scale=args.scale, seconds=args.seconds, batches=args.batch)


def _zoo(args: argparse.Namespace) -> int:
    from .bench import terminal
    from .zoo.check import check_all

    return check_all(args.only, args.batches, args.scale, args.jobs, terminal())


def _explain(args: argparse.Namespace) -> int:
    from .dump_read import read
    from .explain import explain

    if Path(args.target).is_dir():
        if args.profile:
            raise RecompileError(
                "a dump cannot be measured: its model is not in it",
                got="--profile",
                try_="recompile explain package.module:function --profile",
            )
        report = read(Path(args.target)).report
    else:
        model, inputs = built(load(args.target))
        with torch.no_grad():
            report = explain(model, *inputs, profile=args.profile)
    print(report.to_json() if args.json else report.text())
    return 0


def _bisect(args: argparse.Namespace) -> int:
    from .bisect import bisect

    model, inputs = built(load(args.target))
    found = bisect(model, *inputs, train=args.train, tolerance=args.tolerance)
    print(found)
    return int(found.rewrite is not None)


def _package(args: argparse.Namespace) -> int:
    from .package import package
    from .report import collect

    model, inputs = built(load(args.target))
    shapes = tree_map(_any_first_size, inputs) if args.dynamic else None
    with collect() as report:
        path = package(model, inputs, dynamic_shapes=shapes, path=args.out)
    print(f"{report.text()}\n{path}")
    return 0


def _any_first_size(x: object) -> object:
    return {0: torch.export.Dim.DYNAMIC} if isinstance(x, torch.Tensor) and x.dim() else None


def _bench(args: argparse.Namespace) -> int:
    from .bench import bench, table, terminal

    model, inputs, batches = _sized(load(args.target), args.batch)
    rows = bench(
        type(model).__name__,
        model,
        inputs,
        batches,
        against=args.against,
        train=args.train,
        seconds=args.seconds,
    )
    if args.json:
        print(json.dumps([asdict(row) for row in rows]))
    else:
        terminal().print(table(list(rows), "training step" if args.train else "inference"))
    return 0


def _sized(
    build: Callable[..., Any], batches: tuple[int, ...]
) -> tuple[nn.Module, Callable[[int], tuple[Any, ...]], tuple[int, ...]]:
    """The model, its inputs by batch size, and the batch sizes to run."""
    from .bench import resize, rows_of

    model, inputs = built(build)
    if not batches:
        return model, lambda batch: inputs, (rows_of(inputs),)
    if "batch" in inspect.signature(build).parameters:
        return model, lambda batch: built(partial(build, batch=batch))[1], batches
    return model, partial(resize, inputs), batches
