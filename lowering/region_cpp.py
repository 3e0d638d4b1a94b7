"""How Inductor lowers a user's region on a CPU: to a C++ function around the generator's text, in its program."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch._inductor import ir
from torch._inductor.lowering import register_lowering
from torch._inductor.virtualized import V

from recompile.errors import RegionError
from recompile.lowering.inductor import CppRegion, empty
from recompile.lowering.lookup.cpp_common import Operand
from recompile.torch_private.symbols import expression

if TYPE_CHECKING:
    from recompile.lowering.region import Region

# Inductor compiles with -fno-tree-loop-vectorize, under which GCC ignores `omp simd` too.
_VECTORIZED = """#if defined(__GNUC__) && !defined(__clang__)
#define RECOMPILE_VECTORIZED __attribute__((noinline, optimize("tree-loop-vectorize")))
#else
#define RECOMPILE_VECTORIZED
#endif"""
_TRY = "fix the generator; recompile.dump shows the kernels, and without `cpp` the reference is compiled"


def register(region: Region) -> None:
    """Tells Inductor how to lower the region where it has a kernel."""

    def lower(*args: Any) -> Any:
        *tensors, spec = args
        inputs = [ir.ExternKernel.require_contiguous(x) for x in tensors]
        value = V.graph.current_node.meta["val"]
        values = value if isinstance(value, (tuple, list)) else (value,)
        outputs = [empty(_sizes(x), x.dtype, x.device) for x in values]

        def render(ins: Sequence[Operand], outs: Sequence[Operand], threads: int) -> tuple[str, str]:
            return _render(region, [*ins], [*outs], threads, region.parse(spec))

        CppRegion(region.name, spec, inputs, outputs, render)
        return outputs if isinstance(value, (tuple, list)) else outputs[0]

    register_lowering(region.op, type_promotion_kind=None)(lower)


def _sizes(x: Tensor) -> list[Any]:
    return [size if isinstance(size, int) else expression(size) for size in x.shape]


def _render(
    region: Region, inputs: list[Operand], outputs: list[Operand], threads: int, constants: dict[str, Any]
) -> tuple[str, str]:
    """The function around the generator's text, and the call of it."""
    parameters, arguments = list[str](), list[str]()
    operands = list[Operand]()
    for name, x in zip(names(region.cpp), [*inputs, *outputs], strict=True):
        unknown = [k for k, size in enumerate(x.sizes) if not size.isdigit()]
        const = "const " if len(operands) < len(inputs) else ""
        parameters += [
            f"{const}{x.ctype}* __restrict__ {name}",
            *(f"const int64_t {name}_size{k}" for k in unknown),
        ]
        arguments += [x.pointer, *(x.sizes[k] for k in unknown)]
        operands.append(_local(name, x))
    text = _generated(region, operands, threads, constants)
    function = f"""{_VECTORIZED}
RECOMPILE_VECTORIZED void {region.name}({", ".join(parameters)}) {{
#line 1 "recompile::{region.name}"
{text}
#line 1 "recompile"
}}"""
    return function, f"\n  {region.name}({', '.join(arguments)});"


def names(generator: Any) -> list[str]:
    """What a generator calls its operands."""
    given = inspect.signature(generator).parameters.values()
    return [p.name for p in given if p.kind is p.POSITIONAL_OR_KEYWORD]


def _local(name: str, x: Operand) -> Operand:
    """The operand by the names of the function's parameters."""
    sizes = [size if size.isdigit() else f"{name}_size{k}" for k, size in enumerate(x.sizes)]
    strides = [" * ".join(sizes[k + 1 :]) or "1" for k in range(len(sizes))]
    return replace(x, pointer=name, sizes=tuple(sizes), strides=tuple(f"({s})" for s in strides))


def _generated(region: Region, operands: list[Operand], threads: int, constants: dict[str, Any]) -> str:
    assert region.cpp is not None
    try:
        text = region.cpp(*operands, threads=threads, **constants)
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise RegionError(
            f"the C++ generator of region {region.name} failed",
            got=f"{type(error).__name__}: {error}",
            where=f"{frame.name}, line {frame.lineno}: {frame.line}",
            try_=_TRY,
        ) from error
    if not isinstance(text, str):
        raise RegionError(
            f"the C++ generator of region {region.name} gives no text",
            expected="str",
            got=repr(text),
            try_=_TRY,
        )
    return text


def fault(error: BaseException | None) -> RegionError | None:
    """The error of a user's region that is behind `error`, None if there is none."""
    while error is not None:
        if isinstance(error, RegionError):
            return error
        if found := re.search(
            r"^recompile::(\w+):(\d+):\d+: (?:fatal )?error: (.*)", str(error), re.MULTILINE
        ):
            return RegionError(
                f"the C++ of region {found[1]} does not compile",
                got=f"line {found[2]}: {found[3]}",
                try_=_TRY,
            )
        error = error.__cause__ or error.__context__
    return None
