"""The programs that Inductor writes, how many kernels one run of them launches, and the kernels of ours in them.

Tried with torch 2.13: `torch._inductor.graph.GraphLowering.save_output_code`, which is also called when a
program comes from a cache; the C++ in packages of torch 2.11 and 2.13.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

from torch._inductor.graph import GraphLowering

# A statement of the program's `call` that computes: a generated kernel, a library routine, an ATen operator.
_LAUNCH = re.compile(
    r"^\s+(?:[\w, ]+ = )?"
    r"(?:(?:cpp_|triton_)\w*(?:\.run)?|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(",
    re.MULTILINE,
)


_listeners: list[Callable[[str], object]] = []


@contextmanager
def programs() -> Iterator[list[str]]:
    """The source of every program that Inductor makes, or loads, inside the `with` block."""
    sources: list[str] = []
    hear(sources.append)
    try:
        yield sources
    finally:
        _listeners.remove(sources.append)


def hear(listener: Callable[[str], object]) -> None:
    """Tells `listener` the source of every program that Inductor makes, or loads, from now on."""
    _listeners.append(listener)
    _connect()


@cache
def _connect() -> None:
    before: Callable[[str], object] | None = GraphLowering.save_output_code

    def tell(source: str) -> None:
        for listener in ([before] if before is not None else []) + _listeners:
            listener(source)

    GraphLowering.save_output_code = tell


class Kernel(NamedTuple):
    """A kernel of ours in a program. `spec` is the digest of its region's spec, "" for Triton."""

    name: str
    op: str  # of our namespace, such as "lookup_backward"
    spec: str
    suffix: str
    source: str

    @property
    def is_backward(self) -> bool:
        """Whether it computes gradients."""
        return self.op.endswith("_backward")


_CPP = re.compile(
    r"^(cpp_\w+) = async_compile\.cpp_pybinding\(\[.*?\], r'''\n(.*?)'''\)", re.MULTILINE | re.DOTALL
)
# With `cpp_wrapper` and in a package, where all kernels are one text.
_NAMED = re.compile(
    r"^// recompile::\w+, spec \w+\n(?:(?!^// recompile::).)*?"
    r"^RECOMPILE_ENTRY\nextern \"C\" void (cpp_\w+)\(.*?^}\n",
    re.MULTILINE | re.DOTALL,
)
_OURS = re.compile(r"// recompile::(\w+), spec (\w+)\n")
_TRITON = re.compile(
    r"^((lookup|attention)\w*) = async_compile\.triton\(.*?'''\n(.*?)'''", re.MULTILINE | re.DOTALL
)


def kernels(program: str) -> Iterator[Kernel]:
    """The kernels of our region operators in a program."""
    named = [(found[1], found[0]) for found in _NAMED.finditer(program)]
    for name, source in [*_CPP.findall(program), *named]:
        if found := _OURS.match(source):
            yield Kernel(name, found[1], found[2], "cpp", source[found.end() :])
    for name, op, source in _TRITON.findall(program):
        yield Kernel(name, op + "_backward" * ("backward" in name), "", "py", source)


def language(program: str) -> str:
    """ "py", or "cpp" for what is in a package."""
    return "cpp" if program.lstrip().startswith(("//", "#include")) else "py"


def is_backward(program: str) -> bool:
    """Whether a program computes gradients: AOTAutograd calls its inputs so."""
    return bool(re.search(r"^    .*\btangents_1\b.* = args$", program, re.MULTILINE))


def launches(source: str) -> int:
    """How many kernels one run of the program launches."""
    return len(_LAUNCH.findall(source[source.find("def call(") :]))
