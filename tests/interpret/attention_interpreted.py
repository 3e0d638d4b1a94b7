"""The generated Triton of attentions, interpreted on the CPU, against the reference in float64: values and gradients.

TRITON_INTERPRET=1 python -m pytest tests/interpret/attention_interpreted.py
"""

import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton import language as tl
from triton.runtime import interpreter

import recompile.lowering  # noqa: F401  (registers the ops)
from recompile.lowering.attention import Attention, op, triton_schedule, triton_spans
from recompile.lowering.attention.triton_schedule import Schedule
from tests import expressions

assert os.environ.get("TRITON_INTERPRET") == "1", __doc__
attention = op.op_for("cuda")

LOOSE = {torch.float32: (2e-4, 2e-4), torch.bfloat16: (4e-2, 6e-2), torch.float16: (1e-2, 1e-2)}


@pytest.fixture(autouse=True)
def asserting(monkeypatch):
    """Device asserts are on, as under Inductor."""
    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """The interpreter holds bfloat16 as its bits, and would multiply those (triton 3.7.1)."""
    dot = interpreter.InterpreterBuilder.create_dot

    def exact(self, a, b, *rest):
        return dot(self, *(_widened(x) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)), *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", exact)


@pytest.fixture(autouse=True)
def comparisons(monkeypatch):
    """The interpreter takes a comparison of real numbers for one of them, and would spread that (triton 3.7.1)."""
    splat = interpreter.InterpreterBuilder.create_splat

    def exact(self, kind, arg):
        truth = arg.data.dtype == bool
        return splat(self, kind, interpreter.TensorHandle(arg.data, tl.int1) if truth else arg)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_splat", exact)


def _widened(x):
    bits = x.data.astype(numpy.uint32) << 16
    return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)


def use(monkeypatch, tile):
    """Small tiles, so that there are several."""
    monkeypatch.setattr(triton_schedule, "_default", lambda *_: Schedule(*tile, 4, 1))


def check(spec, q, k, v, extras, equal_nan=False):
    """The kernels' values and gradients are the reference's."""
    rtol, atol = LOOSE[q.dtype]
    mine = [x.detach().requires_grad_() for x in (q, k, v)]
    mine += [x.detach().requires_grad_() if x.is_floating_point() else x for x in extras]
    exact = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in mine]
    out, lse = attention(*mine[:3], mine[3:], str(spec))
    expected, sums = torch.ops.recompile.attention(*exact[:3], exact[3:], str(spec))
    close = {"rtol": rtol, "atol": atol, "equal_nan": equal_nan}
    torch.testing.assert_close(out.double(), expected, **close)
    if spec.softmax:
        torch.testing.assert_close(lse.double().sum(-1), sums, **close)
    seed = torch.randn(expected.shape).to(q.dtype)
    found = torch.autograd.grad(out, [x for x in mine if x.requires_grad], seed)
    wanted = torch.autograd.grad(expected, [x for x in exact if x.requires_grad], seed.double())
    for a, b in zip(found, wanted, strict=True):
        # What many pairs add up to, some of which cancel, is as exact as they are large.
        scale = max(1.0, b.detach().nan_to_num(0, 0, 0).abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a.double(), b, rtol=rtol, atol=atol * scale, equal_nan=equal_nan)


@dataclass(frozen=True)
class Case:
    """A spec, and its extras for a batch `(b, h)` of m queries and n keys."""

    spec: Attention
    extras: Callable[[int, int, int, int], list[Tensor]] = lambda b, h, m, n: []
    equal_nan: bool = False


def masked(keep, extras=(), fill="-1.0e9", score="s/4", **more):
    """A softmax over the kept keys: negligible is what vanishes beside the fill."""
    negligible = float("-inf") if fill == "-oo" else float(fill) + 1e3
    return Attention(f"where({keep}, {score}, {fill})", True, extras, keep, score, negligible, **more)


def stamps(b, h, m, n):
    times = torch.randint(0, 10**6, (b, 1, m + n)).cumsum(-1)
    return [times[..., :m, None], times[..., None, m:]]


def some_keys(b, h, m, n):
    """A truth for each key; sample 0 has none."""
    kept = torch.rand(b, 1, 1, n) > 0.4
    kept[0] = False
    return [kept]


def side_by_side(b, n):
    """A document's number for each of n positions, 8 a document; 0 for what is left over."""
    ids = torch.arange(n) // 8 + 1
    return torch.where(ids <= n // 8, ids, 0).expand(b, 1, n)


BUCKET = "Min(Max(trunc(div(log(Max(Abs(n0 - n1), 1)), 0.301)), 0), 32)"
BIASED = f"(s/4 + T0({BUCKET}) + T1(j - i + M - 1))"
ROUNDED = "Min(trunc(floor(log2(Max(Abs(n0 - n1), 1))) + log10(Max(Abs(n0 - n1), 1))/2), 32)"
SLOPE = "s/4 + x0*(j - i)"

CASES = {
    "softmax": Case(Attention("s/4", True)),
    "causal": Case(masked("j <= i")),
    "causal, infinite": Case(masked("j <= i", fill="-oo")),
    "strictly causal: the first row has no key": Case(masked("j < i")),
    "no key at all, infinite": Case(masked("Ne(n0, 0)", ("n0",), "-oo"), some_keys, equal_nan=True),
    "no key at all, infinite and safe": Case(masked("Ne(n0, 0)", ("n0",), "-oo", safe=True), some_keys),
    "infinities that are added, safe": Case(
        Attention("s/4 + x0", True, ("x0",), safe=True),
        lambda b, h, m, n: [torch.where(some_keys(b, h, m, n)[0], 0.0, float("-inf"))],
    ),
    "no key at all": Case(masked("Ne(n0, 0)", ("n0",)), some_keys),
    "no key at all, and a weak fill": Case(masked("Ne(n0, 0)", ("n0",), "-10000.0"), some_keys),
    "padding that is added": Case(
        Attention("s/4 + x0", True, ("x0",)),
        lambda b, h, m, n: [torch.where(some_keys(b, h, m, n)[0], 0.0, -100.0)],
    ),
    "a mask that is added": Case(
        Attention("s/4 + x0", True, ("x0",), "x0 > -1000", negligible=-500.0),
        lambda b, h, m, n: [torch.where(torch.rand(b, 1, m, n) < 0.5, 0.0, -5000.0) * torch.arange(n).sign()],
    ),
    "lengths": Case(
        masked("j < n0", ("n0",)), lambda b, h, m, n: [torch.randint(0, n + 1, (b, 1, 1, 1))]
    ),
    "window": Case(masked("(j <= i) & (i - j < 5)", fill="-oo")),
    "window both ways": Case(masked("Abs(i - j) < 4")),
    "prefix": Case(masked("(j <= i) | (j < 3)", fill="-oo")),
    "documents": Case(
        masked("Eq(n0, n1) & (j <= i)", ("n0", "n1")),
        lambda b, h, m, n: [torch.randint(0, 3, (b, 1, m, 1)), torch.randint(0, 3, (b, 1, 1, n))],
    ),
    "documents side by side, both ways": Case(
        masked("Eq(n0, n1) & Ne(n0, 0)", ("n0", "n1"), "-oo", safe=True),
        lambda b, h, m, n: [side_by_side(b, m)[..., None], side_by_side(b, n)[..., None, :]],
    ),
    "documents near each other, within a window": Case(
        masked("(n0 - 2*n1 < 3) & ((i - j <= n2) | Eq(n1, 1))", ("n0", "n1", "n2")),
        lambda b, h, m, n: [
            side_by_side(b, m)[..., None], side_by_side(b, n)[..., None, :], torch.full((b, 1, 1, 1), 4),
        ],
    ),
    "alibi": Case(masked("j <= i", ("x0",), "-oo", SLOPE), lambda b, h, m, n: [-torch.rand(1, h, 1, 1)]),
    "bias": Case(Attention("s/4 + x0", True, ("x0",)), lambda b, h, m, n: [torch.randn(1, h, m, n)]),
    "bias of each pair": Case(
        masked("j <= i", ("x0",), score="s/4 + x0"), lambda b, h, m, n: [torch.randn(b, h, m, n)]
    ),
    "loads along every axis": Case(
        Attention("x0*s + x1 + x2*x3", True, ("x0", "x1", "x2", "x3"), weight="x1*x3"),
        lambda b, h, m, n: [
            torch.randn(b, 1, m, 1), torch.randn(1, h, 1, n), torch.randn(b, h, 1, 1), torch.randn(1, 1, 1, n),
        ],
    ),
    "a mask after the softmax": Case(
        Attention("s/4", True, ("n0",), weight="where(Ne(n0, 0), 1, 0)"), some_keys
    ),
    "a mask with a gradient": Case(
        Attention("where(Ne(x0, 0), x0*s, 0)", False, ("x0",), keep="Ne(x0, 0)"),
        lambda b, h, m, n: [torch.randint(0, 2, (b, 1, 1, n)).float()],
    ),
    "integers of more than 32 bits": Case(
        Attention(
            "s + T0(Mod(73856093*i + 193496630*j, 61)) + T0(Mod(trunc(x0), 61))", True, ("T0", "x0")
        ),
        lambda b, h, m, n: [torch.randn(1, 1, 61), torch.randint(1, 99, (b, 1, m, 1)) * 2.0**30],
    ),
    "tanh": Case(Attention("5*tanh(s/5)", True)),
    "silu": Case(Attention("s*sigmoid(s)/N", False)),
    "hstu": Case(
        Attention(
            f"where(j <= i, {BIASED}*sigmoid{BIASED}/N, 0)", False, ("n0", "n1", "T0", "T1"), "j <= i",
            f"{BIASED}*sigmoid{BIASED}/N",
        ),
        lambda b, h, m, n: [*stamps(b, h, m, n), torch.randn(1, 1, 33), torch.randn(1, h, m + n - 1)],
    ),
    "rounded": Case(
        Attention(
            f"s/4 + T0({ROUNDED}) + nearest(x0)/4 + where(x0 <= T1(2), 1, 2)", True, ("n0", "n1", "x0", "T0", "T1")
        ),
        lambda b, h, m, n: [*stamps(b, h, m, n), torch.randint(-9, 9, (b, 1, m, 1)) / 2, torch.randn(1, 1, 33),
                            torch.linspace(-2, 1, 4)[None, None]],
    ),
    "t5": Case(
        Attention("s + T0(where(Abs(i - j) < 8, Abs(i - j), 8 + Mod(floordiv(i - j, 3), 7)))", True, ("T0",)),
        lambda b, h, m, n: [torch.randn(1, h, 15)],
    ),
    "dropout": Case(
        masked("j <= i", ("n0",), weight="where(uniform(n0, i, j) >= 0.25, 1.25, 0)"),
        lambda b, h, m, n: [torch.randint(0, 2**31, (b, h, 1, 1))],
    ),
    "sigmoid": Case(Attention("sigmoid(s/4 - log(N))", False)),
    "relu squared": Case(Attention("where(s > 0, s**2/(16*N), 0)", False)),
    "padded silu": Case(
        Attention("where(j < n0, s*sigmoid(s), 0)/n0", False, ("n0",), "j < n0", "s*sigmoid(s)/n0"),
        lambda b, h, m, n: [torch.randint(1, n + 1, (b, 1, 1, 1))],
    ),
}  # fmt: skip


def tensors(b, h, m, n, d, e, dtype=torch.float32):
    return [torch.randn(b, h, *size).to(dtype) for size in ((m, d), (n, d), (n, e))]


TILES = [(16, 16), (16, 32), (32, 16)]


@pytest.mark.parametrize("name, tile", [*zip(CASES, itertools.cycle(TILES), strict=False)])
def test_every_case(name, tile, monkeypatch):
    torch.manual_seed(0)
    use(monkeypatch, tile)
    case = CASES[name]
    check(case.spec, *tensors(2, 2, 19, 37, 8, 8), case.extras(2, 2, 19, 37), case.equal_nan)


SAME = "Eq(n0, n1)"


@pytest.mark.parametrize("side, keep", [("documents", SAME), ("padding", "Ne(n1, 0)")])
@pytest.mark.parametrize("softmax", [True, False])
@pytest.mark.parametrize("scanned", [16, 1024])
def test_what_is_masked_by_loads_is_not_visited(side, keep, softmax, scanned, monkeypatch):
    """Another document's rows are NaN, and 0 * NaN would be seen in all that meets them."""
    use(monkeypatch, (16, 16))
    monkeypatch.setattr(triton_spans, "SCANNED", scanned)
    torch.manual_seed(0)
    ids = (torch.arange(80) < 32).long()[None, None]
    q, k, v = tensors(1, 1, 80, 80, 8, 8)
    spec = masked(keep, ("n0", "n1"), "-oo") if softmax else plain(keep)
    extras = [ids[..., None], ids[:, :, None]]
    rows = slice(0, 32)
    wanted = results(torch.ops.recompile.attention, q, k, v, extras, spec, rows)
    for x in (k, v) if softmax or side == "padding" else (q, k, v):
        x[:, :, 32:] = float("nan")
    found = results(attention, q, k, v, extras, spec, rows)
    # Rows of the other document need all keys under a softmax: they have no score that counts.
    compared = ["out", "q"] if softmax else ["out", "q", "k", "v"]
    torch.testing.assert_close([found[x] for x in compared], [wanted[x] for x in compared])


def plain(keep):
    return Attention(f"where({keep}, s*sigmoid(s), 0)", False, ("n0", "n1"), keep, "s*sigmoid(s)")


def results(which, q, k, v, extras, spec, rows):
    """The output and the gradients of `rows`, seen by these rows alone."""
    mine = [x.clone().requires_grad_() for x in (q, k, v)]
    out = which(*mine, extras, str(spec))[0]
    seed = torch.zeros_like(out)
    seed[:, :, rows] = 1.0
    out.backward(seed)
    return {"out": out[:, :, rows]} | {name: x.grad[:, :, rows] for name, x in zip("qkv", mine, strict=True)}


@st.composite
def calls(draw):
    """A case with random sizes, dtype, broadcast dims and strides."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    case = CASES[draw(st.sampled_from(sorted(CASES)))]
    b, h = draw(st.sampled_from([(1, 1), (3, 1), (1, 2), (2, 3)]))
    m, n = draw(st.sampled_from([(1, 1), (1, 13), (17, 1), (5, 5), (33, 20), (16, 32)]))
    d, e = draw(st.sampled_from([(25, 25), (1, 7), (16, 3), (40, 16)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]))
    qkv = tensors(b, h, m, n, d, e, dtype)
    if draw(st.booleans()):
        k = draw(st.integers(0, 2))
        qkv[k] = qkv[k][:1] if draw(st.booleans()) else qkv[k][:, :1]
    if draw(st.booleans()):
        qkv = [x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for x in qkv]
    extras = case.extras(b, h, m, n)
    # Halves of scores would be rounded before the bucket or the mask is found.
    extras = [x.to(dtype) if x.is_floating_point() and x.shape[-2:] == (m, n) else x for x in extras]
    return case, qkv, extras, draw(st.sampled_from(TILES))


@given(calls())
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_calls(call):
    case, qkv, extras, tile = call
    with pytest.MonkeyPatch.context() as patch:
        use(patch, tile)
        check(case.spec, *qkv, extras, case.equal_nan)


@given(expressions.specs(), st.integers(0, 2**20))
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_random_scores(spec, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        use(patch, (16, 16))
        check(
            spec,
            *[x / 2 for x in tensors(2, 2, 7, 20, 8, 8)],
            expressions.extras(2, 2, 7, 20),
            equal_nan=True,
        )


@pytest.mark.parametrize("batch", [(), (3,), (2, 1, 3), (2, 1, 2, 2)], ids=str)
def test_batches_of_every_rank(batch):
    q, k, v = (torch.randn(*batch, n, 8) for n in (5, 20, 20))
    check(masked("j <= i"), q, k, v, [])
    if batch:
        bias = torch.randn(*(1 for _ in batch), 5, 20)
        check(Attention("s + x0", True, ("x0",)), q, k[:1], v[:1], [bias])


@pytest.mark.parametrize(
    "dims, dtype", [*zip([(64, 64), (100, 25), (128, 128)], LOOSE, strict=True)], ids=str
)
def test_wide_heads_with_the_schedules_of_a_gpu(dims, dtype):
    torch.manual_seed(0)
    check(masked("j <= i", score="s/16"), *tensors(1, 1, 70, 70, *dims, dtype), [])


@pytest.mark.parametrize("order", [(0, 2, 1, 3), (3, 0, 1, 2)])
def test_the_output_lies_as_asked(order):
    q, k, v = tensors(2, 3, 5, 7, 8, 8)
    spec = Attention("s", True, order=order)
    out, _ = attention(q, k, v, [], str(spec))
    expected, _ = torch.ops.recompile.attention(q, k, v, [], str(spec))
    assert out.stride() == expected.stride() and out.permute(order).is_contiguous()
    check(spec, q, k, v, [])


def test_a_gradient_that_is_broadcast():
    q, k, v = (x.requires_grad_() for x in tensors(2, 3, 5, 7, 8, 8))
    text = str(masked("j <= i"))
    found = [
        torch.autograd.grad(which(q, k, v, [], text)[0].sum(), (q, k, v))
        for which in (attention, torch.ops.recompile.attention)
    ]
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("index", ["n0", "j - i"])
def test_a_table_is_not_read_outside(index):
    q, k, v = tensors(1, 1, 3, 4, 8, 8)
    spec = Attention(f"s + T0({index})", True, ("n0", "T0"))
    extras = [torch.full((1, 1, 1, 4), 5), torch.randn(1, 1, 5)]
    with pytest.raises(Exception, match="index out of range"):
        attention(q, k, v, extras, str(spec))


def test_other_dtypes_and_nothing_at_all_are_the_references():
    q, k, v = (x.double() for x in tensors(1, 2, 3, 4, 8, 8))
    text = str(masked("j <= i"))
    torch.testing.assert_close(
        attention(q, k, v, [], text)[0], torch.ops.recompile.attention(q, k, v, [], text)[0]
    )
    q = q.float()[:, :, :0]
    assert attention(q, k.float(), v.float(), [], text)[0].shape == (1, 2, 0, 8)
