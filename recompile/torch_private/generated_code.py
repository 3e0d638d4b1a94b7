"""The programs that Inductor writes, and how many kernels one run of them launches.

Tried with torch 2.13: `torch._inductor.graph.GraphLowering.save_output_code`, which is also called when a
program comes from the cache.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from torch._inductor.graph import GraphLowering

# A statement of the program's `call` that computes: a generated kernel, a library routine, an ATen operator.
_LAUNCH = re.compile(
    r"^\s+(?:[\w, ]+ = )?"
    r"(?:(?:cpp_|triton_)\w*(?:\.run)?|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(",
    re.MULTILINE,
)


@contextmanager
def programs() -> Iterator[list[str]]:
    """The source of every program that Inductor makes, or loads, inside the `with` block."""
    sources: list[str] = []
    with mock.patch.object(GraphLowering, "save_output_code", sources.append):
        yield sources


def launches(source: str) -> int:
    """How many kernels one run of the program launches."""
    return len(_LAUNCH.findall(source[source.find("def call(") :]))
