"""Hear every ATen call above autograd, autocast and decompositions.

torch keeps one mode slot on its PreDispatch key for tracers and accepts only subclasses of make_fx's own
mode in it. `linear`, `embedding_bag`, `gru`, `scaled_dot_product_attention` arrive whole there.
Tried with torch 2.13: `torch.fx.experimental.proxy_tensor.{ProxyTorchDispatchMode, PythonKeyTracer}`,
`torch._dispatch.python.enable_python_dispatcher`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, PythonKeyTracer

# The process has one slot: two threads would hear each other. Dynamo compiles under a lock anyway.
_ONE_LISTENER = threading.Lock()

Record = Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]


class _Listener(ProxyTorchDispatchMode):  # type: ignore[no-untyped-call]
    """make_fx's mode with its recording replaced by ours."""

    def __init__(self, record: Record) -> None:
        super().__init__(PythonKeyTracer(), "real", pre_dispatch=True)
        self.record = record

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.prim.device.default:
            return func(*args)
        return self.record(func, args, kwargs or {})

    def __sym_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return func(*args, **kwargs)  # sizes are found by their expression when an operator uses them


@contextmanager
def listening(record: Record) -> Iterator[None]:
    """While open, every ATen call of this thread goes to `record(op, args, kwargs)`, which gives its result.

    Calls that `record` makes itself are not heard. Waits while another thread listens.
    """
    with _ONE_LISTENER, enable_python_dispatcher(), _Listener(record):
        yield
