"""The Triton kernels that a model launches itself: in a graph they are numbers in a table of torch's.

Tried with torch 2.13 and Triton 3.7: `torch._higher_order_ops.triton_kernel_wrap.kernel_side_table`; a kernel's `fn`.
"""

from __future__ import annotations

import inspect
import textwrap
from typing import Any

from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import (
    kernel_side_table,
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)

_LAUNCHES = {triton_kernel_wrapper_functional, triton_kernel_wrapper_mutation}


def launched(node: fx.Node) -> tuple[str, str] | None:
    """(name, source) of the kernel that `node` launches; None for other nodes, or where there is no source."""
    if node.target not in _LAUNCHES:
        return None
    function: Any = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])  # type: ignore[arg-type]
    while hasattr(function, "fn"):  # autotuned, with heuristics, and at last compiled by `triton.jit`
        function = function.fn
    try:
        return function.__name__, textwrap.dedent(inspect.getsource(function))
    except OSError:
        return None
