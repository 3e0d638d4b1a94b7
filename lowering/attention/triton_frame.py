"""The frame of an attention's Triton kernels: parameters, batch indices, addresses, and the text around a body.

A program computes one tile of one batch index. Numbers that the compiler knows are in the text; symbolic ones are
parameters. Tensors are read through their strides, whose zeros broadcast.

Names in a kernel: `q_ptr`, `x0_ptr`, ... are parameters, `q_at` the first element for this program's batch index.
"""

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from recompile.lowering.attention.triton_schedule import Schedule
from recompile.lowering.lookup.triton_kernel import indent

TRITON = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}


@dataclass(frozen=True)
class Launch:
    """One kernel and what it is called with; the grid depends on the tile that the tuner chose."""

    name: str
    source: str
    arguments: dict[str, Any]
    grid: Callable[[Any], tuple[Any]]


@dataclass
class Frame:
    """What one kernel is called with, and the statements at its start."""

    batch: tuple[Any, ...]
    arguments: dict[str, Any] = field(default_factory=dict)
    start: list[str] = field(default_factory=list)
    asserts: bool = False

    def number(self, name: str, x: Any) -> str:
        """A size or stride: itself where it is known, else a parameter."""
        if isinstance(x, int):
            return str(x)
        taken = {str(v): k for k, v in self.arguments.items() if isinstance(v, torch.SymInt)}
        found: str = taken.get(str(x), name)
        self.arguments[found] = x
        return found

    def size(self, name: str, x: Any) -> str:
        """A size that expressions speak of: a parameter of this name, unless it is known."""
        if isinstance(x, int):
            return str(x)
        self.arguments[name] = x
        return name

    def tensor(self, name: str, x: Tensor, tail: int) -> None:
        """A tensor `[*batch, ...tail dims]`: declares `<name>_at`."""
        self.arguments[f"{name}_ptr"] = x
        outer = x.shape[: x.dim() - tail]
        at = f"{name}_at = {name}_ptr"
        for k in range(len(outer)):
            b = len(self.batch) - len(outer) + k
            stride = self.stride(f"{name}_b{b}", x, k)
            if stride != "0" and not is_one(self.batch[b]):
                at += f" + b{b} * {stride}" if stride != "1" else f" + b{b}"
        self.start.append(at)

    def stride(self, name: str, x: Tensor, dim: int) -> str:
        """Elements from one index of `dim` to the next; 0 where `x` is broadcast."""
        return "0" if is_one(x.shape[dim]) else self.number(name, x.stride(dim))

    def indices(self) -> list[str]:
        """Declares `b0`, `b1`, ...: the batch index of this program, as 64 bits for addresses."""
        lines, rest = [], "batch"
        for b in reversed(range(len(self.batch))):
            if is_one(self.batch[b]):
                continue
            size = self.number(f"B{b}", self.batch[b])
            outermost = all(map(is_one, self.batch[:b]))
            index = rest if outermost else f"{rest} % {size}"
            lines.append(f"b{b} = ({index}).to(tl.int64)" if " " in index else f"b{b} = {index}.to(tl.int64)")
            rest = f"{rest} // {size}"
        return list(reversed(lines))


def is_one(size: Any) -> bool:
    """Whether a size is known to be 1: such a dim is broadcast."""
    return isinstance(size, int) and size == 1


def offset(terms: Iterable[tuple[str, str]], wide: bool) -> str:
    """` + index * stride` for each (index, stride); in 64 bits if `wide`."""
    text = ""
    for index, stride in terms:
        index = f"{index}.to(tl.int64)" if wide else index
        text += f" + {index}" if stride == "1" else f" + {index} * {stride}"
    return text


def is_wide(x: Tensor, dims: Sequence[int]) -> bool:
    """Whether offsets over `dims` may not fit into 32 bits."""
    reach = [x.shape[d] * x.stride(d) for d in dims if not is_one(x.shape[d])]
    return not all(isinstance(r, int) for r in reach) or sum(reach) >= 2**31


def wrapped(line: str, width: int = 110) -> list[str]:
    """A long statement over several lines, broken at the spaces that brackets enclose."""
    if len(line) <= width:
        return [line]
    margin = " " * (len(line) - len(line.lstrip()))
    target, equals, value = line.strip().partition(" = ")
    if equals and _SPACE in _glued(value):
        value = f"({value})"
    return textwrap.wrap(
        _glued(target + equals + value), width, initial_indent=margin, subsequent_indent=margin + "    ",
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


_SPACE = "\u00a0"  # textwrap does not break here


def _glued(text: str) -> str:
    """With the spaces outside brackets, and inside strings, such that no line is broken there."""
    depth, quoted, letters = 0, False, []
    for letter in text:
        quoted ^= letter == '"'
        depth += (letter in "([") - (letter in ")]")
        letters.append(_SPACE if letter == " " and (quoted or not depth) else letter)
    return "".join(letters)


def kernel(name: str, title: str, frame: Frame, block: str, tiles: Any, body: Sequence[str],
           schedules: Sequence[Schedule]) -> Launch:  # fmt: skip
    """The kernel whose programs each compute a tile: `block` is the size of the tile that they share `tiles` by."""
    first = ["program = tl.program_id(0)"]
    count = f"tl.cdiv({frame.size('M' if block == 'BLOCK_M' else 'N', tiles)}, {block})"
    first += [f"tile = program % {count}", f"batch = program // {count}", *frame.indices()]
    lines = [
        part.replace(_SPACE, " ")
        for line in indent([*first, *frame.start, "", *body])
        for part in wrapped(line)
    ]
    parameters = [*frame.arguments, "BLOCK_M: tl.constexpr", "BLOCK_N: tl.constexpr"]
    text = "\n".join(line.rstrip() for line in lines)
    source = f'''"""Generated by recompile: {title}
"""

import triton
import triton.language as tl


@triton.autotune(
    [
{"".join(f"        {s},{chr(10)}" for s in schedules)}    ],
    key=[],
)
@triton.jit{"(debug=True)" if frame.asserts else ""}
def {name}(
{"".join(f"    {p},{chr(10)}" for p in parameters)}):
{text}
'''
    programs = math.prod(frame.batch)

    def grid(meta: Any) -> tuple[Any]:
        size = meta[block]
        return ((tiles + size - 1) // size * programs,)

    return Launch(name, source, frame.arguments, grid)
