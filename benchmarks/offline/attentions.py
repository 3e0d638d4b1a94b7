"""The attentions of the offline table: each kind of score, with dtypes and head dims in use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from recompile.lowering.attention import Attention, triton_backward, triton_forward, triton_op
from recompile.lowering.attention.triton_frame import Launch
from recompile.lowering.attention.triton_tile import Problem

B, H, M, N = 8, 4, 200, 200


def launches(spec: Attention, dtype: torch.dtype, dim: int) -> Iterator[Launch]:
    """The forward and backward kernels of a call."""
    q, k, v = (_empty(B, H, n, dim, dtype=dtype) for n in (M, N, N))
    extras = tuple(_EXTRAS[spec])
    problem = Problem(spec, q, k, v, extras)
    out, lse = triton_op.empty(q, k, v, spec)
    wanted = [e for e, x in enumerate(extras) if x.is_floating_point()]
    yield triton_forward.launch(problem, out, lse)
    buffers = triton_backward.buffers(problem, wanted)
    yield from triton_backward.launches(problem, out, lse, _empty(B, H, M), buffers)


def _empty(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def _softmax(keep: str, extras: tuple[str, ...] = (), fill: str = "-1.0e9") -> Attention:
    negligible = -9.9e8 if fill == "-1.0e9" else float("-inf")
    return Attention(f"where({keep}, s/8, {fill})", True, extras, keep, "s/8", negligible)


_BIASED = "(s + T0(Min(Max(trunc(div(log(Max(Abs(n0 - n1), 1)), 0.301)), 0), 32)) + T1(j - i + M - 1))"
_SILU = f"{_BIASED}*sigmoid{_BIASED}/N"
CAUSAL = _softmax("j <= i")
WINDOW = _softmax("(j <= i) & (i - j < 50)", fill="-oo")
DOCUMENTS = _softmax("Eq(n0, n1) & (j <= i)", ("n0", "n1"))
HSTU = Attention(f"where(j <= i, {_SILU}, 0)", False, ("n0", "n1", "T0", "T1"), "j <= i", _SILU)
LOADED = Attention(
    "where(Ne(n0, 0), s/8 + x0, -oo)", True, ("n0", "x0", "n1"), "Ne(n0, 0)", "s/8 + x0",
    weight="where(Eq(n1, 1), 1, 0)",
)  # fmt: skip
_ROWS = [_empty(B, 1, M, 1, dtype=torch.int64), _empty(B, 1, 1, N, dtype=torch.int64)]
_EXTRAS = {
    CAUSAL: [],
    WINDOW: [],
    DOCUMENTS: _ROWS,
    HSTU: [*_ROWS, _empty(1, 1, 33), _empty(1, H, M + N - 1)],
    LOADED: [_empty(B, 1, 1, N, dtype=torch.bool), _empty(1, H, M, N), _ROWS[1]],
}

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CALLS = {
    "causal, bf16 x 25": (CAUSAL, BF16, 25),
    "causal, bf16 x 32": (CAUSAL, BF16, 32),
    "causal, bf16 x 64": (CAUSAL, BF16, 64),
    "causal, fp16 x 64": (CAUSAL, F16, 64),
    "causal, bf16 x 128": (CAUSAL, BF16, 128),
    "causal, fp32 x 25": (CAUSAL, F32, 25),
    "causal, fp32 x 64": (CAUSAL, F32, 64),
    "causal, fp32 x 128": (CAUSAL, F32, 128),
    "window, bf16 x 64": (WINDOW, BF16, 64),
    "window, fp32 x 32": (WINDOW, F32, 32),
    "documents, bf16 x 64": (DOCUMENTS, BF16, 64),
    "documents, fp32 x 32": (DOCUMENTS, F32, 32),
    "hstu, fp16 x 25": (HSTU, F16, 25),
    "hstu, bf16 x 32": (HSTU, BF16, 32),
    "hstu, bf16 x 64": (HSTU, BF16, 64),
    "hstu, bf16 x 128": (HSTU, BF16, 128),
    "hstu, fp32 x 64": (HSTU, F32, 64),
    "hstu, fp32 x 128": (HSTU, F32, 128),
    "loaded, bf16 x 25": (LOADED, BF16, 25),
    "loaded, bf16 x 64": (LOADED, BF16, 64),
    "loaded, fp16 x 128": (LOADED, F16, 128),
    "loaded, fp32 x 32": (LOADED, F32, 32),
}
