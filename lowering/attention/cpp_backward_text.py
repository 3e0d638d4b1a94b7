"""The C++ of the backward that does not depend on the attention at hand."""

SCRATCH = """
  // One thread's memory: K (both ways) and V of `inner` batch indices, packed; Q and grad; tiles of pairs.
  struct Scratch {{
    const int64_t k_size, v_size;  // of a packed tile
    Floats k_rows, v_rows, k, kt, vt, q_rows, q, grad_rows, grad, p{{BM * BN}}, d{{BM * BN}}{tiles};
    Memory<Rows> k_at, v_at;
    Memory<bool> wide;{slots}{hoisted}
    Scratch(int64_t inner, int64_t M, int64_t D, int64_t E)
        : k_size(BN * round_up(D, PANEL)), v_size(BN * round_up(E, PANEL)), k_rows(inner * k_size), v_rows(inner * v_size),
          k(inner * k_size), kt(inner * k_size), vt(inner * v_size), q_rows(BM * round_up(D, W)), q(BM * round_up(D, PANEL)),
          grad_rows(BM * round_up(E, W)), grad(BM * round_up(E, PANEL)), k_at(inner), v_at(inner), wide((M + R - 1) / R) {{}}
  }};"""

# lse is 1e9 for a row whose keys are all masked by -1e9, in steps of 64: exp(score - lse) would be off by their number.
# Such rows, and those that the forward computed from all keys, get their maximum and sum anew.
WIDE = """
  static bool is_wide(float lse) {{ return !(lse > {negligible}) || lse < -4096.0f || lse > 4096.0f; }}

  // Blocks with such rows, for any of the inner indices.
  void find_wide(Tile& t, int64_t r0, int64_t r1, Scratch& w) const {{
    std::fill(w.wide.at, w.wide + (M + R - 1) / R, false);
    for (int64_t r = r0; r < r1; ++r) {{
      inner(t, r);
      for (int64_t i = 0; i < M; ++i) w.wide[i / R] |= is_wide(t.lse[i * lse_m]);
    }}
  }}

  // The maximum of a wide row's scores, and 1 / the sum of exp(score - maximum).
  void normalize(Tile& t, int64_t r, float* top, float* norm, Scratch& w, Bad& bad) const {{
    find_wide(t, r, r + 1, w);
    if (std::none_of(w.wide.at, w.wide + (M + R - 1) / R, [](bool wide) {{ return wide; }})) return;
    std::fill(top, top + M, -INF);
    std::fill(norm, norm + M, 0.0f);
    for (t.j0 = 0; t.j0 < N; t.j0 = t.j1) {{
      t.j1 = std::min(t.j0 + BN, N);
      const int64_t n = t.j1 - t.j0, to = round_up(n, W);
      keys(t);
      inner_keys(t);
      transposed_panels(rows(t.k + t.j0 * k_n, k_n, k_d, n, D, w.k_rows), n, D, w.kt);
      for (t.i0 = 0; t.i0 < M; t.i0 = t.i1) {{
        t.i1 = std::min(t.i0 + R, M);
        if (!w.wide[t.i0 / R]) continue;
        const Rows q = rows(t.q + t.i0 * q_m, q_m, q_d, t.i1 - t.i0, D, w.q_rows);
        product<false>(t.i1 - t.i0, to, D, q.at, q.ld, 1, right(w.kt, D), w.p, BN);
        for (int64_t i = t.i0; i < t.i1; ++i) {{{shared}
          float* const s = w.p + (i - t.i0) * BN;
          scores_full(t, i, s, 0, to, bad);
          const float before = top[i], here = maximum(s, 0, to);
          top[i] = here > before || here != here ? here : before;
          if (top[i] != before) norm[i] *= real::exp(before - top[i]);
          norm[i] += exponentials(s, 0, to, top[i] == -INF ? 0.0f : top[i]);
        }}
      }}
    }}
    for (int64_t i = 0; i < M; ++i) {normalized}
  }}
"""

# K and V of a tile of keys.
PACK = """
  void pack(Tile& t, int64_t r0, int64_t r1, Scratch& w) const {{
    const int64_t n = t.j1 - t.j0;
    keys(t);
    for (int64_t r = r0; r < r1; ++r) {{
      inner(t, r);
      const int64_t k_at = (r - r0) * w.k_size, v_at = (r - r0) * w.v_size;
      const Rows k = rows(t.k + t.j0 * k_n, k_n, k_d, n, D, w.k_rows + k_at), v = rows(t.v + t.j0 * v_n, v_n, v_e, n, E, w.v_rows + v_at);{packed}
    }}
  }}"""

# With few queries the keys are read where they lie.
FEW = {
    "packed": """
      w.k_at[r - r0] = k, w.v_at[r - r0] = v;""",
    "keys": """
      const Rows kn = w.k_at[r - r0], vn = w.v_at[r - r0];
      const Right k = right(kn);""",
    "products": """
          dots(m, std::min(to, n) - from, D, {q[b * R], q.ld}, {kn[from], kn.ld}, p + from, BN);
          dots(m, std::min(to, n) - from, E, {grad[b * R], grad.ld}, {vn[from], vn.ld}, d + from, BN);""",
}
MANY = {
    "packed": """
      transposed_panels(k, n, D, w.kt + k_at);
      panels(k.at, k.ld, 1, n, D, w.k + k_at);
      transposed_panels(v, n, E, w.vt + v_at);""",
    "keys": """
      const Right k = right(w.k + (r - r0) * w.k_size, n), kt = right(w.kt + (r - r0) * w.k_size, D);
      const Right vt = right(w.vt + (r - r0) * w.v_size, E);""",
    "products": """
          product<false>(m, to - from, D, q[b * R], q.ld, 1, {kt.at + from / PANEL * kt.panel, kt.ld, kt.panel}, p + from, BN);
          product<false>(m, to - from, E, grad[b * R], grad.ld, 1, {vt.at + from / PANEL * vt.panel, vt.ld, vt.panel}, d + from, BN);""",
}

VISIT = """
  // A tile of pairs, for inner indices r0 to r1. The gradients of its keys are set where the tile is the first to add to
  // them. False: the tile keeps no pair, and nothing is done.
  bool visit(Tile& t, int64_t r0, int64_t r1, Scratch& w, bool set_k, bool set_v, Bad& bad) const {{
    const int64_t n = t.j1 - t.j0, height = t.i1 - t.i0, blocks = (height + R - 1) / R;
    Range ranges[BM / R];
    bool any = false, all = true;
    for (int64_t b = 0; b < blocks; ++b) {{
      const int64_t i0 = t.i0 + b * R, i1 = std::min(i0 + R, t.i1);
      ranges[b] = {range};
      any |= ranges[b].kind != SKIPPED;
      all &= ranges[b].from == 0 && ranges[b].to >= n;{shared}
    }}
    if (!any) return false;{zeroed}
    for (int64_t r = r0; r < r1; ++r) {{
      inner(t, r);
      inner_keys(t);{keys}
      const Rows q = rows(t.q + t.i0 * q_m, q_m, q_d, height, D, w.q_rows);
      const Rows grad = rows(t.grad + t.i0 * grad_m, grad_m, grad_e, height, E, w.grad_rows);
      panels(q.at, q.ld, 1, height, D, w.q);
      panels(grad.at, grad.ld, 1, height, E, w.grad);
      for (int64_t b = 0; b < blocks; ++b) {{
        const auto [from, to, kind] = ranges[b];
        const int64_t i0 = t.i0 + b * R, m = std::min(R, t.i1 - i0);
        float *const p = t.p + b * R * BN, *const d = t.d + b * R * BN;
        if (kind != SKIPPED) {{{products}
          for (int64_t i = 0; i < m; ++i) {{
            {pairs}
          }}
          product<true>(m, D, std::min(to, n) - from, d + from, BN, 1, {{k.at + from * k.ld, k.ld, k.panel}}, t.dq + i0 * dq_m, dq_m);
        }}
        for (int64_t i = 0; i < (all ? 0 : m); ++i)
          for (float* const row : {{p + i * BN, d + i * BN}}) {{
            std::fill(row, row + from, 0.0f);
            std::fill(row + to, row + BN, 0.0f);
          }}
      }}
      // Keys, R at a time unless all rows keep all of them, against the blocks of rows that keep any of them.
      for (int64_t c = 0, step = all ? n : R; c < n; c += step) {{
        int64_t b0 = 0, b1 = blocks;
        const int64_t width = std::min(step, n - c);
        const auto apart = [&](int64_t b) {{ return ranges[b].to <= c || ranges[b].from >= c + width; }};
        while (b0 < b1 && apart(b0)) ++b0;
        while (b0 < b1 && apart(b1 - 1)) --b1;
        const int64_t i = b0 * R, rows = std::min(b1 * R, height) - i;
        sum_rows(set_v, width, E, std::max<int64_t>(rows, 0), t.p + i * BN + c, {{w.grad + i * PANEL, PANEL, height * PANEL}}, t.dv + (t.j0 + c) * dv_n);
        sum_rows(set_k, width, D, std::max<int64_t>(rows, 0), t.d + i * BN + c, {{w.q + i * PANEL, PANEL, height * PANEL}}, t.dk + (t.j0 + c) * dk_n);
      }}{collect}
    }}{collect_shared}
    return true;
  }}

  // Adds tile^T right to some rows of a gradient, or sets them to it.
  static void sum_rows(bool set, int64_t keys, int64_t width, int64_t rows, const float* tile, Right right, float* to) {{
    if (set) product<false>(keys, width, rows, tile, 1, BN, right, to, width);
    else if (rows > 0) product<true>(keys, width, rows, tile, 1, BN, right, to, width);
  }}

  // Clears what a skipped tile would have set.
  void skip(Tile& t, int64_t r0, int64_t r1, bool set_k, bool set_v) const {{
    for (int64_t r = r0; r < r1 && (set_k || set_v); ++r) {{
      inner(t, r);
      if (set_k) std::fill(t.dk + t.j0 * D, t.dk + t.j1 * D, 0.0f);
      if (set_v) std::fill(t.dv + t.j0 * E, t.dv + t.j1 * E, 0.0f);
    }}
  }}"""

SHARED = """
      if (ranges[b].kind != SKIPPED)
        for (int64_t i = i0; i < i1; ++i) shared(t, i, ranges[b].from, ranges[b].to, bad);"""

EACH_ROW = """
      for (int64_t i = t.i0; i < t.i1; ++i) {{
        const auto [from, to, kind] = ranges[(i - t.i0) / R];
        if (kind != SKIPPED) {call}
      }}"""

DELTA = """
      #pragma omp for schedule(static)
      for (int64_t b = 0; b < outer_size * inner_size; ++b) {
        outer(t, b / inner_size);
        inner(t, b % inner_size);
        for (int64_t i = 0; i < M; ++i)
          delta_memory[b * M + i] = inner_product(t.grad + i * grad_m, grad_e, t.out + i * out_m, out_e, E);
        normalize(t, b % inner_size, top_memory + b * M, norm_memory + b * M, w, bad);
      }"""

RUN = """
  void run() {{
    Bad bad;
    const int64_t outer_size = {outer_size}, inner_size = {inner_size};{prepare}
    // Inner indices are taken some at a time, so that their packed tiles stay in the second-level cache.
    int64_t some = evenly(inner_size, 60000 / (BN * (2 * D + E)));
    while (some > 1 && outer_size * ((inner_size + some - 1) / some) < {threads}) some = (some + 1) / 2;
    const int64_t groups = (inner_size + some - 1) / some;
    const bool by_key = outer_size * groups < 2 * {threads};
    const int64_t tiles = by_key ? (N + BN - 1) / BN : 1, width = by_key ? BN : N;
    const int64_t items = outer_size * groups * tiles, run = std::max<int64_t>(1, items / ({threads} * 32));{fresh}{created}{by_row}
    #pragma omp parallel num_threads({threads}) if (outer_size * inner_size * M * N * (D + E) > {parallel})
    {{
      const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
      Scratch w(some, M, D, E);
      Tile t;{cleared}{pointed}{scratch}{delta}
      #pragma omp barrier
      #pragma omp for schedule(dynamic, run)
      for (int64_t item = 0; item < items; ++item) {{
        const int64_t r0 = item / tiles % groups * some, r1 = std::min(r0 + some, inner_size), from = item % tiles * width;
        outer(t, item / tiles / groups);{wide}
        for (int64_t r = r0; fresh_q && r < r1; ++r) {{
          inner(t, r);
          std::fill(t.dq, t.dq + M * D, 0.0f);
        }}
        for (t.j0 = from; t.j0 < std::min(from + width, N); t.j0 = t.j1) {{
          t.j1 = std::min(t.j0 + BN, N);
          pack(t, r0, r1, w);
          for (t.i0 = 0; t.i0 < M; t.i0 = t.i1) {{
            t.i1 = std::min(t.i0 + BM, M);
            const bool set_k = fresh_k && t.i0 == 0, set_v = fresh_v && t.i0 == 0;
            if (!visit(t, r0, r1, w, set_k, set_v, bad)) skip(t, r0, r1, set_k, set_v);
          }}
        }}
      }}{finished}
    }}
    bad.raise();{totals}
  }}"""
