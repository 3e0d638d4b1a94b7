"""Which pairs are kept, by cells of some rows and keys: for conditions that a tile's corners do not decide.

A mask that is a tensor ([N, N] of a buffer, or one for each sample), or a comparison that is not linear, is evaluated for
all pairs before the kernel's own loops, once for what shares it: a byte a cell says whether any pair of it is kept, and
whether all are. So tiles are skipped whatever a mask holds, at the cost of one more reading of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from recompile.lowering.attention.cpp_pairs import pointer
from recompile.lowering.attention.cpp_plan import Load, Plan
from recompile.lowering.attention.cpp_struct import decode, size_of
from recompile.lowering.score_cpp import statements

# Below so many evaluations one thread is faster than starting two.
PARALLEL = 1 << 16


def cells(plan: Plan, conditions: Sequence[sympy.Basic], threads: int) -> tuple[str, str]:
    """(members, statements of `run`) that fill the cells of each condition."""
    if not conditions:
        return "", ""
    members = "".join(f"\n  const uint8_t* cells{k}_all = nullptr;" for k in range(len(conditions)))
    return members + _MEMBERS, "".join(_fill(plan, k, e, threads) for k, e in enumerate(conditions))


def _fill(plan: Plan, k: int, expr: sympy.Basic, threads: int) -> str:
    axes = sorted(plan.depends(expr)[0])
    loads = [plan.loads[s.name] for s in sorted(expr.free_symbols, key=str) if s.name in plan.loads]
    of = {
        where: [load for load in loads if load.where == where] for where in ("batch", "row", "column", "pair")
    }
    written, (kept,) = statements([expr], plan.types)
    inside = [
        *(_value(load, "column") for load in of["column"]),
        *(_value(load, "pair") for load in of["pair"]),
    ]
    ends = "".join(f"\n      const {x.operand.ctype}* const {x.name}_from = {_from(x)};" for x in loads)
    batch = "".join(f"\n      {_value(load, 'batch')}" for load in of["batch"])
    rows = "".join(f"\n          {_value(load, 'row')}" for load in of["row"])
    return f"""
    Memory<uint8_t> cells{k}_memory({size_of(axes)} * cell_count());
    cells{k}_all = cells{k}_memory;
    #pragma omp parallel for num_threads({threads}) if ({size_of(axes)} * M * N > {PARALLEL})
    for (int64_t x = 0; x < {size_of(axes)} * cell_rows(); ++x) {{
      [[maybe_unused]] int64_t at[{max(plan.rank, 1)}];
      {decode(axes, "x / cell_rows()")}
      const int64_t i0 = x % cell_rows() * R, i1 = std::min(i0 + R, M);{ends}{batch}
      for (int64_t c = 0; c < cell_columns(); ++c) {{
        const int64_t j0 = c * PANEL, j1 = std::min(j0 + PANEL, N);
        int32_t any = 0, all = 1;
        for (int32_t i = int32_t(i0); i < int32_t(i1); ++i) {{{rows}
          #pragma omp simd reduction(| : any) reduction(& : all)
          for (int32_t j = int32_t(j0); j < int32_t(j1); ++j) {{
            {" ".join([*inside, *written])} const int32_t kept = {kept};
            any |= kept, all &= kept;
          }}
        }}
        cells{k}_memory[x * cell_columns() + c] = uint8_t(any | all << 1);
      }}
    }}"""


def _from(load: Load) -> str:
    return pointer(load.operand, load.name, sorted(load.axes))


def _value(load: Load, where: str) -> str:
    name = load.name
    place = {
        "batch": "0",
        "row": f"i * {name}_m",
        "column": f"j * {name}_n",
        "pair": f"i * {name}_m + j * {name}_n",
    }
    return f"const {load.ctype} {name} = static_cast<{load.ctype}>({name}_from[{place[where]}]);"


_MEMBERS = """
  int64_t cell_rows() const { return (M + R - 1) / R; }
  int64_t cell_columns() const { return (N + PANEL - 1) / PANEL; }
  int64_t cell_count() const { return cell_rows() * cell_columns(); }
  // Whether any pair, or all pairs, of rows i0 to i1 and keys j0 to j1 are kept: those of whole cells around them.
  bool any_cells(const uint8_t* cells, int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    for (int64_t r = i0 / R; r <= i1 / R; ++r)
      for (int64_t c = j0 / PANEL; c <= j1 / PANEL; ++c)
        if (cells[r * cell_columns() + c] & 1) return true;
    return false;
  }
  bool all_cells(const uint8_t* cells, int64_t i0, int64_t i1, int64_t j0, int64_t j1) const {
    for (int64_t r = i0 / R; r <= i1 / R; ++r)
      for (int64_t c = j0 / PANEL; c <= j1 / PANEL; ++c)
        if (!(cells[r * cell_columns() + c] & 2)) return false;
    return true;
  }
  // The keys before and after which rows i0 to i1 keep none.
  int64_t first_cell(const uint8_t* cells, int64_t i0, int64_t i1) const {
    int64_t c = 0;
    while (c < cell_columns() && !any_cells(cells, i0, i1, c * PANEL, c * PANEL)) ++c;
    return c * PANEL;
  }
  int64_t end_cell(const uint8_t* cells, int64_t i0, int64_t i1) const {
    int64_t c = cell_columns();
    while (c > 0 && !any_cells(cells, i0, i1, c * PANEL - 1, c * PANEL - 1)) --c;
    return c * PANEL;
  }"""
