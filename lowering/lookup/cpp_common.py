"""What the C++ of forward and backward has in common: operands, classes of bags, and the words of a bag's loop."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from recompile.lowering import scalar
from recompile.lowering.lookup.spec import Bag, Lookup

HELPERS = """
template <typename A, typename B> inline auto recompile_mod(A a, B b) { auto m = a % b; return m < 0 ? m + b : m; }
template <typename A, typename B> inline auto recompile_floordiv(A a, B b) { return a / b - (a % b < 0); }
template <typename A, typename B> inline auto recompile_max(A a, B b) { return a > b ? a : b; }
template <typename A, typename B> inline auto recompile_min(A a, B b) { return a < b ? a : b; }
// The first id out of range, or offset out of order, that any thread met.
struct Bad {
  std::atomic<int64_t> bag{-1};
  int64_t id = 0, limit = 0;
  __attribute__((noinline, cold)) void report(int64_t which, int64_t value, int64_t bound) {
    int64_t none = -1;
    if (bag.compare_exchange_strong(none, which)) { id = value; limit = bound; }
  }
};
"""

# Vectors spelled out: Inductor compiles with -fno-tree-loop-vectorize. They are as wide as a register: gcc 12 keeps
# wider ones in memory (26 bags of 20, width 16, batch 512, AVX2: 1.9 ms against 0.6 ms).
LANES = """
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
// How many of D columns a register holds: a power of two, at most MOST.
template <typename A> constexpr int lanes_of(int D, int MOST = 16) {
  int n = REGISTER / int(sizeof(A));
  while (n > D || n > MOST) n /= 2;
  return n;
}
template <typename A, int N> struct Lanes { typedef A type __attribute__((vector_size(N * sizeof(A)))); };
template <typename A, int N, typename T> inline typename Lanes<A, N>::type read(const T* r) {
  typename Lanes<A, N>::type lanes;
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(&lanes, r, sizeof lanes);
  } else {
    for (int n = 0; n < N; ++n) lanes[n] = static_cast<A>(r[n]);
  }
  return lanes;
}
template <typename A, int N, typename T> inline void store(typename Lanes<A, N>::type lanes, T* out) {
  if constexpr (std::is_same_v<A, T>) {
    std::memcpy(out, &lanes, sizeof lanes);
  } else {
    for (int n = 0; n < N; ++n) out[n] = static_cast<T>(lanes[n]);
  }
}
"""


@dataclass(frozen=True)
class Operand:
    """A tensor as the kernel sees it: C++ expressions for its first element, sizes and strides."""

    pointer: str
    ctype: str
    sizes: tuple[str, ...]
    strides: tuple[str, ...]

    def stride(self, dim: int) -> str:
        """Elements from one index of `dim` to the next; 0 where the tensor is broadcast or has no such dim."""
        return "0" if dim >= len(self.strides) or self.sizes[dim] == "1" else self.strides[dim]

    def size(self, dim: int) -> str:
        return self.sizes[dim] if dim < len(self.sizes) else "1"


@dataclass(frozen=True)
class Shape:
    """What the bags of one class have in common: all that the text of their function depends on."""

    dim: int
    table: str
    out: str
    loads: tuple[str, ...]
    bag: Bag  # with table, loads, offsets and frozen_row blanked
    offsets: str = ""
    into: tuple[str, ...] = ()  # backward: how the bag's gradient is gathered, one entry an output
    writes: str = ""  # backward: "rows", "weights" or both
    single: bool = False  # one id a sample, its row copied as it is

    @property
    def acc(self) -> str:
        return "double" if self.table == "double" else "float"


def shape_of(bag: Bag, spec: Lookup, table: Operand, sources: Sequence[Operand], out: str) -> Shape:
    """The class that a bag belongs to."""
    return Shape(
        dim=spec.tables[bag.table].dim,
        table=table.ctype,
        out=out,
        loads=tuple(sources[s].ctype for s in bag.loads),
        bag=replace(bag, table=0, loads=(), offsets=-1, include_last_offset=False, frozen_row=-1),
        offsets=sources[bag.offsets].ctype if bag.offsets >= 0 else "",
        single=bag.pooling == "none" and bag.offsets < 0 and sources[bag.loads[0]].size(1) == "1",
    )


# What one bag gives to its class's function: name -> (C++ type, value).
Member = dict[str, tuple[str, str]]


def member(j: int, bag: Bag, table: Operand, sources: Sequence[Operand]) -> Member:
    """What bag `j` reads. The place of (sample b, position p) in load k is `b * xk_b + p * xk_l`."""
    values = {
        "table": (f"const {table.ctype}*", table.pointer),
        "rows": ("int64_t", table.size(0)),
        "row_stride": ("int64_t", table.strides[0]),
        "index": ("int64_t", str(j)),
    }
    for k, s in enumerate(bag.loads):
        x = sources[s]
        # With offsets a source is one value an id: p counts through all samples.
        by_sample, by_position = ("0", x.stride(0)) if bag.offsets >= 0 else (x.stride(0), x.stride(1))
        values[f"x{k}_at"] = (f"const {x.ctype}*", x.pointer)
        values |= {f"x{k}_b": ("int64_t", by_sample), f"x{k}_l": ("int64_t", by_position)}
    if bag.offsets < 0:
        return values | {"length": ("int64_t", sources[bag.loads[0]].size(1))}
    x = sources[bag.offsets]
    values["offsets"] = (f"const {x.ctype}*", x.pointer)
    values |= {"offsets_b": ("int64_t", x.stride(0)), "bounds": ("int64_t", x.size(0))}
    return values | {"ids": ("int64_t", sources[bag.loads[0]].size(0))}


def described(name: str, members: Sequence[Member]) -> tuple[str, str, str]:
    """(struct, start of its class's function, initialized array) for the bags of a class.

    The function's first lines declare everything by its name: numbers that all bags share as constants, the rest as
    read from `bag`.
    """
    first = members[0]
    shared = [k for k, (_, v) in first.items() if v.isdigit() and all(m[k][1] == v for m in members)]
    own = [k for k in first if k not in shared]
    struct = f"struct {name}_bag {{ {' '.join(f'{first[k][0]} {k};' for k in own)} }};"
    constants = ", ".join(f"{k} = {first[k][1]}" for k in shared)
    lines = [f"[[maybe_unused]] constexpr int64_t {constants};"] if shared else []
    lines += [f"[[maybe_unused]] {first[k][0]} const {k} = bag.{k};" for k in own]
    entries = ",\n    ".join("{" + ", ".join(m[k][1] for k in own) + "}" for m in members)
    array = f"const {name}_bag {name}_bags[] = {{\n    {entries}}};"
    return struct, "\n  ".join(lines), array


def positions(shape: Shape) -> str:
    """Declares `first`, `last` for sample `b`."""
    if not shape.offsets:
        return "const int64_t first = 0, last = length;"
    return (
        "int64_t first = offsets[b * offsets_b];\n"
        "    int64_t last = b + 1 < bounds ? int64_t(offsets[(b + 1) * offsets_b]) : ids;\n"
        "    if (first < 0 || last < first || last > ids || (b == 0 && first != 0)) [[unlikely]] {\n"
        "      bad.report(index + BAGS, b == 0 ? first : last, ids);\n"
        "      first = last = 0;\n"
        "    }"
    )


def loads(shape: Shape, sample: str = "b", position: str = "p") -> str:
    """Declares x0, x1, ... of a position: integers as int64_t, the rest in float or double; and `l`."""
    lines = [f"[[maybe_unused]] const int64_t l = {position} - first;"]
    for k, ctype in enumerate(shape.loads):
        real = ctype if ctype == "double" else "float"
        kind = real if ctype in ("float", "double", "at::Half", "at::BFloat16") else "int64_t"
        lines.append(f"const {kind} x{k} = x{k}_at[{sample} * x{k}_b + {position} * x{k}_l];")
    return "\n      ".join(lines)


def expression(text: str) -> str:
    return scalar.to_cpp(scalar.parse(text))


def skip(shape: Shape) -> str:
    return "" if shape.bag.keep == "true" else f"if (!{expression(shape.bag.keep)}) continue;"


def row(shape: Shape) -> str:
    """Declares `row`, checked, and `r`, its first element."""
    return f"""const int64_t row = {expression(shape.bag.row)};
      if (uint64_t(row) >= uint64_t(rows)) [[unlikely]] {{ bad.report(index, row, rows); continue; }}
      const {shape.table}* r = table + row * row_stride;"""


def count(shape: Shape) -> str:
    """Adds the row just read to `count`."""
    if "count" not in shape.bag.divisor:
        return ""
    each = shape.bag.count or "1"
    total = ""
    if "nonzero" in each:
        total = (
            f"{shape.acc} total = 0; for (int64_t d = 0; d < {shape.dim}; ++d) total += {shape.acc}(r[d]);"
        )
        total += f" const {shape.acc} nonzero = total != 0;"
    return f"{total} count += {shape.acc}({expression(each)});"


def describe(shape: Shape) -> str:
    """One line about a class, for the reader of a kernel."""
    where = "" if shape.bag.keep == "true" else f" where {shape.bag.keep}"
    over = f" / ({shape.bag.divisor})" if shape.bag.divisor else ""
    kind = {"none": "rows", "sum": "sum of rows", "max": "max of rows"}[shape.bag.pooling]
    ids = f"ids {shape.loads[0]}" + (" with offsets" if shape.offsets else "")
    return f"{kind}{where}{over}: {shape.table}[{shape.dim}] tables, {ids}, row = {shape.bag.row}"


def width(bag: Bag, spec: Lookup, sources: Sequence[Operand]) -> str:
    """Columns that a bag takes."""
    dim = spec.tables[bag.table].dim
    return times(dim, sources[bag.loads[0]].size(1)) if bag.pooling == "none" else str(dim)


def part_width(part: int, spec: Lookup, sources: Sequence[Operand]) -> str:
    return width(spec.bags[part], spec, sources) if part >= 0 else sources[~part].size(1)


def times(number: int, size: str) -> str:
    """A product of C++ expressions, as a number where it is known."""
    return str(number * int(size)) if size.isdigit() else f"{number} * {size}"


def plus(a: str, b: str) -> str:
    """A sum of C++ expressions, as a number where it is known."""
    if a.isdigit() and b.isdigit():
        return str(int(a) + int(b))
    return b if a == "0" else f"{a} + {b}"
