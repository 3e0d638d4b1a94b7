"""Artifacts in torch's structured trace (TORCH_TRACE), which `tlparse` shows beside Dynamo's and Inductor's.

Tried with torch 2.13 and tlparse 0.4: `torch._logging.trace_structured`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch._logging import trace_structured  # type: ignore[attr-defined]


def artifact(name: str, encoding: str, payload: Callable[[], str]) -> None:
    """Adds a file to the compilation that runs; `payload` is called only where a trace is written.

    Args:
        encoding: "string" or "json".
    """
    trace_structured(
        "artifact", metadata_fn=lambda: {"name": name, "encoding": encoding}, payload_fn=lambda: payload()
    )
