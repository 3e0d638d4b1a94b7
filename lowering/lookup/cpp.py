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
    count,
    describe,
    described,
    expression,
    loads,
    member,
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
# How many rows ahead of its use a row is fetched. 26 bags of 20 over 1M rows, width 16, batch 512, two cores of an AMD
# EPYC with AVX2: 3.8 ms without, 3.2 ms at 8, 2.3 ms at 16, 2.0 ms from 24 on.
AHEAD = 32

# Running values of one bag, in registers: a plain array of them would live in memory (gcc 12: 2.4 times slower at
# width 64). The width is cut into powers of two up to a register's.
VALUES = """
template <typename A, int D> struct Values {
  static constexpr int N = lanes_of<A>(D);
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
    lanes = (other > lanes) | (other != other) ? other : lanes;  // NaN stays
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


def _forward(name: str, shape: Shape, declarations: str) -> str:
    """The function that computes the bags of one class for samples `begin` to `end`."""
    return f"""// {describe(shape)}
void {name}(const {name}_bag& bag, int64_t begin, int64_t end, Bad& bad) {{
  {declarations}
  for (int64_t b = begin; b < end; ++b) {{
    {shape.out}* const to = out + b * out_stride;
    {_one_row(shape) if shape.single else _loop(shape)}
  }}
}}
"""


def _one_row(shape: Shape) -> str:
    """One id a sample: a copy, without loops."""
    return f"""constexpr int64_t p = 0, first = 0;
    {{
      const int64_t ahead = std::min<int64_t>(b + {AHEAD}, end - 1);
      {loads(shape, sample="ahead")}
      {_fetch(shape)}
    }}
    {loads(shape)}
    {row(shape)}
    {_copy(shape, "to")}"""


def _loop(shape: Shape) -> str:
    acc, pooling = shape.acc, shape.bag.pooling
    weight = f", {acc}({expression(shape.bag.weight)})" if shape.bag.weight else ""
    step = {
        "none": _copy(shape, f"to + p * {shape.dim}"),
        "sum": f"value.add(r{weight});",
        "max": "if (any) value.raise(r); else value.set(r);\n      any = true;",
    }[pooling]
    divisor = f", {acc}({expression(shape.bag.divisor)})" if shape.bag.divisor else ""
    start = "" if pooling == "none" else f"Values<{acc}, {shape.dim}> value;"
    start += " bool any = false;" if pooling == "max" else ""
    empty = shape.bag.empty if shape.bag.empty != "-inf" else f"-std::numeric_limits<{acc}>::infinity()"
    end = f"value.write(to{divisor});"
    if pooling == "max" and float(shape.bag.empty):
        end = f"if (any) {end} else std::fill(to, to + {shape.dim}, {shape.out}({empty}));"
    return f"""{positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;
    {_ahead(shape)}
    {start}
    [[maybe_unused]] {acc} count = 0;
    for (int64_t p = first; p < last; ++p) {{
      {{
        {_position_ahead(shape)}
        {_fetch(shape)}
      }}
      {loads(shape)}
      {skip(shape)}
      {row(shape)}
      {step}
      {count(shape)}
    }}
    {"" if pooling == "none" else end}"""


def _copy(shape: Shape, to: str) -> str:
    """Writes a row as it is."""
    if shape.table == shape.out:
        return f"std::memcpy({to}, r, {shape.dim} * sizeof *r);"
    return f"for (int64_t d = 0; d < {shape.dim}; ++d) ({to})[d] = {shape.out}(r[d]);"


def _ahead(shape: Shape) -> str:
    """Declares the sample whose rows are fetched while those of sample `b` are added up, without offsets."""
    if shape.offsets:
        return ""
    return f"const int64_t ahead = std::min<int64_t>(b + 1 + {AHEAD - 1} / std::max<int64_t>(L, 1), end - 1);"


def _position_ahead(shape: Shape) -> str:
    """Declares what a later position loads: the same one of a later sample, or with offsets a later id."""
    if not shape.offsets:
        return loads(shape, sample="ahead")
    return f"const int64_t ahead = std::min<int64_t>(p + {AHEAD}, ids - 1);\n        {loads(shape, position='ahead')}"


def _fetch(shape: Shape) -> str:
    """Asks for the row of the ids just loaded; a wrong id is harmless to a prefetch."""
    size = shape.dim * {"float": 4, "double": 8}.get(shape.table, 2)
    lines = [*range(0, min(size, 512), 64)] + ([size - 1] if 64 % size and size % 64 else [])
    which = expression(shape.bag.row)
    if shape.bag.keep != "true":  # a branch would be mispredicted as often as that of the position itself
        which = f"{expression(shape.bag.keep)} ? int64_t({which}) : 0"
    return (
        f"const auto at = reinterpret_cast<uintptr_t>(table) + uintptr_t(({which}) * row_stride) * sizeof *table;\n"
        "        " + " ".join(f"__builtin_prefetch(reinterpret_cast<const void*>(at + {k}));" for k in lines)
    )


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
    for c, (shape, bags) in enumerate(classes.items()):
        name = f"class{c}"
        members = [
            member(j, spec.bags[j], weights[spec.bags[j].table], sources)
            | {"out": (f"{places[j].ctype}*", places[j].pointer), "out_stride": ("int64_t", places[j].stride)}
            for j in bags
        ]
        struct, declarations, array = described(name, members)
        functions.append(f"\n{struct}\n{_forward(name, shape, declarations)}")
        tables.append(array)
        loops.append(_class_loop(name, len(bags)))
        row = f"{len(bags)} * {shape.dim} * int64_t(sizeof({shape.table}))"
        row_bytes.append(f"{row} * {_length(spec, bags, sources)}")
    pieces, second = second_phase(spec, sources, outs, places)
    newline = "\n  "
    body = f"""
  const int64_t B = {batch};
  {scratch}
  {newline.join([*tables, *pieces])}
  const auto run = [&] {{
    Bad bad;
    const bool parallel = B * ({" + ".join(row_bytes)}) > {PARALLEL_BYTES};
    const int64_t runs = (B + {RUN} - 1) / {RUN};
    #pragma omp parallel num_threads({threads}) if (parallel)
    {{{"".join(loops)}{second}
    }}
    {_throw(spec)}
  }};
  run();"""
    return f"constexpr int64_t BAGS = {len(spec.bags)};\n{HELPERS}{LANES}{VALUES}" + "".join(functions), body


def _class_loop(name: str, bags: int) -> str:
    """Each class is shared out by itself: its bags cost about the same."""
    return f"""
    #pragma omp for schedule(static) nowait
    for (int64_t work = 0; work < {bags} * runs; ++work) {{
      const int64_t begin = work % runs * {RUN};
      {name}({name}_bags[work / runs], begin, std::min<int64_t>(begin + {RUN}, B), bad);
    }}"""


def _length(spec: Lookup, bags: list[int], sources: Sequence[Operand]) -> str:
    bag = spec.bags[bags[0]]
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
