"""Which overload of an operator a call means.

Tried with torch 2.11 to 2.13: `torch._C._jit_resolve_packet`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload, OpOverloadPacket

from recompile.errors import RecompileError


def overload_for(packet: OpOverloadPacket, *args: Any, **kwargs: Any) -> OpOverload:
    """The overload of `packet` that takes these arguments.

    Raises:
        RecompileError: none does.
    """
    try:
        name = torch._C._jit_resolve_packet(packet._qualified_op_name, *args, **kwargs)
    except RuntimeError as error:
        raise RecompileError(f"{packet.__name__} does not take these arguments", got=str(error)) from error
    found: OpOverload = getattr(packet, name)
    return found
