"""C++ for the forward of an attention on the CPU, without a buffer of all pairs.

An item of work is one index of the outer batch axes, some indices of the inner ones, and a tile of query rows. Key tiles
are visited in turn: the parts of the scores that all inner indices share are computed once (cpp_plan.py), and for each
inner index K is packed, and blocks of R rows go through S = Q K^T, the score, a softmax' running maximum and sum, and
O += P V while their scores are in the first-level cache. Blocks that keep no key of a tile are skipped (cpp_keep.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import add

import sympy

from recompile.lowering import score as language
from recompile.lowering.attention.cpp_cells import cells
from recompile.lowering.attention.cpp_keep import Keep
from recompile.lowering.attention.cpp_pairs import Loop, hoisting, masked
from recompile.lowering.attention.cpp_plan import Plan
from recompile.lowering.attention.cpp_struct import (
    Members,
    declare_extras,
    ranges,
    setters,
    size_of,
    tables,
    tile_struct,
)
from recompile.lowering.attention.cpp_tiles import OPTIONS, OPTIONS_END, TILES
from recompile.lowering.attention.spec import Attention
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.score_cpp import MATH, literal

# Query rows and keys in a tile, at most. Two cores of an AMD EPYC with AVX2 and 512 KiB of second-level cache each.
ROWS, KEYS = 192, 128
# Floats of Q and O that an item may hold for all its inner batch indices.
CACHED = 1 << 17
# Below so many multiplications one thread is faster than starting two.
PARALLEL = 1 << 18


def forward(
    spec: Attention,
    q: Operand,
    k: Operand,
    v: Operand,
    extras: Sequence[Operand],
    out: Operand,
    lse: Operand,
    threads: int,
) -> tuple[str, str]:
    """(functions, body of the kernel) that compute `out`, and `lse` for a softmax."""
    rank = len(out.sizes) - 2
    plan = Plan.of(spec, rank, extras, q.sizes[-2], k.sizes[-2])
    keep = Keep(plan, plan.named(spec.keep))
    loops = _Loops(plan, keep.expr)
    members = _members(plan, q, k, v, out, lse)
    ranged = ranges(plan, keep, spec.softmax)
    laid_out, prepare = map(add, tables(plan), cells(plan, keep.cells, threads))
    tensors = {"q": q, "k": k, "v": v}
    visit = _PASS.format(
        products=_DOTS if plan.is_few else _PRODUCTS,
        shared=_SHARED if plan.hoisted else "",
        hoisted="".join(f"\n    t.{s} = w.{s};" for s in plan.hoisted.values()),
        softmax=_softmax(spec) if spec.softmax else _CHOSEN,
    )
    text = f"""
// {spec.score}{" for each pair, a softmax over the keys" if spec.softmax else ""}, where {spec.keep}
struct Attention {{
  {members}{laid_out}
{tile_struct(plan, {name: x.ctype for name, x in tensors.items()}, keep)}
{setters(plan, tensors, keep)}{ranged}{hoisting(plan)}{loops}
{_SCRATCH.format(hoisted=hoisted_memory(plan))}{visit}{_finish(spec, lse)}{_run(spec, plan, prepare, threads)}
}};
"""
    body = f"\n  Attention{{{', '.join(members.values)}}}.run();"
    return f"{OPTIONS}{MATH}{TILES}{text}{OPTIONS_END}", body


def _members(plan: Plan, q: Operand, k: Operand, v: Operand, out: Operand, lse: Operand) -> Members:
    members = Members()
    batch = [str(a) for a in range(plan.rank)]
    for name, value in (("M", q.sizes[-2]), ("N", k.sizes[-2]), ("D", q.sizes[-1]), ("E", v.sizes[-1])):
        members.number(name, value)
    for a in range(plan.rank):
        members.number(f"B{a}", out.sizes[a])
    members.constants += [
        f"BM = round_up({tile_size(q.sizes[-2], ROWS)}, R)",
        f"BN = round_up({tile_size(k.sizes[-2], KEYS)}, PANEL)",
    ]
    members.operand("q", q, [*batch, "m", "d"])
    members.operand("k", k, [*batch, "n", "d"])
    members.operand("v", v, [*batch, "n", "e"])
    members.operand("out", out, [*batch, "m", "e"], output=True)
    if plan.spec.softmax:
        members.operand("lse", lse, [*batch, "m"], output=True)
    declare_extras(plan, members)
    return members


def tile_size(size: str, most: int) -> int:
    """Rows in a tile, before they are rounded up to whole blocks: as few tiles as possible, of about the same size."""
    if not size.isdigit() or int(size) > 8 * most:
        return most
    tiles = max(1, -(-int(size) // most))
    return max(1, -(-int(size) // tiles))


class _Loops:
    """The functions over a row of pairs: scores where some are masked, where none is, and for all keys."""

    def __init__(self, plan: Plan, keep: sympy.Basic) -> None:
        spec = plan.spec
        kept, full = plan.named(spec.kept or spec.score), plan.named(spec.score)
        weight = plan.named(spec.weight) if spec.weight else None
        plan.split([kept, full, *([weight] if weight is not None else [])], keep)
        found = {
            "scores_masked": masked(keep, kept, -sympy.oo if spec.softmax else sympy.Integer(0)),
            "scores_kept": kept,
        }
        if spec.softmax and spec.keep != "true":
            found["scores_full"] = masked(sympy.true, full, -sympy.oo)
        if weight is not None:
            found["weigh"] = language.S * weight
        self.plan = plan
        self.exprs = {name: plan.hoist(expr) for name, expr in found.items()}
        for name in plan.gathers:
            plan.index(name)

    def __str__(self) -> str:
        return "".join(self._function(name, expr) for name, expr in self.exprs.items())

    def _function(self, name: str, expr: sympy.Basic) -> str:
        loop = Loop(self.plan, {"s": "s_"}, [("s_[c] =", "float", expr)])
        return f"""
  void {name}(const Tile& t, int64_t row, float* s_, int64_t c0, int64_t c1, [[maybe_unused]] Bad& bad) const {{{loop}
  }}"""


def hoisted_memory(plan: Plan) -> str:
    types = plan.types
    kinds = {symbol.name: types[symbol.name].replace("bool", "int32_t") for symbol in plan.hoisted.values()}
    return "".join(f"\n    Memory<{kind}> {name}{{BM * BN}};" for name, kind in kinds.items())


_SCRATCH = """
  // One thread's memory: running maxima, sums and outputs of `inner` batch indices, packed tiles, a block of scores.
  struct Scratch {{
    const int64_t width;  // of a row of outputs
    Floats o, top, sum, queries, keys, packed, values, s{{R * BN}};
    Memory<Rows> q;
    Memory<bool> redo;{hoisted}
    Scratch(int64_t inner, int64_t D, int64_t E)
        : width(round_up(E, W)), o(inner * BM * width), top(inner * BM), sum(inner * BM), queries(inner * BM * round_up(D, W)),
          keys(BN * round_up(D, W)), packed(BN * round_up(D, W)), values(BN * round_up(E, PANEL)), q(inner), redo(inner * BM) {{}}
  }};"""

_PASS = """
  // All keys for the rows of a tile and inner indices r0 to r1; FULL: no pair is skipped or masked.
  template <bool FULL> void pass(Tile& t, int64_t r0, int64_t r1, Scratch& w, Bad& bad) const {{
    const int64_t blocks = (t.i1 - t.i0 + R - 1) / R, d = round_up(D, W);
    std::fill(w.o.at, w.o + (r1 - r0) * BM * w.width, 0.0f);
    std::fill(w.top.at, w.top + (r1 - r0) * BM, -INF);
    std::fill(w.sum.at, w.sum + (r1 - r0) * BM, 0.0f);{hoisted}
    for (int64_t r = r0; r < r1; ++r) {{
      inner(t, r);
      w.q[r - r0] = rows(t.q + t.i0 * q_m, q_m, q_d, t.i1 - t.i0, D, w.queries + (r - r0) * BM * d);
    }}
    int64_t first = 0, end = N;
    if (!FULL) bounds(t, t.i0, t.i1 - 1, first, end);
    for (t.j0 = first; t.j0 < end; t.j0 = t.j1) {{
      t.j1 = std::min(t.j0 + BN, std::min(N, t.j0 + round_up(end - t.j0, PANEL)));
      const int64_t n = t.j1 - t.j0;
      keys(t);
      if (!FULL && range(t, t.i0, t.i1 - 1).kind == SKIPPED) continue;
      Range ranges[BM / R];
      bool any = false;
      for (int64_t b = 0; b < blocks; ++b) {{
        const int64_t i0 = t.i0 + b * R, i1 = std::min(i0 + R, t.i1);
        ranges[b] = FULL ? Range{{0, round_up(n, W), MASKED}} : range(t, i0, i1 - 1);
        any |= ranges[b].kind != SKIPPED;{shared}
      }}
      if (!any) continue;
      for (int64_t r = r0; r < r1; ++r) {{
        if (r1 - r0 > 1) inner(t, r);
        inner_keys(t);{products}
        for (int64_t b = 0; b < blocks; ++b) {{
          const auto [from, to, kind] = ranges[b];
          if (kind == SKIPPED) continue;
          const int64_t i0 = t.i0 + b * R, m = std::min(R, t.i1 - i0), at = (r - r0) * BM + b * R;
          float* const o = w.o + at * w.width;
          scores(w.q[r - r0], b * R, m, from, to);
          for (int64_t i = 0; i < m; ++i) {{
            float* const s = w.s + i * BN;{softmax}
          }}
          product<true>(m, E, std::min(to, n) - from, w.s + from, BN, 1, {{v.at + from * v.ld, v.ld, v.panel}}, o, w.width);
        }}
      }}
    }}
  }}
"""

_SHARED = """
        if (ranges[b].kind != SKIPPED)
          for (int64_t i = i0; i < i1; ++i) shared(t, i, ranges[b].from, ranges[b].to, bad);"""

_PRODUCTS = """
        transposed_panels(rows(t.k + t.j0 * k_n, k_n, k_d, n, D, w.keys), n, D, w.packed);
        panels(t.v + t.j0 * v_n, v_n, v_e, n, E, w.values);
        const Right k = right(w.packed, D), v = right(w.values, n);
        const auto scores = [&](Rows q, int64_t i, int64_t m, int64_t from, int64_t to) {
          product<false>(m, to - from, D, q[i], q.ld, 1, {k.at + from / PANEL * k.panel, k.ld, k.panel}, w.s + from, BN);
        };"""

_DOTS = """
        const Rows k = rows(t.k + t.j0 * k_n, k_n, k_d, n, D, w.keys);
        const Right v = right(rows(t.v + t.j0 * v_n, v_n, v_e, n, E, w.values));
        const auto scores = [&](Rows q, int64_t i, int64_t m, int64_t from, int64_t to) {
          dots(m, std::min(to, n) - from, D, {q[i], q.ld}, {k[from], k.ld}, w.s + from, BN);
        };"""


_CHOSEN = """
            if (kind == KEPT) scores_kept(t, i0 + i, s, from, to, bad);
            else scores_masked(t, i0 + i, s, from, to, bad);"""

_CHOSEN_OR_FULL = """
            if (FULL) scores_full(t, i0 + i, s, from, to, bad);
            else if (kind == KEPT) scores_kept(t, i0 + i, s, from, to, bad);
            else scores_masked(t, i0 + i, s, from, to, bad);"""


def _softmax(spec: Attention) -> str:
    weigh = "\n            weigh(t, i0 + i, s, from, to, bad);" if spec.weight else ""
    return f"""{_CHOSEN if spec.keep == "true" else _CHOSEN_OR_FULL}
            const float before = w.top[at + i], here = maximum(s, from, to);
            const float top = here > before || here != here ? here : before;
            if (top != before) {{
              const float by = real::exp(before - top);
              scale(o + i * w.width, w.width, by);
              w.sum[at + i] *= by;
              w.top[at + i] = top;
            }}
            w.sum[at + i] += exponentials(s, from, to, top == -INF ? 0.0f : top);{weigh}"""


def _finish(spec: Attention, lse: Operand) -> str:
    if not spec.softmax:
        return """
  // Stores the outputs of a tile.
  template <bool FULL> void finish(Tile& t, int64_t r0, int64_t r1, Scratch& w) const {
    for (int64_t r = r0; r < r1; ++r) {
      inner(t, r);
      for (int64_t i = t.i0; i < t.i1; ++i)
        write(w.o + ((r - r0) * BM + i - t.i0) * w.width, E, out + out_at(t) + i * out_m, out_e);
    }
  }"""
    nothing = "w.sum[at] == 0" if spec.safe else "N == 0"
    lse_at = "".join(f" + t.at[{a}] * lse_{a}" for a in range(len(lse.sizes) - 1))
    return f"""
  // Stores the outputs of a tile, and marks the rows in which no score is above what `score` has for skipped pairs.
  template <bool FULL> bool finish(Tile& t, int64_t r0, int64_t r1, Scratch& w) const {{
    bool any = false;
    for (int64_t r = r0; r < r1; ++r) {{
      inner(t, r);
      for (int64_t i = t.i0; i < t.i1; ++i) {{
        const int64_t at = (r - r0) * BM + i - t.i0;
        if (FULL && !w.redo[at]) continue;
        w.redo[at] = !(w.top[at] > {literal(spec.negligible)});
        any |= w.redo[at];
        scale(w.o + at * w.width, w.width, {nothing} ? 0.0f : 1.0f / w.sum[at]);
        write(w.o + at * w.width, E, out + out_at(t) + i * out_m, out_e);
        lse[i * lse_m{lse_at}] = w.top[at] + real::log(w.sum[at]);
      }}
    }}
    return any;
  }}"""


def _run(spec: Attention, plan: Plan, prepare: str, threads: int) -> str:
    outer = list(range(plan.rank - plan.inner))
    inner = list(range(plan.rank - plan.inner, plan.rank))
    redo = spec.softmax and spec.keep != "true"
    finish = "finish<false>(t, r0, r1, w);"
    if redo:
        finish = """if (finish<false>(t, r0, r1, w)) {
          pass<true>(t, r0, r1, w, bad);
          finish<true>(t, r0, r1, w);
        }"""
    return f"""
  int64_t out_at([[maybe_unused]] const Tile& t) const {{ return 0{"".join(f" + t.at[{a}] * out_{a}" for a in range(plan.rank))}; }}

  void run() {{
    Bad bad;
    const int64_t outer_size = {size_of(outer)}, inner_size = {size_of(inner)};
    if (outer_size * inner_size * M == 0) return;{prepare}
    // Inner indices are taken some at a time, so that their outputs stay in the second-level cache.
    int64_t some = evenly(inner_size, {CACHED} / (BM * (D + E))), tiles = (M + BM - 1) / BM;
    const int64_t wanted = 2 * {threads};
    while (some > 1 && outer_size * ((inner_size + some - 1) / some) * tiles < wanted) some = (some + 1) / 2;
    const int64_t groups = (inner_size + some - 1) / some;
    if (outer_size * groups * tiles < wanted) tiles = std::min((M + R - 1) / R, wanted / (outer_size * groups));
    const int64_t height = round_up((M + tiles - 1) / tiles, R);
    const int64_t items = outer_size * groups * tiles, run = std::max<int64_t>(1, items / ({threads} * 32));
    #pragma omp parallel num_threads({threads}) if (outer_size * inner_size * M * N * (D + E) > {PARALLEL})
    {{
      Scratch w(some, D, E);
      Tile t;
      #pragma omp for schedule(dynamic, run)
      for (int64_t item = 0; item < items; ++item) {{
        const int64_t r0 = item / tiles % groups * some, r1 = std::min(r0 + some, inner_size);
        outer(t, item / tiles / groups);
        t.i0 = (tiles - 1 - item % tiles) * height;
        t.i1 = std::min(t.i0 + height, M);
        if (t.i0 >= M) continue;
        pass<false>(t, r0, r1, w, bad);
        {finish}
      }}
    }}
    bad.raise();
  }}"""
