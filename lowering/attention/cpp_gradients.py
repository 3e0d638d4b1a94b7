"""Gradients of an attention's extras: what a pair adds to them, and how a row of a tile is added up.

A load's gradient lies as the load does, a table's as its reads lay it out (`Line`, `Gather`), to be put in order at the
end. Extras that the inner batch axes share take a pair's sum over the inner indices, once: a scatter costs a load, an
addition and a store a pair, each waiting for the last one to the same place. Four copies of a table take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import sympy

from recompile.lowering.attention.cpp_pairs import line_at
from recompile.lowering.attention.cpp_plan import Gather, Line, Plan
from recompile.lowering.attention.cpp_struct import line_offset, size_of
from recompile.lowering.scalar import symbol
from recompile.lowering.score import S

GRADIENTS = """
// A gradient as floats: the output itself, and a copy for each further thread where several add to one element.
template <typename T> struct Gradient {
  static constexpr int64_t IN_PLACE = std::is_same_v<T, float>;
  T* const out;
  const int64_t size, copies;
  const Floats memory;
  Gradient(T* out, int64_t size, bool owned, int64_t threads)
      : out(out), size(size), copies(owned ? 1 : threads), memory((copies - IN_PLACE) * size) {}
  float* of(int64_t thread) const {
    const int64_t copy = copies == 1 ? 0 : thread;
    if constexpr (IN_PLACE) return copy == 0 ? out : memory + (copy - 1) * size;
    else return memory + copy * size;
  }
  void clear(int64_t thread, int64_t threads) const {
    if (copies > 1) std::fill(of(thread), of(thread) + size, 0.0f);
    else std::fill(of(0) + size * thread / threads, of(0) + size * (thread + 1) / threads, 0.0f);
  }
  void finish(int64_t thread, int64_t threads) const {
    if (IN_PLACE && copies == 1) return;
    for (int64_t k = size * thread / threads; k < size * (thread + 1) / threads; ++k) {
      float sum = of(0)[k];
      for (int64_t c = 1; c < std::min(copies, threads); ++c) sum += of(c)[k];
      out[k] = static_cast<T>(sum);
    }
  }
};

// What the reads of a table add up to, in the order of the reads: a part for each thread.
struct Part {
  const int64_t size;
  const Floats memory;
  Part(int64_t size, int64_t threads) : size(size), memory(size * threads) { std::fill(memory.at, memory + size * threads, 0.0f); }
  float* of(int64_t thread) const { return memory + thread * size; }
  float total(int64_t k, int64_t threads) const {
    float sum = 0;
    for (int64_t c = 0; c < threads; ++c) sum += of(c)[k];
    return sum;
  }
};
constexpr int64_t lanes_of(int64_t entries) { return entries <= 4096 ? 4 : 1; }

inline void add(float* to, const float* from, int64_t n) {
  #pragma omp simd
  for (int64_t k = 0; k < n; ++k) to[k] += from[k];
}
inline float sum(const float* from, int64_t n) {
  float total = 0;
  #pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < n; ++k) total += from[k];
  return total;
}
inline void scatter(float* to, int64_t lanes, const int32_t* slots, const float* from, int64_t n) {
  for (int64_t k = 0; k < n; ++k) to[slots[k] * lanes + (k & (lanes - 1))] += from[k];
}
template <typename T> inline float inner_product(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t n) {
  float total = 0;
  #pragma omp simd reduction(+ : total)
  for (int64_t k = 0; k < n; ++k) total += static_cast<float>(a[k * a_step]) * static_cast<float>(b[k * b_step]);
  return total;
}
"""

Chain = Callable[[sympy.Basic], sympy.Basic]


@dataclass(frozen=True)
class Target:
    """Something that pairs add to: a load, or one read of a table. `tile` holds what a pair adds, either for one inner
    batch index or, if `shared`, summed over them."""

    name: str
    shared: bool
    tile: str


def targets(plan: Plan, wanted: Sequence[str], chains: Sequence[Chain]) -> list[Target]:
    """Where the gradients of the extras `wanted` go; `chains` give a gradient, for each expression that a score can
    have. Targets to which pairs add the same share a tile, be it that of dS ("d")."""
    found: list[Target] = []
    tiles = {(tuple(chain(S) for chain in chains), False): "d"}
    for extra in wanted:
        reads = [read.name for read in plan.reads if read.table == extra]
        for name in reads if extra[0] == "T" else [extra]:
            values = tuple(chain(symbol(name)) for chain in chains)
            shared = plan.inner > 0 and plan.is_shared(symbol(name))
            tile = tiles.setdefault((values, shared), f"e{len(tiles) - 1}")
            found.append(Target(name, shared, tile))
    return found


def tiles_of(found: Sequence[Target]) -> dict[str, Target]:
    """The tiles that there are beside dS, each with a target that it is for."""
    return {target.tile: target for target in found if target.tile != "d"}


def slots_of(plan: Plan, found: Sequence[Target]) -> dict[str, bool]:
    """The gathers whose indices are stored: name -> whether all inner batch indices share them."""
    return {
        t.name: plan.inner > 0 and plan.is_shared(symbol(t.name)) for t in found if t.name in plan.gathers
    }


def fields(plan: Plan, found: Sequence[Target]) -> list[str]:
    """Fields of a tile: where a thread's sums are, and where they are for the batch index at hand."""
    lines = [f"float *d{t.name}_all, *d{t.name};" for t in found]
    lines += [f"float* {tile};" for tile in tiles_of(found)]
    return lines + [f"int32_t* {name}_slots;" for name in slots_of(plan, found)]


def pointers(plan: Plan, found: Sequence[Target]) -> list[str]:
    """Sets them to a batch index."""
    lines = []
    for t in found:
        if t.name in plan.loads:
            axes = sorted(plan.loads[t.name].axes)
            at = "".join(f" + at[{a}] * d{t.name}_{a}" for a in axes)
        else:
            at = f" + {line_offset(sorted(_read(plan, t.name).axes))} * {_length(plan, t.name)}"
        lines.append(f"t.d{t.name} = t.d{t.name}_all{at};")
    return lines


def collecting(plan: Plan, found: Sequence[Target]) -> str:
    """The functions that add up columns `from` to `end` of a row: after each inner index, and after all."""
    written = ""
    for shared, name in ((False, "collect"), (True, "collect_shared")):
        lines = [_collected(plan, t) for t in found if t.shared == shared]
        if lines:
            newline = "\n    "
            written += f"""
  void {name}(const Tile& t, int64_t row, int64_t from, int64_t end) const {{
    const int64_t at = (row - t.i0) * BN + from;
    {newline.join(lines)}
  }}"""
    return written


def _collected(plan: Plan, target: Target) -> str:
    name, values = target.name, f"t.{target.tile} + at"
    to = f"t.d{name}"
    if name in plan.lines:
        return f"add({to} + {line_at(plan.lines[name])} + from, {values}, end - from);"
    if name in plan.gathers:
        lanes = f"lanes_of({plan.gathers[name].table}_size)"
        return f"scatter({to}, {lanes}, t.{name}_slots + at, {values}, end - from);"
    place = f"d{name}"
    return {
        "pair": f"add({to} + row * {place}_m + t.j0 + from, {values}, end - from);",
        "column": f"add({to} + t.j0 + from, {values}, end - from);",
        "row": f"{to}[row * {place}_m] += sum({values}, end - from);",
        "batch": f"*{to} += sum({values}, end - from);",
    }[plan.loads[name].where]


def parts(plan: Plan, found: Sequence[Target], threads: int) -> str:
    """Declares the sums of the tables' reads."""
    lines = ""
    for t in found:
        if t.name not in plan.loads:
            size = f"{size_of(sorted(_read(plan, t.name).axes))} * {_length(plan, t.name)}"
            lines += f"\n    const Part d{t.name}_part({size}, {threads});"
    return lines


def table_totals(plan: Plan, found: Sequence[Target], wanted: Sequence[str], threads: int) -> str:
    """Adds up the gradient of each table from those of its reads."""
    text = ""
    for table in [name for name in wanted if name[0] == "T"]:
        operand = plan.extras[table]
        axes = [a for a in range(plan.rank) if operand.sizes[a] != "1"]
        size = f"{size_of(axes)} * {table}_size"
        inside = "".join(_total(plan, t.name, threads) for t in found if t.name.split("_")[0] == table)
        text += f"""
    Floats d{table}_sum({size});
    std::fill(d{table}_sum.at, d{table}_sum + {size}, 0.0f);
    for (int64_t b = 0; b < {size_of(axes)}; ++b) {{
      float* const to = d{table}_sum + b * {table}_size;{inside}
    }}
    write(d{table}_sum.at, {size}, d{table}, 1);"""
    return text


def _total(plan: Plan, name: str, threads: int) -> str:
    read = _read(plan, name)
    if isinstance(read, Gather):
        lanes = f"lanes_of({read.table}_size)"
        return f"""
      for (int64_t k = 0; k < {read.table}_size * {lanes}; ++k)
        to[k / {lanes}] += d{name}_part.total(b * {read.table}_size * {lanes} + k, {threads});"""
    index = f"{name}_low() + k" if read.b > 0 else f"{name}_low() + {name}_length() - 1 - k"
    return f"""
      for (int64_t k = 0; k < {name}_length(); ++k) {{
        const int64_t index = {index};
        to[index < 0 ? index + {read.table}_size : index] += d{name}_part.total(b * {name}_stride() + k, {threads});
      }}"""


def _read(plan: Plan, name: str) -> Line | Gather:
    return plan.lines[name] if name in plan.lines else plan.gathers[name]


def _length(plan: Plan, name: str) -> str:
    read = _read(plan, name)
    if isinstance(read, Line):
        return f"{name}_stride()"
    return f"{read.table}_size * lanes_of({read.table}_size)"
