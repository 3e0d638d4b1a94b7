"""Attention as people write it: one function a spelling, with inputs. `B, H, M, N, D` are samples, heads, queries, keys
and width; q, k and v are [B, H, N, D] unless the name says otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, H, N, D = 2, 2, 7, 8


@dataclass(frozen=True)
class Spelling:
    """A way to write attention: `function(*inputs())`, rewritten `fires` times."""

    name: str
    function: Callable[..., Tensor]
    inputs: Callable[[], tuple[Tensor, ...]]
    fires: int = 1

    def module(self) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The function in float64 with its real inputs as parameters, and the others."""
        given = [x.double() if x.is_floating_point() else x for x in self.inputs()]
        return _Parametrized(self.function, given), tuple(x for x in given if not x.is_floating_point())


class _Parametrized(nn.Module):
    def __init__(self, function: Callable[..., Tensor], given: list[Tensor]) -> None:
        super().__init__()
        self.function, self.is_real = function, [x.is_floating_point() for x in given]
        self.real = nn.ParameterList(nn.Parameter(x) for x in given if x.is_floating_point())

    def forward(self, *others: Tensor) -> Tensor:
        real, other = iter(self.real), iter(others)
        return self.function(*(next(real) if is_real else next(other) for is_real in self.is_real))


SPELLINGS: list[Spelling] = []


def spelling(*shapes: tuple[int, ...] | Callable[[], Tensor], fires: int = 1) -> Callable[..., Any]:
    """Register a function; a tuple stands for a random tensor of this shape."""

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inputs() -> tuple[Tensor, ...]:
            torch.manual_seed(len(function.__name__))
            return tuple(torch.randn(s) if isinstance(s, tuple) else s() for s in shapes)

        SPELLINGS.append(Spelling(function.__name__, function, inputs, fires))
        return function

    return add


QKV = ((B, H, N, D),) * 3
FLAT = ((B, N, D),) * 3
BNHD = ((B, N, H, D),) * 3


def lengths() -> Tensor:
    return torch.tensor([N, 3])


def padding() -> Tensor:
    """True where there is a key; sample 1 is padded."""
    return torch.arange(N) < lengths()[:, None]


def causal() -> Tensor:
    return torch.ones(N, N, dtype=torch.bool).tril()


@spelling(*QKV)
def divided(q, k, v):
    return torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(D), dim=-1) @ v


@spelling(*QKV)
def multiplied(q, k, v):
    return (torch.matmul(q, k.mT) * D**-0.5).softmax(-1).matmul(v)


@spelling(*QKV, lambda: torch.zeros(B, 1, 1, N).masked_fill(~padding()[:, None, None], -1e9))
def divided_plus_mask(q, k, v, mask):
    return F.softmax(q @ k.transpose(-2, -1) / math.sqrt(D) + mask, dim=-1) @ v


@spelling(*FLAT)
def flat_unscaled(q, k, v):
    return torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)), -1), v)


@spelling(*QKV)
def scaled_before(q, k, v):
    return torch.softmax((q * D**-0.5) @ k.transpose(-2, -1), dim=-1) @ v


@spelling(*QKV, lambda: (1 - padding()[:, None, None].float()) * -10000.0)
def multiplied_plus_mask(q, k, v, mask):
    return ((q @ k.transpose(-2, -1)) * D**-0.5 + mask).softmax(dim=-1) @ v


@spelling(*QKV, causal)
def filled(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(~mask, -1e9)
    return scores.softmax(-1) @ v


@spelling(*QKV, causal)
def filled_with_infinity(q, k, v, mask):
    scores = (q @ k.transpose(-2, -1) / math.sqrt(D)).masked_fill(mask == 0, float("-inf"))
    return scores.softmax(-1) @ v


@spelling(*QKV, lambda: padding()[:, None, None])
def chosen(q, k, v, mask):
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    return torch.where(mask, scores, -1e9).softmax(-1) @ v


@spelling(*QKV, (2 * N - 1, H))
def einsum_relative(q, k, v, table):
    N = q.shape[2]
    at = torch.arange(N)[:, None] - torch.arange(N)[None, :] + N - 1
    scores = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(D) + table[at].permute(2, 0, 1)
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


@spelling(*FLAT)
def flat_scaled(q, k, v):
    return torch.bmm(F.softmax(torch.bmm(q, k.transpose(1, 2)) / math.sqrt(D), -1), v)


@spelling(*BNHD, (2 * N - 1,))
def hstu(q, k, v, table):
    B, N = q.shape[:2]
    at = torch.arange(N)[None, :] - torch.arange(N)[:, None] + N - 1
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + table[at]
    weights = F.silu(scores) / N * torch.tril(torch.ones(N, N))
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(B, N, H * D)


@spelling(*BNHD, (2 * N - 1,), (33,), lambda: torch.randint(0, 10**6, (B, N + 1)).cumsum(1))
def hstu_with_time(q, k, v, positions, times, stamps):
    B, N = q.shape[:2]
    at = torch.arange(N)[None, :] - torch.arange(N)[:, None] + N - 1
    apart = (stamps[:, 1:, None] - stamps[:, None, :-1]).abs().clamp(min=1)
    bucket = (apart.float().log() / 0.301).long().clamp(0, 32)
    bias = positions[at] + times[bucket]
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) + bias[:, None]
    weights = F.silu(scores) / N * causal()
    return torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(B, N, H * D)


@spelling((B, D), (B, N, D), padding)
def pooled_target(target, history, mask):
    scores = (history * target[:, None]).sum(-1).masked_fill(~mask, -1e9)
    return (scores.softmax(-1)[..., None] * history).sum(1)


@spelling((B, 5, H * D), (H * D, H * D), (H * D, H * D), (H * D, H * D))
def autoint(x, wq, wk, wv):
    q, k, v = (torch.stack(torch.split(x @ w, D, dim=2)) for w in (wq, wk, wv))
    scores = torch.einsum("hbik,hbjk->hbij", q, k).softmax(-1)
    return torch.cat(torch.split(scores @ v, 1), dim=-1).squeeze(0)


@spelling((B, N, H * D), (3 * H * D, H * D))
def fused_projection(x, w):
    B, N = x.shape[:2]
    q, k, v = (x @ w.T).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4).unbind(0)
    out = (q @ k.transpose(-2, -1) * D**-0.5).softmax(-1) @ v
    return out.transpose(1, 2).reshape(B, N, H * D)


@spelling((B, N, H * D), (B, N, H * D), (B, N, H * D))
def folded_heads(q, k, v):
    B, N = q.shape[:2]
    q, k, v = (x.view(B, N, H, D).transpose(1, 2).reshape(B * H, N, D) for x in (q, k, v))
    out = torch.bmm(torch.softmax(torch.bmm(q, k.transpose(1, 2)) * D**-0.5, -1), v)
    return out.view(B, H, N, D).transpose(1, 2).contiguous().view(B, N, H * D)


@spelling(*QKV)
def by_hand(q, k, v):
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return (weights / weights.sum(-1, keepdim=True)) @ v


@spelling(*QKV)
def by_hand_unshifted(q, k, v):
    weights = torch.exp(q @ k.transpose(-2, -1) / math.sqrt(D))
    return (weights @ v) / weights.sum(-1, keepdim=True)


@spelling(*QKV)
def sigmoid(q, k, v):
    N = q.shape[2]
    return torch.sigmoid(q @ k.transpose(-2, -1) / math.sqrt(D) - math.log(N)) @ v


@spelling(*QKV)
def relu_squared(q, k, v):
    N = q.shape[2]
    return (F.relu(q @ k.transpose(-2, -1) / math.sqrt(D)) ** 2 / N) @ v


@spelling(*QKV, (B, H, N, D), (B, H, N, D), fires=2)
def differential(q, k, v, q2, k2):
    first = (q @ k.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    second = (q2 @ k2.transpose(-2, -1) / math.sqrt(D)).softmax(-1)
    return (first - 0.3 * second) @ v


@spelling(*QKV)
def alibi(q, k, v):
    N = q.shape[2]
    slopes = 2.0 ** -torch.arange(1, H + 1)
    apart = torch.arange(N)[None, :] - torch.arange(N)[:, None]
    scores = q @ k.transpose(-2, -1) / math.sqrt(D) + slopes[:, None, None] * apart
    return scores.masked_fill(apart > 0, float("-inf")).softmax(-1) @ v


@spelling(*QKV, (16, H))
def t5(q, k, v, table):
    N = q.shape[2]
    apart = torch.arange(N)[:, None] - torch.arange(N)[None, :]
    near = apart.clamp(min=0)
    far = 8 + (torch.log(near.float().clamp(min=1) / 8) / math.log(16) * 8).long()
    bucket = torch.where(near < 8, near, far.clamp(max=15))
    bias = F.embedding(bucket, table).permute(2, 0, 1)[None]
    return F.softmax(q @ k.transpose(3, 2) + bias, dim=-1) @ v


@spelling(*QKV)
def sliding_window(q, k, v):
    N = q.shape[2]
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    mask = (j <= i) & (i - j < 3)
    return (q @ k.transpose(-2, -1)).masked_fill(~mask, -1e9).softmax(-1) @ v


@spelling(*QKV)
def prefix(q, k, v):
    N = q.shape[2]
    i, j = torch.arange(N)[:, None], torch.arange(N)[None, :]
    mask = (j <= i) | (j < 2)
    return torch.where(mask, q @ k.mT, float("-inf")).softmax(-1) @ v


@spelling(*QKV, lambda: torch.randint(0, 2, (B, N)))
def documents(q, k, v, document):
    mask = document[:, None, :, None] == document[:, None, None, :]
    return (q @ k.mT).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@spelling(*QKV, lengths)
def padded(q, k, v, length):
    N = q.shape[2]
    mask = torch.arange(N)[None, :] < length[:, None]
    return (q @ k.mT).masked_fill(~mask[:, None, None], -1e9).softmax(-1) @ v


@spelling(*QKV, lengths)
def padded_silu(q, k, v, length):
    N = q.shape[2]
    mask = (torch.arange(N)[None, :] < length[:, None]).float()
    weights = F.silu(q @ k.mT) * mask[:, None, None, :] / length[:, None, None, None]
    return weights @ v


@spelling(*QKV, fires=0)
def library(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@spelling(*QKV, causal, fires=0)
def library_masked(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@spelling((B, 4, N, D), *((B, 2, N, D),) * 2)
def grouped_queries(q, k, v):
    k, v = (x.repeat_interleave(2, dim=1) for x in (k, v))
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


@spelling((B, H, 1, D), (B, H, N, D), (B, H, N, 5))
def one_query(q, k, v):
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


@spelling((B, H, 3, D), (1, H, N, D), (1, H, N, D))
def shared_history(q, k, v):
    return (q @ k.mT / math.sqrt(D)).softmax(-1) @ v


@spelling(*QKV, (N, N))
def learned_bias(q, k, v, bias):
    return (q @ k.mT + bias).softmax(-1) @ v


@spelling(*QKV, padding)
def masked_after(q, k, v, mask):
    return ((q @ k.mT).softmax(-1) * mask[:, None, None]) @ v


@spelling(*QKV)
def ellipsis(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k)
    return torch.einsum("...ij,...jd->...id", scores.softmax(-1), v)


@spelling(*QKV)
def triangle_like_the_scores(q, k, v):
    scores = q @ k.mT
    mask = torch.ones_like(scores).tril()
    return scores.masked_fill(mask == 0, -1e9).softmax(-1) @ v


@spelling(*QKV)
def square_subsequent(q, k, v):
    N = q.shape[2]
    mask = torch.triu(torch.full((N, N), float("-inf")), diagonal=1)
    return F.softmax(q @ k.mT + mask, dim=-1) @ v


@spelling(*QKV)
def lowest_number(q, k, v):
    N = q.shape[2]
    scores = q @ k.mT
    mask = torch.arange(N)[None, :] > torch.arange(N)[:, None]
    return scores.masked_fill(mask, torch.finfo(scores.dtype).min).softmax(-1) @ v


@spelling(*FLAT)
def values_first(q, k, v):
    """Keys along the rows: everything transposed."""
    scores = (k @ q.transpose(1, 2)).softmax(1)
    return (v.transpose(1, 2) @ scores).transpose(1, 2)


@spelling(*QKV)
def sums_of_products(q, k, v):
    scores = (q[:, :, :, None] * k[:, :, None]).sum(-1)
    return (scores.softmax(-1)[..., None] * v[:, :, None]).sum(3)
