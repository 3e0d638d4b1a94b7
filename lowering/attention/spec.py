"""What one attention computes, as text: the spec of `torch.ops.recompile.attention`.

For each batch index (samples, heads, ...), query i in M and key j in N, with s = <q[i], k[j]> and the extras as
loads (`recompile.lowering.score` has the language):

    softmax:      p[i, j] = softmax over j of score(i, j), times weight(i, j), which does not depend on s
    otherwise:    p[i, j] = score(i, j)
    out[i]        = sum over j of p[i, j] * v[j]

`keep` is what a kernel may skip pairs by: where it is false, p[i, j] is 0 (or, under a softmax, vanishes beside the
kept pairs of the row, whose score is above `negligible`); where it holds, the score is `kept`. A softmax' row in
which no kept score is above `negligible` is computed from `score` for all keys, as eager does.

Tensors: q `[*batch, M, D]`, k `[*batch, N, D]`, v `[*batch, N, E]`; a load `[*batch, M, N]`; a table `[*batch, T]`.
Each dim of `batch`, and M and N of a load, may be 1: it is broadcast. The output is `[*batch, M, E]`.
"""

import functools
from dataclasses import dataclass
from typing import Any

from recompile.lowering.fingerprint import fingerprint
from recompile.lowering.record import from_text, to_text


@dataclass(frozen=True)
class Attention:
    """One attention (see the module's docstring), in canonical text form: `str(spec)`, `Attention.parse(text)`.

    `extras` names the symbols of the op's extra tensors: "x0" (real), "n0" (integer or bool), "T0" (a table of
    reals). `order` is how the output lies in memory, outermost dim first; () is as it is written. A softmax' row whose
    scores are all -infinite is 0 if it is `safe`, as `scaled_dot_product_attention` has it, else NaN.
    """

    score: str
    softmax: bool
    extras: tuple[str, ...] = ()
    keep: str = "true"
    kept: str = ""  # "": the same as `score`
    negligible: float = float("-inf")
    weight: str = ""  # "": 1
    order: tuple[int, ...] = ()
    safe: bool = False

    def __str__(self) -> str:
        return f"{to_text(self, _TYPES)}  # {fingerprint()}"

    @staticmethod
    @functools.lru_cache(maxsize=1024)
    def parse(text: str) -> "Attention":
        """The spec that `str` printed as `text`.

        Raises:
            ValueError: the text is not a spec.
        """
        value = from_text(text, _TYPES)
        if not isinstance(value, Attention):
            raise ValueError(f"expected an Attention(...), got {text[:80]!r}")
        return value


_TYPES: dict[str, Any] = {"Attention": Attention}
