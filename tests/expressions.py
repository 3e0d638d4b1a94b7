"""Random scores: smooth expressions of a product, positions, loads and tables, under random masks, as specs."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from recompile.lowering.attention import Attention

# Everything here is continuous in what is real, so that float32 and float64 do not fall on two sides of a step.
_LOADS = ("x0", "x1", "x2", "T0(j - i + M - 1)", "T1(n0)", "div(i - j, N)", "0.5*n1/N")
_LEAVES = ("s", "s", "0.25*s", *_LOADS)
_UNARY = (
    "tanh({})",
    "sigmoid({})",
    "exp(-Abs({}))",
    "erf({})",
    "log(1 + exp(-Abs({})))",
    "where({0} > 0, {0}, exp({0}) - 1)",
    "where({0} > 0, {0}, 0)",
    "atmost(atleast({}, -1), 2)",
    "-({})",
)
_BINARY = ("({} + {})", "({})*({})", "where({2}, {0}, {1})", "({} - {})")
_CONDITIONS = (
    "j <= i",
    "i - j < 4",
    "j < n1",
    "Ne(n2, 0)",
    "(j <= i) | (j < 2)",
    "Eq(Mod(i + j, 3), 0)",
    "Abs(i - j) > 1",
)
_EXTRAS = ("x0", "x1", "x2", "n0", "n1", "n2", "T0", "T1")  # fmt: skip


@st.composite
def _scores(draw: st.DrawFn, depth: int, leaves: tuple[str, ...] = _LEAVES) -> str:
    if depth == 0:
        return draw(st.sampled_from(leaves))
    one = draw(_scores(depth - 1, leaves))
    if draw(st.booleans()):
        return f"tanh({draw(st.sampled_from(_UNARY)).format(one)})"
    other = draw(_scores(draw(st.integers(0, depth - 1)), leaves))
    return draw(st.sampled_from(_BINARY)).format(one, other, draw(st.sampled_from(_CONDITIONS)))


@st.composite
def specs(draw: st.DrawFn) -> Attention:
    """A spec over all of `_EXTRAS`."""
    score, softmax = f"0.25*s + {draw(_scores(3))}", draw(st.booleans())
    more = {"extras": _EXTRAS, "weight": draw(_scores(1, _LOADS)) if softmax and draw(st.booleans()) else ""}
    keep = draw(st.one_of(st.none(), st.sampled_from(_CONDITIONS)))
    if keep is None:
        return Attention(score, softmax, **more)
    fill, negligible = (
        draw(st.sampled_from([("-1.0e+9", -5e8), ("-oo", float("-inf"))])) if softmax else (0, float("-inf"))
    )
    return Attention(
        f"where({keep}, {score}, {fill})", softmax, keep=keep, kept=score, negligible=negligible, **more
    )


def extras(b: int, h: int, m: int, n: int) -> list[Tensor]:
    """Tensors for `_EXTRAS`, of batches (b, h), m queries and n keys: loads of a pair, a row, a key and a batch."""
    return [
        torch.randn(b, h, m, n), torch.randn(b, 1, m, 1), torch.randn(1, h, 1, n),
        torch.randint(0, 9, (b, 1, m, n)), torch.randint(0, n + 1, (b, 1, 1, 1)), torch.randint(0, 2, (b, 1, 1, n)),
        torch.randn(1, h, m + n - 1), torch.randn(b, 1, 9),
    ]  # fmt: skip
