"""The command line: `recompile explain | bench package.module:function`."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from .errors import RecompileError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="recompile", description=__doc__)
    commands = parser.add_subparsers(required=True)
    for name, run in (("explain", _explain), ("bench", _bench)):
        command = commands.add_parser(name)
        command.add_argument("target", help="package.module:function, which returns (model, example_inputs)")
        command.add_argument("--json", action="store_true", help="machine-readable output")
        command.set_defaults(run=run)
        if name == "bench":
            command.add_argument("--against", default="inductor,eager", help="what to compare with")
            command.add_argument("--seconds", type=float, default=5.0, help="how long to measure")
    args = parser.parse_args(argv)
    try:
        return int(args.run(args))
    except RecompileError as error:
        print(error, file=sys.stderr)
        return 2


def load(target: str) -> tuple[torch.nn.Module, tuple[Any, ...]]:
    """The model and inputs that a target names.

    Raises:
        RecompileError: the target is not `package.module:function`, or cannot be imported.
    """
    module, colon, function = target.partition(":")
    if not colon:
        raise RecompileError("not a target", expected="package.module:function", got=target)
    sys.path.insert(0, "")
    try:
        build = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecompileError(
            "the target cannot be loaded", expected="package.module:function", got=str(error)
        ) from error
    model, inputs = build()
    return model, tuple(inputs)


def _explain(args: argparse.Namespace) -> int:
    from .explain import explain

    model, inputs = load(args.target)
    with torch.no_grad():
        report = explain(model, *inputs)
    print(report.to_json() if args.json else report.text())
    return 0


def _bench(args: argparse.Namespace) -> int:
    from .measure import interleave

    model, inputs = load(args.target)
    variants: dict[str, Any] = {"recompile": torch.compile(model, backend="recompile")}
    for name in args.against.split(","):
        variants[name] = model if name == "eager" else torch.compile(model, backend=name)
    with torch.no_grad():
        expected = model(*inputs)
        for compiled in variants.values():
            torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-3, atol=1e-4)
        calls = {name: partial(compiled, *inputs) for name, compiled in variants.items()}
        found = interleave(calls, seconds=args.seconds)
    rows = {
        name: {"ms": t.median_ms, "spread": t.spread, "ratio": found.ratio(name, "recompile")}
        for name, t in found.timings.items()
    }
    if args.json:
        print(json.dumps(rows))
        return 0
    print(f"{'':12} {'median ms':>10} {'spread':>7} {'recompile is faster by':>23}")
    for name, row in rows.items():
        print(f"{name:12} {row['ms']:10.3f} {row['spread']:7.0%} {row['ratio']:22.2f}x")
    return 0
