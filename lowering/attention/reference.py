"""Attention in plain PyTorch: the op's documentation, the oracle of its tests, the fallback without a kernel.

Half-precision inputs are computed in float32, as a kernel does.
"""

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import Tensor

from recompile.lowering import score as language
from recompile.lowering.attention.spec import Attention


def forward(
    q: Tensor, k: Tensor, v: Tensor, extras: Sequence[Tensor], spec: Attention
) -> tuple[Tensor, Tensor]:
    """The output `[*batch, M, E]`, and for a softmax each row's log of the sum of exp(score), `[*batch, M]`."""
    here = _Pairs(q, k, extras, spec)
    scores = here.value(spec.score)
    wide = v.to(here.dtype)
    if not spec.softmax:
        return (scores @ wide).to(q.dtype), scores.new_zeros(0)
    weights = _softmax(scores, spec)
    if spec.weight:
        weights = weights * here.value(spec.weight)
    return (weights @ wide).to(q.dtype), torch.logsumexp(scores, -1)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extras: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    spec: Attention,
    wanted: Sequence[int],
) -> list[Tensor]:
    """Gradients of q, k and v, and of the extras `wanted`.

    With g = <grad[i], v[j]>: d v[j] += p grad[i]; under a softmax, d score = p (g - <grad[i], out[i]>) (p before
    `weight`, g times `weight`), and d weight = p g; otherwise d score = g. From there, the chain rule.
    """
    here = _Pairs(q, k, extras, spec)
    dtype = here.dtype
    wide_q, wide_k, wide_v, grad = (x.to(dtype) for x in (q, k, v, grad))
    scores = here.value(spec.score)
    g = grad @ wide_v.mT
    g_score, g_weight, p = g, None, scores
    if spec.softmax:
        weight = here.value(spec.weight) if spec.weight else None
        soft = _softmax(scores, spec)  # not exp(scores - lse): -1e9 + log(N) is -1e9 in float32
        total = (grad * out.to(dtype)).sum(-1, keepdim=True)
        g_score = soft * ((g if weight is None else g * weight) - total)
        g_weight, p = soft * g, soft if weight is None else soft * weight
    parts = [(spec.score, g_score)] + ([(spec.weight, g_weight)] if spec.weight else [])
    g_s = here.chain(parts[:1], language.S)
    found = [_summed(g_s @ wide_k, q), _summed(g_s.mT @ wide_q, k), _summed(p.mT @ grad, v)]
    for e in wanted:
        name = spec.extras[e]
        found.append(_table(here, parts, name, extras[e]) if name[0] == "T" else
                     _summed(here.chain(parts, language.symbol(name)), extras[e]))  # fmt: skip
    return found


def _softmax(scores: Tensor, spec: Attention) -> Tensor:
    weights = torch.softmax(scores, -1)
    return weights.masked_fill((scores == float("-inf")).all(-1, keepdim=True), 0) if spec.safe else weights


class _Pairs:
    """The values of expressions for all pairs of a query and a key, `[*batch, M, N]`."""

    def __init__(self, q: Tensor, k: Tensor, extras: Sequence[Tensor], spec: Attention) -> None:
        self.dtype = torch.promote_types(q.dtype, torch.float32)
        self.products = q.to(self.dtype) @ k.to(self.dtype).mT
        m, n = self.products.shape[-2:]
        self.env: dict[str, Any] = {
            "s": self.products,
            "i": torch.arange(m, device=q.device)[:, None],
            "j": torch.arange(n, device=q.device),
            "M": m,
            "N": n,
        }
        for name, extra in zip(spec.extras, extras, strict=True):
            self.env[name] = extra.to(torch.int64 if name[0] == "n" else self.dtype)

    def value(self, text: str) -> Tensor:
        """An expression's value."""
        return self._full(language.evaluate(language.parse(text), self.env))

    def chain(self, parts: Sequence[tuple[str, Tensor | None]], by: sympy.Basic) -> Tensor:
        """The sum of gradient times derivative by `by`, over (expression, its gradient)."""
        total = torch.zeros_like(self.products)
        for text, grad in parts:
            slope = language.diff(language.parse(text), by)
            product = language.times(language.symbol("g"), slope)
            env: dict[str, Any] = {**self.env, "g": grad}
            total = total + self._full(language.evaluate(product, env))
        return total

    def index(self, load: sympy.Basic) -> Tensor:
        """The position that a table is read at, int64, for all pairs."""
        return self._full(language.evaluate(load.args[0], self.env), torch.int64)

    def _full(self, value: object, dtype: torch.dtype | None = None) -> Tensor:
        value = torch.as_tensor(value, dtype=dtype or self.dtype, device=self.products.device)
        return value.expand(self.products.shape) if value.dim() <= self.products.dim() else value


def _table(here: _Pairs, parts: Sequence[tuple[str, Tensor | None]], name: str, table: Tensor) -> Tensor:
    total = here.products.new_zeros((*here.products.shape[:-2], table.shape[-1]))
    loads = {e for text, _ in parts for e in language.tables_in(language.parse(text))}
    for load in sorted(loads, key=str):
        if type(load).__name__ == name:
            total = total.scatter_add(-1, here.index(load).flatten(-2), here.chain(parts, load).flatten(-2))
    return _summed(total, table)


def _summed(grad: Tensor, like: Tensor) -> Tensor:
    """Summed over what was broadcast."""
    return grad.sum_to_size(like.shape).to(like.dtype).contiguous()


def arrange(out: Tensor, order: Sequence[int]) -> Tensor:
    """The same values, laid out in memory with these dims from the outermost to the innermost."""
    if not order:
        return out.contiguous()
    inverse = sorted(range(len(order)), key=lambda k: order[k])
    return out.permute(list(order)).contiguous().permute(inverse)
