"""C++ for the score language: typed statements, and functions of real numbers that a compiler turns into vectors.

An integer made of i, j, M, N and constants is an int32_t, one that a 64-bit load or `wide` goes into an int64_t, a
truth a bool, the rest float. Truths are joined by `&` and `|`: a `&&` is a branch, and gcc does not vectorize it.
"""

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import And, BooleanFalse, BooleanTrue, Not, Or

from recompile.lowering import scalar
from recompile.lowering.score import (
    div,
    erf,
    floor,
    floordiv,
    log2,
    log10,
    nearest,
    sigmoid,
    trunc,
    uniform,
    where,
    wide,
)

# exp: 2^n (1 + r + ...), the polynomial of Cephes' expf, doubled so that 2^(n - 1) stays representable. Results below
# the normal numbers are 0. log: Cephes' range, a polynomial fitted to 2e-10, and the large terms summed with their
# rounding errors, which leaves an error of 0.51 ulp: a result next to a bucket's border falls on eager's side of it.
# erf: below 1 x + x times a polynomial, above it 1 - exp(polynomial), both fitted to a tenth of float32's rounding.
MATH = """
#if defined(__GNUC__)
#define INLINED inline __attribute__((always_inline))  // a loop with a call is no vector loop
#else
#define INLINED inline
#endif
namespace real {
#ifdef __FMA__
INLINED float fma(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
#else
INLINED float fma(float a, float b, float c) { return a * b + c; }
#endif
INLINED int32_t bits(float x) { return __builtin_bit_cast(int32_t, x); }
INLINED float from_bits(int32_t x) { return __builtin_bit_cast(float, x); }
// c ? a : b by bits, as all that may become an index: gcc 12 moves what only a branch needs into the branch, such as a
// call of fma, or the read of a table at a bound, and then cannot vectorize the loop.
INLINED int32_t select(bool c, int32_t a, int32_t b) { return (a & -int32_t(c)) | (b & ~-int32_t(c)); }
INLINED int64_t select(bool c, int64_t a, int64_t b) { return (a & -int64_t(c)) | (b & ~-int64_t(c)); }
INLINED float select(bool c, float a, float b) { return from_bits(select(c, bits(a), bits(b))); }
INLINED bool select(bool c, bool a, bool b) { return (c & a) | (!c & b); }
INLINED float exp(float x) {
  x = x < -87.4f ? -87.4f : x;
  x = x > 88.8f ? 88.8f : x;
  const float t = fma(x, 1.44269504f, 12582912.0f), n = t - 12582912.0f;
  const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
  float p = fma(3.9751383e-4f, r, 2.7963999e-3f);
  p = fma(p, r, 1.66669038147e-2f);
  p = fma(p, r, 8.3331591788e-2f);
  p = fma(p, r, 3.3333330918e-1f);
  p = fma(p, r, 1.00000002402f);
  p = fma(p, r, 2.0f);
  p = fma(p, r, 2.0f);
  return p * from_bits(int32_t((uint32_t(bits(t)) << 23) + (126u << 23)));
}
INLINED float sigmoid(float x) { return 1.0f / (1.0f + exp(-x)); }
INLINED float tanh(float x) {
  const float a = x < 0 ? -x : x, z = x * x;
  float p = fma(-5.70498872745e-3f, z, 2.06390887954e-2f);
  p = fma(p, z, -5.37397155531e-2f);
  p = fma(p, z, 1.33314422036e-1f);
  p = fma(p, z, -3.33332819422e-1f);
  const float near = fma(p * z, x, x), far = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  return select(a < 0.625f, near, x < 0 ? -far : far);
}
INLINED float erf(float x) {
  const float a = x < 0 ? -x : x, z = x * x;
  float p = fma(7.88912294e-5f, z, -8.02084222e-4f);
  p = fma(p, z, 5.18953567e-3f);
  p = fma(p, z, -2.68544443e-2f);
  p = fma(p, z, 1.12836003e-1f);
  p = fma(p, z, -3.7612626e-1f);
  p = fma(p, z, 1.28379166e-1f);
  const float y = a > 4.0f ? 4.0f : a;
  float q = fma(-2.16867647e-5f, y, 4.41335316e-4f);
  q = fma(q, y, -4.20455635e-3f);
  q = fma(q, y, 2.52082404e-2f);
  q = fma(q, y, -1.08418554e-1f);
  q = fma(q, y, -6.33219898e-1f);
  q = fma(q, y, -1.12957835f);
  const float far = 1.0f - exp(fma(q, y, 1.88037069e-4f));
  return select(a < 1.0f, fma(p, x, x), x < 0 ? -far : far);
}
template <int base> INLINED float logarithm(float x) {  // base 0: the natural one
  const bool tiny = x < 1.17549435e-38f;
  const float y = select(tiny, x * 8388608.0f, x);
  const int32_t e = (bits(y) - 0x3f3504f3) >> 23;
  const float n = float(e) - select(tiny, 23.0f, 0.0f);
  const float f = from_bits(bits(y) - int32_t(uint32_t(e) << 23)) - 1.0f;
  float p = fma(-0.056970764f, f, 0.104563437f);
  p = fma(p, f, -0.108663008f);
  p = fma(p, f, 0.110768214f);
  p = fma(p, f, -0.12422324f);
  p = fma(p, f, 0.142817646f);
  p = fma(p, f, -0.166694075f);
  p = fma(p, f, 0.200002044f);
  p = fma(p, f, -0.249999672f);
  p = fma(p, f, 0.333333313f);
  const float h = f * f, h_low = fma(f, f, -h), half = 0.5f * h;
  const float s = f - half, s_low = (f - s) - half;
  float part = s, rest = fma(h * f, p, fma(-0.5f, h_low, s_low));  // the logarithm of 1 + f is part + rest
  if constexpr (base != 0) {
    constexpr float high = base == 2 ? 1.44269502f : 0.434294492f, low = base == 2 ? 1.92596299e-8f : -1.01030501e-8f;
    part = s * high;
    rest = fma(s, high, -part) + fma(s, low, rest * high);
  }
  constexpr float unit = base == 2 ? 1.0f : base == 10 ? 0.301025391f : 0.693359375f;
  constexpr float unit_low = base == 2 ? 0.0f : base == 10 ? 4.60503898e-6f : -2.12194440e-4f;
  const float top = n * unit, sum = top + part, sum_low = (top - sum) + part;
  const float small = fma(n, unit_low, rest);
  const float found = sum + (sum_low + small);
  const float inf = std::numeric_limits<float>::infinity();
  return select(x > 0, select(x < inf, found, x), select(x == 0, -inf, std::numeric_limits<float>::quiet_NaN()));
}
INLINED float log(float x) { return logarithm<0>(x); }
INLINED float log2(float x) { return logarithm<2>(x); }
INLINED float log10(float x) { return logarithm<10>(x); }
INLINED float nearest(float x) { return std::nearbyint(x); }
INLINED float floor(float x) {  // gcc 12 makes no vectors of std::floor
  const float near = nearest(x);
  return near - select(near > x, 1.0f, 0.0f);
}
// Correctly rounded where there is an fma: the estimate is corrected by what its square leaves of x (Markstein 1990).
// Inductor asks for errno, which std::sqrt sets in a branch.
INLINED float sqrt(float x) {
  const bool tiny = x < 0x1p-100f;  // what is left would be no normal number
  const float y = select(tiny, x * 0x1p64f, x);
  float r = from_bits(0x5f375a86 - (bits(y) >> 1));
  r = r * fma(-0.5f * y * r, r, 1.5f);
  r = r * fma(-0.5f * y * r, r, 1.5f);
  float root = y * r, half = 0.5f * r;
  const float off = fma(-root, half, 0.5f);
  root = fma(root, off, root), half = fma(half, off, half);
  root = fma(fma(-root, root, y), half, root) * select(tiny, 0x1p-32f, 1.0f);
  const float inf = std::numeric_limits<float>::infinity();
  return select(x > 0, select(x < inf, root, x), select(x == 0, x, std::numeric_limits<float>::quiet_NaN()));
}
// Exact up to 2^53, as eager's cast then rounds once; AVX2 has no instruction for it.
INLINED float from_int(int64_t x) {
  const uint64_t low = (uint64_t(x) & 0xffffffffu) | 0x4330000000000000u;
  const uint64_t high = ((uint64_t(x) >> 32) ^ 0x80000000u) | 0x4530000000000000u;
  const double top = __builtin_bit_cast(double, high) - 19342822341709703277445120.0;
  return float(top + __builtin_bit_cast(double, low));
}
INLINED float from_int(int32_t x) { return float(x); }
INLINED float from_int(bool x) { return float(int32_t(x)); }
INLINED int32_t trunc(float x) {
  x = select(x > -2147483648.0f, x, -2147483648.0f);
  return int32_t(select(x < 2147483520.0f, x, 2147483520.0f));
}
INLINED int64_t trunc64(float x) {
  x = select(x > -0x1p63f, x, -0x1p63f);
  return int64_t(select(x < 0x1.fffffep62f, x, 0x1.fffffep62f));
}
INLINED uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}
INLINED float uniform(int64_t seed, int32_t i, int32_t j) {
  const uint32_t row = mixed(uint32_t(seed) + uint32_t(i) * 0x9e3779b9u);
  return float(int32_t(mixed(row ^ mixed(uint32_t(j) * 0x85ebca6bu)) >> 8)) * 0x1p-24f;
}
INLINED float sign(float x) { return select(x > 0, 1.0f, 0.0f) - select(x < 0, 1.0f, 0.0f); }
INLINED float step(float x) { return select(x > 0, 1.0f, select(x < 0, 0.0f, 0.5f)); }
INLINED float mod(float a, float b) {
  const float m = std::fmod(a, b);
  return m != 0 && (m < 0) != (b < 0) ? m + b : m;
}
template <typename A> INLINED A abs(A x) {
  if constexpr (std::is_integral_v<A>) return (x ^ -A(x < 0)) + A(x < 0);
  else return x < 0 ? -x : x;
}
template <typename A> INLINED A max(A a, A b) { return select(a < b, b, a); }  // NaN where `a` is
template <typename A> INLINED A min(A a, A b) { return select(a > b, b, a); }
template <typename A> INLINED A mod(A a, A b) { const A m = a % b; return m < 0 ? m + b : m; }
template <typename A, typename B> INLINED auto floordiv(A a, B b) {
  const auto d = a / b;
  return a % b < 0 ? d - 1 : d;
}
template <int n, typename A> INLINED A power(A x) {
  if constexpr (n == 1) return x;
  else if constexpr (n % 2) return x * power<n - 1>(x);
  else return power<n / 2>(x * x);
}
}  // namespace real
"""

Types = Mapping[str, str]  # the C++ type of each symbol
_RANK = ("bool", "int32_t", "int64_t", "float")
_FUNCTIONS = {
    sympy.exp: "exp",
    sympy.log: "log",
    sympy.tanh: "tanh",
    sigmoid: "sigmoid",
    erf: "erf",
    log2: "log2",
    log10: "log10",
    floor: "floor",
    nearest: "nearest",
    sympy.Heaviside: "step",
}


def ctype(expr: sympy.Basic, types: Types) -> str:
    """The C++ type of `expr`."""
    if isinstance(expr, sympy.Symbol):
        return types[expr.name]
    if scalar.is_truth(expr):
        return "bool"
    if isinstance(expr, sympy.Number) or expr in (sympy.oo, -sympy.oo, sympy.nan):
        return "float" if not expr.is_Integer else "int32_t" if abs(int(expr)) < 2**31 else "int64_t"
    if isinstance(expr, trunc):
        return "int32_t"
    if isinstance(expr, wide):
        return "int64_t"
    args = [ctype(arg, types) for arg in (expr.args[1:] if isinstance(expr, where) else expr.args)]
    if isinstance(expr, sympy.Pow):
        whole = expr.exp.is_Integer and expr.exp > 0 and args[0] != "float"
        return "int64_t" if whole else "float"
    if isinstance(expr, sympy.Mul) and sum(not part.is_Number for part in expr.args) > 1:
        args.append("int64_t")
    known = (sympy.Add, sympy.Mul, sympy.Max, sympy.Min, sympy.Mod, sympy.Abs, sympy.sign, where, floordiv)
    return max([*args, "int32_t"], key=_RANK.index) if isinstance(expr, known) else "float"


def literal(value: float) -> str:
    """A float constant."""
    if value != value:
        return "std::numeric_limits<float>::quiet_NaN()"
    if value in (float("inf"), float("-inf")):
        return f"{'-' * (value < 0)}std::numeric_limits<float>::infinity()"
    return f"{value!r}f"


def text(expr: sympy.Basic, types: Types, wanted: str = "") -> str:
    """`expr` as a C++ expression, of type `wanted` or else its own (`ctype`)."""
    own = ctype(expr, types)
    wanted = wanted or own
    if isinstance(expr, sympy.Number) or expr in (sympy.oo, -sympy.oo, sympy.nan, sympy.E):
        if wanted == "float":
            return literal(float(expr))
        return f"int64_t({int(expr)})" if "int64_t" in (own, wanted) else str(int(expr))
    shown = _shown(expr, own, types)
    if own == wanted:
        return shown
    return f"real::from_int({shown})" if wanted == "float" else f"{wanted}({shown})"


def _shown(expr: sympy.Basic, own: str, types: Types) -> str:
    if isinstance(expr, sympy.Symbol):
        return str(expr.name)
    if isinstance(expr, (BooleanTrue, BooleanFalse)):
        return "true" if expr else "false"
    if isinstance(expr, Relational):
        kind = max((ctype(arg, types) for arg in expr.args), key=_RANK.index)
        left, right = (text(arg, types, kind) for arg in expr.args)
        return f"({left} {scalar.OPERATORS[expr.func]} {right})"
    if isinstance(expr, (And, Or)):
        return "(" + (" & " if isinstance(expr, And) else " | ").join(text(a, types) for a in expr.args) + ")"
    if isinstance(expr, Not):
        return f"!{text(expr.args[0], types)}"
    if isinstance(expr, where):
        c, a, b = expr.args
        return f"real::select({text(c, types)}, {text(a, types, own)}, {text(b, types, own)})"
    if isinstance(expr, sympy.Add):
        return _sum(expr, own, types)
    if isinstance(expr, sympy.Mul):
        return _product(expr, own, types)
    return _called(expr, own, types)


def _sum(expr: sympy.Add, own: str, types: Types) -> str:
    """Integers are added as such: that is exact."""
    whole = [arg for arg in expr.args if ctype(arg, types) != "float"]
    if own == "float" and len(whole) > 1:
        rest = [text(arg, types) for arg in expr.args if arg not in whole]
        return f"({' + '.join([*rest, text(sympy.Add(*whole), types, 'float')])})"
    first, *others = sorted(expr.args, key=lambda arg: bool(arg.could_extract_minus_sign()))
    shown = text(first, types, own)
    for arg in others:
        minus = arg.could_extract_minus_sign()
        shown += f" {'-' if minus else '+'} {text(-arg if minus else arg, types, own)}"
    return f"({shown})"


def _product(expr: sympy.Mul, own: str, types: Types) -> str:
    if expr.args[0] == -1:
        return f"-{text(sympy.Mul(*expr.args[1:]), types, own)}"
    return f"({' * '.join(text(arg, types, own) for arg in expr.args)})"


def _called(expr: sympy.Basic, own: str, types: Types) -> str:
    if isinstance(expr, sympy.Pow):
        return _power(expr, own, types)
    if isinstance(expr, trunc):
        return f"real::trunc({text(expr.args[0], types, 'float')})"
    if isinstance(expr, wide):
        (whole,) = expr.args
        if isinstance(whole, trunc):
            return f"real::trunc64({text(whole.args[0], types, 'float')})"
        return text(whole, types, "int64_t")
    if isinstance(expr, div):
        return "(" + " / ".join(text(arg, types, "float") for arg in expr.args) + ")"
    if isinstance(expr, uniform):
        return f"real::uniform({', '.join(text(arg, types) for arg in expr.args)})"
    if isinstance(expr, (sympy.Max, sympy.Min)):
        name = "max" if isinstance(expr, sympy.Max) else "min"
        # NaN goes through the first argument
        args = [text(arg, types, own) for arg in sorted(expr.args, key=lambda arg: bool(arg.is_Number))]
        return functools.reduce(lambda a, b: f"real::{name}<{own}>({a}, {b})", args)
    for kind, name in ((sympy.Abs, "abs"), (sympy.Mod, "mod"), (floordiv, "floordiv")):
        if isinstance(expr, kind):
            return f"real::{name}({', '.join(text(arg, types, own) for arg in expr.args)})"
    if isinstance(expr, sympy.sign):
        shown = f"real::sign({text(expr.args[0], types, 'float')})"
        return shown if own == "float" else f"{own}({shown})"
    found = next((name for kind, name in _FUNCTIONS.items() if isinstance(expr, kind)), None)
    if found is None:
        raise ValueError(f"{expr} ({type(expr).__name__}) is not part of the score language")
    return f"real::{found}({text(expr.args[0], types, 'float')})"


def _power(expr: sympy.Pow, own: str, types: Types) -> str:
    base = text(expr.base, types, own)
    if expr.exp.is_Integer:
        power = f"real::power<{abs(int(expr.exp))}>({base})" if abs(expr.exp) != 1 else base
        return power if expr.exp > 0 else f"(1.0f / {power})"
    if abs(expr.exp) == sympy.Rational(1, 2):
        return f"real::sqrt({base})" if expr.exp > 0 else f"(1.0f / real::sqrt({base}))"
    return f"std::pow({base}, {text(expr.exp, types, 'float')})"


class Statements:
    """Expressions as statements, in which what they share is computed once: `define` prints what one needs."""

    def __init__(self, exprs: Sequence[sympy.Basic], types: Types) -> None:
        self.types: dict[str, str] = dict(types)
        taken = {int(found[1]) for name in types if (found := re.fullmatch(r"t(\d+)", name))}
        shared, self.results = sympy.cse(list(exprs), symbols=_fresh(taken), order="none")
        self.shared: dict[Any, sympy.Basic] = dict(shared)
        self.lines: list[str] = []

    def define(self, expr: sympy.Basic) -> None:
        """Prints the shared parts of `expr` that are not yet."""
        for symbol in sorted(expr.free_symbols & self.shared.keys(), key=str):
            if symbol.name not in self.types:
                value = self.shared[symbol]
                self.define(value)
                self.types[symbol.name] = ctype(value, self.types)
                self.lines.append(f"const {self.types[symbol.name]} {symbol} = {text(value, self.types)};")

    def result(self, k: int, wanted: str = "") -> str:
        """Expression `k`, after the statements that it needs."""
        self.define(self.results[k])
        return text(self.results[k], self.types, wanted)


def statements(exprs: Sequence[sympy.Basic], types: Types) -> tuple[list[str], list[str]]:
    """(statements, an expression for each of `exprs`), for symbols of these C++ types."""
    found = Statements(exprs, types)
    results = [found.result(k) for k in range(len(exprs))]
    return found.lines, results


def _fresh(taken: set[int]) -> Iterator[sympy.Symbol]:
    return (sympy.Symbol(f"t{k}", real=True) for k in range(10**6) if k not in taken)
