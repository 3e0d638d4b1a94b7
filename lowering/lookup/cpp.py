"""C++ for a group of lookups on the CPU: one function a class of bags, tables of pointers, one parallel loop.

Bags that differ only in their pointers and strides form a class and share a function, so the text grows with the
number of classes, not of tables. Work is cut into (bag, run of samples): a thread stays with one table for as long as
it can, which keeps the address translations of large tables warm. A row is fetched a few samples ahead.
Ids are checked before a row's address is formed; the first bad one is thrown after the parallel loop.
"""

from collections import defaultdict
from collections.abc import Sequence

from recompile.lowering.lookup.cpp_common import (
    HELPERS,
    LANES,
    Operand,
    Shape,
    bag_fields,
    bag_values,
    count,
    describe,
    expression,
    loads,
    positions,
    row,
    shape_of,
    skip,
)
from recompile.lowering.lookup.cpp_outputs import find_places, second_phase
from recompile.lowering.lookup.spec import Lookup

# Below this many bytes of rows one thread is faster than starting two (about 5 us, two cores of a 2.6 GHz Xeon).
PARALLEL_BYTES = 1 << 16
# Samples in one unit of work.
RUN = 256


# Running values of one bag, in registers: a plain array of them would live in memory (gcc 12: 2.4 times slower at
# width 64). The width is cut into powers of two up to 16.
VALUES = """
template <typename A, int D> struct Values {
  static constexpr int N = D >= 16 ? 16 : D >= 8 ? 8 : D >= 4 ? 4 : D >= 2 ? 2 : 1;
  typename Lanes<A, N>::type lanes{};
  Values<A, D - N> rest;
  template <typename T> void add(const T* r) { lanes += read<A, N>(r); rest.add(r + N); }
  template <typename T> void add(const T* r, A weight) { lanes += read<A, N>(r) * weight; rest.add(r + N, weight); }
  template <typename T> void add_square(const T* r) {
    const auto other = read<A, N>(r);
    lanes += other * other;
    rest.add_square(r + N);
  }
  template <typename T> void set(const T* r) { lanes = read<A, N>(r); rest.set(r + N); }
  template <typename T> void raise(const T* r) {
    const auto other = read<A, N>(r);
    lanes = other > lanes ? other : lanes;
    rest.raise(r + N);
  }
  template <typename T> void write(T* out) const {
    store<A, N>(lanes, out);
    rest.write(out + N);
  }
  template <typename T> void write(T* out, A divisor) const {
    store<A, N>(lanes / divisor, out);
    rest.write(out + N, divisor);
  }
};
template <typename A> struct Values<A, 0> {
  template <typename T> void add(const T*) {}
  template <typename T> void add(const T*, A) {}
  template <typename T> void add_square(const T*) {}
  template <typename T> void set(const T*) {}
  template <typename T> void raise(const T*) {}
  template <typename T> void write(T*) const {}
  template <typename T> void write(T*, A) const {}
};
"""


def _forward(name: str, shape: Shape) -> str:
    """The function that computes the bags of one class for samples `begin` to `end`."""
    body = _one_row(shape) if shape.single else _loop(shape)
    return f"""
struct {name}_bag {{ {"; ".join(bag_fields(shape))}; {shape.out}* out; int64_t out_stride; }};
// {describe(shape)}
void {name}(const {name}_bag& bag, int64_t begin, int64_t end, Bad& bad) {{
  {_ahead(shape)}
  for (int64_t b = begin; b < end; ++b) {{
    {shape.out}* out = bag.out + b * bag.out_stride;
    {body}
  }}
}}
"""


def _one_row(shape: Shape) -> str:
    """One id a sample: a copy, without loops."""
    return f"""[[maybe_unused]] constexpr int64_t l = 0, L = 1;
    if (const int64_t ahead = b + bag_ahead; ahead < end) {{
      {loads(shape, "ahead")}
      {_fetch(shape)}
    }}
    {loads(shape)}
    {row(shape)}
    for (int64_t d = 0; d < {shape.dim}; ++d) out[d] = {shape.out}(r[d]);"""


def _loop(shape: Shape) -> str:
    dim, acc, pooling = shape.dim, shape.acc, shape.bag.pooling
    weight = f", {acc}({expression(shape.bag.weight)})" if shape.bag.weight else ""
    step = {
        "none": f"for (int64_t d = 0; d < {dim}; ++d) out[l * {dim} + d] = {shape.out}(r[d]);",
        "sum": f"value.add(r{weight});",
        "max": "if (any) value.raise(r); else value.set(r);\n      any = true;",
    }[pooling]
    divisor = f", {acc}({expression(shape.bag.divisor)})" if shape.bag.divisor else ""
    start = "" if pooling == "none" else f"Values<{acc}, {dim}> value;"
    start += " bool any = false;" if pooling == "max" else ""
    return f"""{positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;{_prefetch(shape)}
    {start}
    [[maybe_unused]] {acc} count = 0;
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      {row(shape)}
      {step}
      {count(shape)}
    }}
    {"" if pooling == "none" else f"value.write(out{divisor});"}"""


def _prefetch(shape: Shape) -> str:
    """Fetches the rows of a sample a little ahead."""
    bounds = "const int64_t from = 0, to = bag.length;"
    if shape.offsets:
        bounds = (
            "const int64_t from = std::max<int64_t>(bag.offsets[ahead], 0);\n      "
            "const int64_t to = ahead + 1 < bag.bounds ? std::min<int64_t>(bag.offsets[ahead + 1], bag.ids) : bag.ids;"
        )
    return f"""
    if (const int64_t ahead = b + bag_ahead; ahead < end) {{
      {bounds}
      for (int64_t l = from; l < to; ++l) {{
        {loads(shape, "ahead")}
        {skip(shape)}
        {_fetch(shape)}
      }}
    }}"""


def _fetch(shape: Shape) -> str:
    """Asks for the row of the ids just loaded; a wrong id is harmless to a prefetch."""
    size = {"float": 4, "double": 8}.get(shape.table, 2)
    lines = range(0, min(shape.dim * size, 512), 64)
    at = f"const auto at = reinterpret_cast<uintptr_t>(bag.table) + uintptr_t(int64_t({expression(shape.bag.row)}) * bag.row_stride) * {size};"
    return at + " " + " ".join(f"__builtin_prefetch(reinterpret_cast<const void*>(at + {k}));" for k in lines)


def _ahead(shape: Shape) -> str:
    """How many samples ahead rows are fetched: about 16 rows, as far as a core has requests in flight."""
    length = (
        "std::max<int64_t>(bag.ids / std::max<int64_t>(bag.bounds, 1), 1)" if shape.offsets else "bag.length"
    )
    return f"const int64_t bag_ahead = std::max<int64_t>(1, 16 / std::max<int64_t>({length}, 1));"


def forward(
    spec: Lookup,
    weights: Sequence[Operand],
    sources: Sequence[Operand],
    outs: Sequence[Operand],
    batch: str,
    threads: int,
) -> tuple[str, str]:
    """(functions, body of the kernel) that compute `outs`, each contiguous `[batch, width]`."""
    places, scratch = find_places(spec, weights, sources, outs)
    classes: dict[Shape, list[int]] = defaultdict(list)
    for j, bag in enumerate(spec.bags):
        classes[shape_of(bag, spec, weights[bag.table], sources, places[j].ctype)].append(j)
    functions, tables, loops, row_bytes = [], [], [], []
    for c, (shape, members) in enumerate(classes.items()):
        functions.append(_forward(f"class{c}", shape))
        bags = [(spec.bags[j], weights[spec.bags[j].table], places[j]) for j in members]
        rows = [
            ", ".join([*bag_values(j, bag, table, sources), place.pointer, place.stride])
            for j, (bag, table, place) in zip(members, bags, strict=True)
        ]
        listed = ",\n    ".join("{" + r + "}" for r in rows)
        tables.append(f"const class{c}_bag bags{c}[] = {{\n    {listed}}};")
        loops.append(_class_loop(c, len(members)))
        row = f"{len(members)} * {shape.dim} * int64_t(sizeof({shape.table}))"
        row_bytes.append(f"{row} * {_length(spec, members, sources)}")
    pieces, second = second_phase(spec, sources, outs, places)
    newline = "\n  "
    body = f"""
  const int64_t B = {batch};
  {scratch}
  {newline.join([*tables, *pieces])}
  Bad bad;
  const bool parallel = B * ({" + ".join(row_bytes)}) > {PARALLEL_BYTES};
  const int64_t runs = (B + {RUN} - 1) / {RUN};
  #pragma omp parallel num_threads({threads}) if (parallel)
  {{{"".join(loops)}{second}
  }}
  {_throw(spec)}"""
    return f"constexpr int64_t BAGS = {len(spec.bags)};\n{HELPERS}{LANES}{VALUES}" + "".join(functions), body


def _class_loop(c: int, bags: int) -> str:
    """Each class is shared out by itself: its bags cost about the same."""
    return f"""
    #pragma omp for schedule(static) nowait
    for (int64_t work = 0; work < {bags} * runs; ++work) {{
      const int64_t begin = work % runs * {RUN};
      class{c}(bags{c}[work / runs], begin, std::min<int64_t>(begin + {RUN}, B), bad);
    }}"""


def _length(spec: Lookup, members: list[int], sources: Sequence[Operand]) -> str:
    bag = spec.bags[members[0]]
    return "4" if bag.offsets >= 0 else f"int64_t({sources[bag.loads[0]].size(1)})"


def _throw(spec: Lookup) -> str:
    names = ", ".join('"' + spec.tables[bag.table].name.replace('"', "'") + '"' for bag in spec.bags)
    return f"""if (const int64_t j = bad.bag; j >= 0) {{
    static const char* const names[] = {{{names}}};
    const std::string id = std::to_string(bad.id), limit = std::to_string(bad.limit);
    if (j < BAGS)
      throw std::runtime_error("recompile: index out of range: table '" + std::string(names[j]) + "' has " + limit +
                               " rows, got id " + id);
    throw std::runtime_error("recompile: bad offsets for table '" + std::string(names[j - BAGS]) +
                             "': expected them to start at 0, not to decrease and to stay within " + limit +
                             " ids, got " + id);
  }}"""
