"""The generated C++ of `recompile::attention` against the reference in float64, forward and backward."""

import ctypes
import math
import subprocess

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code

import recompile.lowering.attention  # noqa: F401  (registers the op)
from recompile.lowering.attention import Attention
from recompile.lowering.attention.cpp_plan import Plan
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.score_cpp import MATH
from tests import expressions

# Relative to the largest value of a tensor. A sum of n products in float32 is off by up to n 6e-8 of its terms, and the
# terms here cancel; outputs in half precision are rounded to 8 and 11 bits, gradients are sums of products of such.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}

BUCKET = "Min(16, Max(0, trunc(div(log(1.0*Max(1, Abs(n0 - n1))), 0.301))))"
BIASED = f"(s + T0(j - i + N - 1) + T1({BUCKET}))"
SILU = f"div({BIASED}*sigmoid({BIASED}), N)"
T5 = "T0(where(i - j < 8, Max(0, i - j), Min(15, 8 + trunc(div(log(div(1.0*Max(1, i - j), 8)), 2.77)*8))))"
WIDE = "T0(Mod(73856093*i + 19349663*j, 61)) + T1(Mod(trunc(x0*x1) + n0, 61))"  # integers beyond 32 bits
PLAIN = "sigmoid(s - log(N)) + tanh(s)*exp(0.1*s) + where(s > 0, s, 0)**2 * x0"
NEAR, FAR = -1e9 + 200, float("-inf")


def softmax(score, keep, fill="-1.0e+9", **more):
    negligible = FAR if "oo" in fill else NEAR
    return Attention(
        f"where({keep}, {score}, {fill})", True, keep=keep, kept=score, negligible=negligible, **more
    )


SPECS = {
    "plain": Attention("0.25*s", True),
    "causal": softmax("0.25*s", "j <= i"),
    "hstu": Attention(f"where(j <= i, {SILU}, 0)", False, ("T0", "T1", "n0", "n1"), "j <= i", SILU, order=(0, 2, 1, 3)),
    "padding": softmax("0.25*s", "Ne(n0, 0)", extras=("n0",)),
    "padding_infinite": softmax("0.25*s", "Ne(n0, 0)", "-oo", extras=("n0",)),
    "padding_safe": softmax("0.25*s", "Ne(n0, 0)", "-oo", extras=("n0",), safe=True),
    "added_safe": Attention("0.25*s + x0", True, ("x0",), safe=True),
    "alibi": softmax("0.25*s + x0*(j - i)", "(j <= i) | (j < n0)", "-oo", extras=("x0", "n0")),
    "window": softmax("s", "(j <= i) & (i - j < 5)"),
    "documents": softmax("0.25*s", "Eq(n0, n1) & (j <= i)", "-oo", extras=("n0", "n1")),
    "compared": softmax("s", "((n0 < 2*n1 - i) & Ne(n0, n1)) | Eq(i, j)", "-oo", extras=("n0", "n1")),
    "lengths": Attention(f"where(j < n0, {PLAIN}, 0)", False, ("n0", "x0"), "j < n0", PLAIN),
    "weighted": Attention("0.25*s + x0", True, ("x0", "x1"), weight="x1"),
    "t5": Attention(f"s + {T5}", True, ("T0",)),
    "gathered": Attention("s + T0(n0)", True, ("T0", "n0")),
    "wide": Attention(f"s + {WIDE}", True, ("T0", "T1", "x0", "x1", "n0")),
    "mask": softmax("0.25*s", "Ne(n0, 0)", "-oo", extras=("n0",), safe=True),
    "masks": softmax("0.25*s", "(Ne(n0, 0) & (j - i < 40)) | Eq(Max(i - n1, j), 0)", extras=("n0", "n1")),
    "factor": Attention("n0*s*sigmoid(s)", False, ("n0",), "Ne(n0, 0)"),
    "low": Attention("0.25*s + n0", True, ("n0",), "n0 > -1000", negligible=-500.0),
    "dropout": softmax("0.25*s", "j <= i", extras=("n0",), weight="where(uniform(n0, i, j) >= 0.25, 1.25, 0)"),
    "dropped": Attention("where(uniform(n0, i, j) >= 0.5, 2*s*sigmoid(s), 0)", False, ("n0",)),
}  # fmt: skip


def extras(name, b, h, m, n):
    """Extras of a spec for these sizes; floating ones get gradients."""
    stamps = torch.randint(0, 10**5, (b, max(m, n) + 1)).cumsum(1)
    documents = torch.randint(0, 3, (b, max(m, n)), dtype=torch.int32).sort().values
    return {
        "hstu": lambda: [torch.randn(1, 1, m + n), torch.randn(1, 1, 17), stamps[:, None, 1 : m + 1, None],
                         stamps[:, None, None, :n]],
        "padding": lambda: [(torch.arange(n) < torch.randint(0, n + 1, (b, 1)))[:, None, None]],
        "padding_infinite": lambda: [(torch.arange(n) >= torch.arange(b)[:, None])[:, None, None]],
        "padding_safe": lambda: [(torch.arange(n) >= torch.arange(b)[:, None] * n)[:, None, None]],
        "added_safe": lambda: [torch.where(torch.rand(b, 1, m, n) * torch.arange(m)[:, None] > 0.5, 0.1, -math.inf)],
        "alibi": lambda: [torch.rand(1, h, 1, 1), torch.randint(1, n + 1, (b, 1, 1, 1))],
        "documents": lambda: [documents[:, None, :m, None], documents[:, None, None, :n]],
        "compared": lambda: [torch.randint(-9, 9, (b, 1, m, 1)),
                             torch.randint(0, 99, (1, 1, 1, n)) * torch.arange(n) // 40],
        "lengths": lambda: [torch.randint(0, n + 1, (b, 1, 1, 1)), torch.randn(b, 1, m, 1)],
        "weighted": lambda: [torch.randn(1, h, m, n), torch.rand(b, 1, 1, n)],
        "t5": lambda: [torch.randn(16, h).t()[None]],
        "gathered": lambda: [torch.randn(b, 1, 10), torch.randint(0, 10, (b, 1, m, n))],
        "wide": lambda: [torch.randn(1, 1, 61), torch.randn(b, 1, 61), torch.randint(1, 999, (b, 1, m, 1)) * 2.0**20,
                         torch.randint(1, 999, (1, 1, 1, n)).float(), torch.randint(0, 10**12, (1, 1, m, 1))],
        "mask": lambda: [holes(1, m, n)],
        "masks": lambda: [holes(b, m, n), torch.randint(0, 9, (b, 1, 1, 1))],
        "factor": lambda: [holes(1, m, n) * torch.randint(1, 3, (m, 1))],
        "low": lambda: [torch.where(holes(b, m, n) | (torch.arange(n) == 0), 1, -5000)],  # -5000 rounds scores
        "dropout": lambda: [torch.randint(0, 2**31, (b, h, 1, 1))],
        "dropped": lambda: [torch.randint(0, 2**31, (b, 1, 1, 1))],
    }.get(name, list)()  # fmt: skip


def holes(b, m, n):
    """Of blocks of 16 rows and 48 keys some are kept, and some in part."""
    rows, keys = torch.arange(m) // 16, torch.arange(n) // 48
    blocks = torch.randint(0, 3, (b, 1, m // 16 + 1, n // 48 + 1))[:, :, rows][..., keys]
    return (blocks == 0) | ((blocks == 1) & (torch.rand(b, 1, m, n) < 0.7))


def attention(q, k, v, extras, spec):
    return torch.ops.recompile.attention(q, k, v, extras, spec)[0]


compiled = torch.compile(attention, dynamic=True)


def results(function, tensors, given, spec, seed, dtype=None):
    """The output, and the gradients of all that is floating."""

    def leaf(x):
        if not x.is_floating_point():
            return x
        return (x.to(dtype) if dtype else x).detach().requires_grad_()

    tensors, given = [leaf(x) for x in tensors], [leaf(x) for x in given]
    out = function(*tensors, given, spec)
    inputs = [x for x in [*tensors, *given] if x.requires_grad]
    seed = seed.to(dtype) if dtype else seed
    return [out.detach(), *torch.autograd.grad(out, inputs, seed)]


def check(name, tensors, given, function=compiled):
    spec = str(SPECS.get(name, name))
    q, _, v = tensors
    seed = torch.randn(
        *torch.broadcast_shapes(*(x.shape[:-2] for x in tensors)), q.shape[-2], v.shape[-1]
    ).to(q.dtype)
    actual = results(function, tensors, given, spec, seed)
    expected = results(attention, tensors, given, spec, seed, torch.float64)
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got.isnan(), want.isnan())
        atol = TOLERANCE[q.dtype] * max(1.0, want.nan_to_num().abs().max().item())
        torch.testing.assert_close(got.double(), want, rtol=0, atol=atol, equal_nan=True)
        assert got.dtype == q.dtype


def inputs(b, h, m, n, d, e, dtype=torch.float32, swapped=False):
    """q, k, v [b, h, rows, width], or the same with heads and rows swapped in memory."""
    shapes = ((m, d), (n, d), (n, e))
    if swapped:
        return [torch.randn(b, rows, h, width).to(dtype).transpose(1, 2) for rows, width in shapes]
    return [torch.randn(b, h, rows, width).to(dtype) for rows, width in shapes]


SQUARE = {"causal", "hstu", "alibi", "window", "documents", "compared"}  # no row without a key


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    yield


@pytest.mark.parametrize("name", SPECS)
def test_a_spec_over_random_shapes(name):
    """One compilation for all shapes: primes, odd widths, more and less than a tile."""
    torch._dynamo.reset()

    @settings(
        max_examples=8,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.sampled_from([2, 3, 5]),
        st.sampled_from([2, 3]),
        st.sampled_from([2, 7, 13, 50, 101, 150]),
        st.sampled_from([3, 8, 31, 64, 129, 200]),
        st.sampled_from([2, 4, 16, 25, 33]),
        st.sampled_from([3, 8, 25]),
        st.integers(0, 10**6),
    )
    def run(b, h, m, n, d, e, seed):
        torch.manual_seed(seed)
        n = m if name in SQUARE else n
        with torch._dynamo.config.patch(error_on_recompile=True):
            check(name, inputs(b, h, m, n, d, e), extras(name, b, h, m, n))

    check(
        name,
        inputs(4, 6, 11, 11 if name in SQUARE else 19, 9, 5),
        extras(name, 4, 6, 11, 11 if name in SQUARE else 19),
    )
    run()


@settings(
    max_examples=6, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(
    expressions.specs(),
    st.sampled_from([(2, 2, 7, 9), (1, 3, 40, 70), (3, 1, 101, 33)]),
    st.integers(0, 10**6),
)
def test_random_scores(spec, shape, seed):
    torch._dynamo.reset()
    torch.manual_seed(seed)
    tensors = [x / 2 for x in inputs(*shape, 9, 5)]
    check(spec, tensors, expressions.extras(*shape), torch.compile(attention, dynamic=False))


@pytest.mark.parametrize("name", sorted({*SPECS} - {"padding_infinite", "wide"}))  # rows of NaN, steps
def test_the_reference_has_the_gradients_of_its_formula(name):
    """What kernels are compared with, by finite differences."""
    tensors = [x.double().requires_grad_() for x in inputs(2, 1, 4, 4, 2, 2)]
    given = [x.double() if x.is_floating_point() else x for x in extras(name, 2, 1, 4, 4)]
    learned = [x.requires_grad_() for x in given if x.is_floating_point() and x.isfinite().all()]
    spec = str(SPECS[name])
    assert torch.autograd.gradcheck(lambda *_: attention(*tensors, given, spec), [*tensors, *learned])


@pytest.mark.parametrize(("index", "safe"), [("i + 2*j", False), ("Mod(i + 2*j, 208)", True)])
def test_a_table_is_not_read_past_its_end_by_the_rest_of_a_tile(index, safe):
    """The last pair reads the last element; registers hold pairs beyond it."""
    table = Operand("T0", "float", ("1", "1", "208"), ("208", "208", "1"))
    plan = Plan.of(Attention(f"s + T0({index})", True, ("T0",)), 2, [table], "70", "70")
    plan.named(plan.spec.score)
    assert [gather.safe for gather in plan.gathers.values()] == [safe]


@pytest.mark.parametrize("rows", [35, 70, 97, 200])
def test_tiles_that_do_not_fill_their_registers(rows):
    """Known lengths, which tiles are made for: their memory is in whole panels of columns."""
    torch._dynamo.reset()
    check("causal", inputs(2, 2, rows, rows, 24, 12), [], torch.compile(attention, dynamic=False))


@pytest.mark.parametrize(("name", "dtype"), [("hstu", torch.bfloat16), ("weighted", torch.float16)])
def test_half_precision(name, dtype):
    torch._dynamo.reset()
    given = [x.to(dtype) if x.is_floating_point() else x for x in extras(name, 2, 3, 70, 70)]
    check(
        name,
        inputs(2, 3, 70, 70, 16, 24, dtype, swapped=True),
        given,
        torch.compile(attention, dynamic=False),
    )


@pytest.mark.parametrize("shape", [(3, 2, 1, 140), (1, 3, 4, 1)])
def test_few_queries_and_few_keys(shape):
    torch._dynamo.reset()
    b, h, m, n = shape
    check(
        "weighted",
        inputs(b, h, m, n, 20, 8),
        extras("weighted", b, h, m, n),
        torch.compile(attention, dynamic=False),
    )


def test_batch_dims_that_are_broadcast():
    """Keys shared by samples and heads, and queries that are shared by samples."""
    torch._dynamo.reset()
    kernel = torch.compile(attention, dynamic=False)
    k, v = torch.randn(1, 4, 70, 16), torch.randn(1, 1, 70, 12)
    check("plain", [torch.randn(3, 4, 30, 16), k, v], [], kernel)
    check("plain", [torch.randn(1, 1, 30, 16), k.expand(3, 4, -1, -1), v], [], kernel)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_least_and_the_greatest_number_of_batch_dims(rank):
    torch._dynamo.reset()
    batch = (2, 1, 3, 2)[:rank]
    tensors = [torch.randn(*batch, rows, 8) for rows in (20, 33, 33)]
    check("plain", tensors, [], torch.compile(attention, dynamic=False))


def test_strides():
    """Widths that are not contiguous, a gradient that is expanded."""
    torch._dynamo.reset()
    tensors = [
        torch.randn(2, 2, 8, 40).transpose(-2, -1),
        torch.randn(2, 2, 40, 16)[..., ::2],
        torch.randn(2, 40, 2, 8).transpose(1, 2),
    ]

    def summed(*args):
        return attention(*args).sum(-1, keepdim=True)

    spec, seed = str(SPECS["causal"]), torch.randn(2, 2, 40, 1)
    actual = results(torch.compile(summed, dynamic=False), tensors, [], spec, seed)
    expected = results(summed, tensors, [], spec, seed, torch.float64)
    torch.testing.assert_close([x.double() for x in actual], expected, rtol=0, atol=2e-5)


def test_negative_indices_count_from_the_end_and_others_out_of_range_raise():
    torch._dynamo.reset()
    q, k, v = inputs(2, 2, 20, 20, 8, 8)
    table, index = torch.randn(2, 1, 9), torch.randint(-9, 9, (2, 1, 20, 20))
    spec, kernel = str(SPECS["gathered"]), torch.compile(attention, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(
            kernel(q, k, v, [table, index], spec), attention(q, k, v, [table, index % 9], spec)
        )
        index[1, 0, 3, 4] = 9
        with pytest.raises(RuntimeError, match="attention's table T0 has 9 entries, got index 9"):
            kernel(q, k, v, [table, index], spec)


def test_a_row_whose_keys_are_all_masked_by_adding():
    """Scores of -1e9 in float32 are multiples of 64: eager in float32 is the measure, and lse says nothing."""
    torch._dynamo.reset()
    mask = (torch.rand(3, 1, 1, 70) < 0.4).float() * -1e9
    mask[0] = -1e9

    def eager(q, k, v, extras, spec):
        return (q @ k.mT * 0.25 + extras[0]).softmax(-1) @ v

    tensors, seed = inputs(3, 2, 70, 70, 16, 8), torch.randn(3, 2, 70, 8)
    spec = str(Attention("0.25*s + x0", True, ("x0",)))
    actual = results(torch.compile(attention, dynamic=False), tensors, [mask], spec, seed)
    torch.testing.assert_close(actual, results(eager, tensors, [mask], spec, seed), rtol=0, atol=2e-5)


def test_doubles_fall_back_to_the_reference():
    torch._dynamo.reset()
    tensors = [x.double() for x in inputs(2, 2, 5, 5, 4, 4)]
    spec, seed = str(SPECS["causal"]), torch.randn(2, 2, 5, 4).double()
    actual = results(torch.compile(attention), tensors, [], spec, seed)
    torch.testing.assert_close(actual, results(attention, tensors, [], spec, seed))


def test_documents_side_by_side_cost_what_they_cost_alone():
    """3,200 rows of 64 documents: blocks of queries meet the keys of their own documents only."""
    torch._dynamo.reset()
    documents = torch.arange(64).repeat_interleave(50)
    tensors, given = (
        inputs(1, 1, 3200, 3200, 8, 8),
        [documents[None, None, :, None], documents[None, None, None]],
    )
    kernel, spec = torch.compile(attention, dynamic=False), str(SPECS["documents"])
    apart = [x.view(64, 1, 50, 8) for x in tensors]
    with torch.no_grad():
        together = kernel(*tensors, given, spec)
        alone = kernel(*apart, [], str(SPECS["causal"]))
        torch.testing.assert_close(together.view_as(alone), alone)
        _, (code,) = run_and_get_code(lambda: torch.compile(attention, dynamic=False)(*tensors, given, spec))
    assert "n0_low" in code and "t.n1_high" in code


def test_no_buffer_of_all_pairs():
    torch._dynamo.reset()
    x = [t.requires_grad_() for t in inputs(2, 2, 331, 331, 8, 8)]
    given = extras("hstu", 2, 2, 331, 331)

    def loss():
        torch.compile(attention, dynamic=False)(*x, given, str(SPECS["hstu"])).sum().backward()

    _, code = run_and_get_code(loss)
    assert len(code) == 2
    for text in code:
        assert "331, 331" not in text and str(331 * 331) not in text


@pytest.fixture(scope="module")
def ulps(tmp_path_factory):
    """From a function's name and its arguments in float32 to its results, and their greatest error in ulp."""
    folder = tmp_path_factory.mktemp("real")
    source, library = folder / "real.cpp", folder / "real.so"
    loop = "for (int i = 0; i < n; ++i) y[i] = real"
    loops = "".join(
        f'extern "C" void v_{f}(const float* x, float* y, int n) {{ {loop}::{f}(x[i]); }}\n'
        for f in ("exp", "log", "log2", "log10", "tanh", "erf", "sigmoid", "sqrt", "floor", "nearest")
    )
    source.write_text(f"#include <cmath>\n#include <cstdint>\n#include <limits>\n{MATH}{loops}")
    flags = ["-O3", "-march=native", "-ffp-contract=off", "-std=c++20", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, source, "-o", library], check=True)
    functions = ctypes.CDLL(str(library))

    def measured(name, x):
        y = torch.empty_like(x)
        getattr(functions, f"v_{name}")(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), x.numel()
        )
        want = getattr(torch, {"nearest": "round"}.get(name, name))(x.double())
        _, exponent = torch.frexp(want)
        return y, ((y.double() - want).abs() / 2.0 ** (exponent - 24).double()).max().item()

    return measured


def test_functions_of_real_numbers(ulps):
    """exp within 1 ulp (0 below 2e-38), logarithms within 0.7, tanh and erf within 2; sqrt is rounded once."""
    x = torch.linspace(-86.6, 88.7, 10**6)
    assert ulps("exp", x)[1] < 1
    numbers = [torch.arange(10**6).float(), torch.rand(10**5) * 1e-38]
    for log, most in (("log", 0.65), ("log2", 0.7), ("log10", 0.7)):
        assert ulps(log, torch.cat([torch.linspace(0.5, 2, 10**6), numbers[0][1:], numbers[1]]))[1] < most
    assert ulps("tanh", torch.cat([x / 10, x * 1e-3]))[1] < 2
    assert ulps("erf", torch.cat([x / 10, x * 1e-3]))[1] < 2
    roots = torch.cat([x.abs(), torch.rand(10**6) * 4, *numbers, x.abs() * 1e-45])
    torch.testing.assert_close(ulps("sqrt", roots)[0], roots.double().sqrt().float(), rtol=0, atol=0)


def test_borders_of_buckets(ulps):
    """Logarithms are whole at powers of their base, and halves are rounded to even numbers."""
    exponents = torch.arange(-37, 39).double()
    for name, base in (("log2", 2), ("log10", 10)):
        assert torch.equal(ulps(name, (base**exponents).float())[0].double(), exponents)
    x = torch.cat(
        [torch.arange(-99, 99) / 2, torch.tensor([0.49999997, 2.0**22 + 0.5, -(2.0**23) + 0.5, 3e9, -1e-9])]
    )
    assert torch.equal(ulps("floor", x)[0], x.floor()) and torch.equal(ulps("nearest", x)[0], x.round())


@pytest.mark.parametrize("name", ["exp", "log", "log2", "log10", "sqrt", "erf", "sigmoid", "floor"])
def test_functions_of_infinities(ulps, name):
    edge = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 200.0, -200.0])
    edge = edge.abs() if "log" in name else edge
    want = getattr(torch, name)(edge)
    torch.testing.assert_close(ulps(name, edge)[0], want, equal_nan=True, rtol=0, atol=1e-37)
