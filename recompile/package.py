"""A package that runs without Python: a model exported, rewritten by the same passes, compiled by AOTInductor."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .errors import RecompileError
from .options import Options
from .report import new_graph

if TYPE_CHECKING:
    from torch.export import ExportedProgram


def package(
    model: nn.Module | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_shapes: Any = None,
    path: str | os.PathLike[str] = "model.pt2",
    options: Mapping[str, object] | None = None,
) -> str:
    """Compiles a model ahead of time, for inference, into a file that `torch._inductor.aoti_load_package` loads.

    Neither the process that loads it nor a C++ program needs recompile: the kernels are in the package.
    `recompile.last_report()` tells what was fused. What cannot be compiled with our passes is compiled by plain
    AOTInductor, with a warning and the reason in the report.

    Args:
        model: a module, which is exported with the next three arguments as `torch.export.export` takes them; or what
            `torch.export.export` gave, without them.
        path: the file to write, which ends in `.pt2`; its folder is made if it is missing.
        options: as for `torch.compile(backend="recompile", options=...)`.

    Returns:
        The path of the package.

    Raises:
        OptionError: an option is unknown or has a bad value.
        PassOrderError: the passes' order has a cycle.
        RecompileError: the path does not end in `.pt2`, or an exported program is given with arguments.
        StrictError: a fallback to plain AOTInductor, a failing pass, or a failing dump, under `strict`.
    """
    chosen, target = Options.from_dict(options), Path(path)
    if target.suffix != ".pt2":
        raise RecompileError("the path of a package ends in .pt2", got=str(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        return _package(_exported(model, args, kwargs, dynamic_shapes), str(target), chosen)


def _exported(
    model: nn.Module | ExportedProgram, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, dynamic: Any
) -> ExportedProgram:
    if isinstance(model, nn.Module):
        return torch.export.export(model, args, dict(kwargs or {}), dynamic_shapes=dynamic)
    if args or kwargs or dynamic:
        raise RecompileError(
            "an exported program has its inputs and shapes already", try_="package(program, path=...)"
        )
    return model


def _package(program: ExportedProgram, path: str, options: Options) -> str:
    from .backend import give_up, optimize, trace  # these need Dynamo, which takes a second to import
    from .dumping import dumping
    from .exported import graph_of, inputs_of, with_graph
    from .pipeline import ordered, parse_passes

    passes = ordered(parse_passes(options.passes))
    record, gm = new_graph(), graph_of(program)
    with dumping(options, record) as recording:
        optimized = optimize(gm, inputs_of(program), options, passes, record, recording)
        try:
            _compile(program if optimized is gm else with_graph(program, optimized), path, options)
        except Exception as error:
            if optimized is gm:
                raise
            give_up(record, error, strict=options.strict)
            _compile(program, path, options)  # raises if AOTInductor cannot either
        if recording is not None:
            recording.programs += _sources(path)
    trace(record)
    return path


def _compile(program: ExportedProgram, path: str, options: Options) -> None:
    torch._inductor.aoti_compile_and_package(
        program, package_path=path, inductor_configs=dict(options.inductor)
    )


def _sources(path: str) -> list[str]:
    """The C++ in a package."""
    with zipfile.ZipFile(path) as found:
        return [found.read(name).decode() for name in sorted(found.namelist()) if name.endswith(".cpp")]
