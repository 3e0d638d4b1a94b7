"""C++ for a group of lookups on the CPU: one function a class of bags, tables of pointers, one parallel loop.

Bags that differ only in their pointers and strides form a class and share a function, so the text grows with the
number of classes, not of tables. Work is cut into (bag, run of samples): a thread stays with one table for as long as
it can, which keeps the address translations of large tables warm. A row is fetched a few samples ahead.
Ids are checked before a row's address is formed; the first bad one is thrown after the parallel loop.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from recompile.lowering.lookup.cpp_common import (
    HELPERS,
    Operand,
    Shape,
    bag_fields,
    bag_values,
    count,
    describe,
    expression,
    loads,
    part_width,
    positions,
    row,
    shape_of,
    skip,
    width,
)
from recompile.lowering.lookup.spec import Lookup

# Below this many bytes of rows one thread is faster than starting two (about 5 us, two cores of a 2.6 GHz Xeon).
PARALLEL_BYTES = 1 << 16
# Samples in one unit of work.
RUN = 256


# Running values of one bag, in registers: a plain array of them would live in memory (gcc 12: 2.4 times slower at
# width 64). The width is cut into powers of two up to 16.
VALUES = """
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
template <typename A, int D> struct Values {
  static constexpr int N = D >= 16 ? 16 : D >= 8 ? 8 : D >= 4 ? 4 : D >= 2 ? 2 : 1;
  typename Lanes<A, N>::type lanes{};
  Values<A, D - N> rest;
  template <typename T> void add(const T* r) { lanes += read<A, N>(r); rest.add(r + N); }
  template <typename T> void add(const T* r, A weight) { lanes += read<A, N>(r) * weight; rest.add(r + N, weight); }
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


@dataclass
class Place:
    """Where a bag's value is first written."""

    pointer: str
    stride: str
    ctype: str
    wide: str


def forward(
    spec: Lookup,
    weights: Sequence[Operand],
    sources: Sequence[Operand],
    outs: Sequence[Operand],
    batch: str,
    threads: int,
) -> tuple[str, str]:
    """(functions, body of the kernel) that compute `outs`, each contiguous `[batch, width]`."""
    places, columns, scratch = _places(spec, weights, sources, outs)
    classes: dict[Shape, list[int]] = defaultdict(list)
    for j, bag in enumerate(spec.bags):
        classes[shape_of(bag, spec, weights[bag.table], sources, places[j].ctype)].append(j)
    functions, tables, calls, start, row_bytes = [], [], [], 0, []
    for c, (shape, members) in enumerate(classes.items()):
        name = f"class{c}"
        functions.append(_forward(name, shape))
        rows = [
            [
                *bag_values(j, spec.bags[j], weights[spec.bags[j].table], sources),
                places[j].pointer,
                places[j].stride,
            ]
            for j in members
        ]
        listed = ",\n    ".join("{" + ", ".join(r) + "}" for r in rows)
        tables.append(f"const {name}_bag bags{c}[] = {{\n    {listed}}};")
        calls.append(
            f"if (j < {start + len(members)}) {{ {name}(bags{c}[j - {start}], begin, end, bad); continue; }}"
        )
        start += len(members)
        row_bytes.append(
            f"{len(members)} * {shape.dim} * int64_t(sizeof({shape.table})) * {_length(spec, members, sources)}"
        )
    newline = "\n  "
    body = f"""
  constexpr int64_t BAGS = {len(spec.bags)};
  const int64_t B = {batch};
  {scratch}
  {newline.join(tables)}
  Bad bad;
  const bool parallel = B * ({" + ".join(row_bytes)}) > {PARALLEL_BYTES};
  const int64_t runs = (B + {RUN} - 1) / {RUN};
  #pragma omp parallel for num_threads({threads}) schedule(static) if (parallel)
  for (int64_t work = 0; work < BAGS * runs; ++work) {{
    const int64_t j = work / runs, begin = work % runs * {RUN}, end = std::min(begin + {RUN}, B);
    {(newline + "  ").join(calls)}
  }}
  {_second_phase(spec, sources, outs, places, columns, threads)}
  {_throw(spec)}"""
    head = f"constexpr int64_t BAGS = {len(spec.bags)};\n"
    return head + HELPERS + VALUES + "".join(functions), body.replace(
        f"  constexpr int64_t BAGS = {len(spec.bags)};\n", "", 1
    )


def _length(spec: Lookup, members: list[int], sources: Sequence[Operand]) -> str:
    bag = spec.bags[members[0]]
    return "4" if bag.offsets >= 0 else f"int64_t({sources[bag.loads[0]].size(1)})"


def _places(
    spec: Lookup, weights: Sequence[Operand], sources: Sequence[Operand], outs: Sequence[Operand]
) -> tuple[dict[int, Place], dict[tuple[int, int], str], str]:
    """Each bag's first place, the column of each (output, part position), and the scratch buffer's declaration."""
    places: dict[int, Place] = {}
    columns: dict[tuple[int, int], str] = {}
    for o, out in enumerate(spec.outputs):
        if out.kind != "concat":
            continue
        column = "0"
        for k, p in enumerate(out.parts):
            columns[o, k] = column
            wide = part_width(p, spec, sources)
            if p >= 0 and p not in places:
                places[p] = Place(f"{outs[o].pointer} + ({column})", outs[o].strides[0], outs[o].ctype, wide)
            column = f"{column} + {wide}" if not (column + wide).isdigit() else str(int(column) + int(wide))
    homeless = [j for j in range(len(spec.bags)) if j not in places]
    if not homeless:
        return places, columns, ""
    ctype = "double" if any(w.ctype == "double" for w in weights) else "float"
    total = " + ".join(width(spec.bags[j], spec, sources) for j in homeless)
    column = "0"
    for j in homeless:
        wide = width(spec.bags[j], spec, sources)
        places[j] = Place(f"scratch.get() + {column}", "scratch_stride", ctype, wide)
        column = f"{column} + {wide}"
    declaration = (
        f"// values that only sums read\n  const int64_t scratch_stride = {total};\n"
        f"  std::unique_ptr<{ctype}[]> scratch(new {ctype}[B * scratch_stride]);"
    )
    return places, columns, declaration


def _second_phase(
    spec: Lookup,
    sources: Sequence[Operand],
    outs: Sequence[Operand],
    places: dict[int, Place],
    columns: dict[tuple[int, int], str],
    threads: int,
) -> str:
    """Copies and sums over fields, sample by sample, from what the first phase wrote."""
    tables: list[str] = []
    steps: list[tuple[int, str]] = []
    for o, out in enumerate(spec.outputs):
        groups: dict[str, list[str]] = defaultdict(list)
        for k, p in enumerate(out.parts):
            source = _place(p, spec, sources, places)
            target = f"{outs[o].pointer} + ({columns[o, k]})" if out.kind == "concat" else "nullptr"
            if out.kind == "concat" and p >= 0 and places[p].pointer == target:
                continue
            groups[source.ctype].append(f"{{{source.pointer}, {source.stride}, {source.wide}, {target}}}")
        for ctype, entries in groups.items():
            name, step = f"pieces{o}_{len(tables)}", _piece(out.kind, out.width, outs[o])
            tables.append(
                f"const struct {{ const {ctype}* from; int64_t stride, width; {outs[o].ctype}* to; }} {name}[] = {{\n    "
                + ",\n    ".join(entries)
                + "};"
            )
            steps.append(
                (
                    o,
                    f"for (const auto& piece : {name}) {{ const {ctype}* from = piece.from + b * piece.stride; {step} }}",
                )
            )
    if not steps:
        return ""
    lines = []
    for o, out in enumerate(spec.outputs):
        mine = [s for k, s in steps if k == o]
        if out.kind == "concat" or not mine:
            lines += mine
            continue
        acc = "double" if outs[o].ctype == "double" else "float"
        lines += [f"{{ {acc} sum[{out.width}] = {{}};", *mine]
        lines += [
            f"for (int64_t d = 0; d < {out.width}; ++d) ({outs[o].pointer})[b * {outs[o].strides[0]} + d] = sum[d]; }}"
        ]
    newline = "\n    "
    return f"""{(newline[:-2]).join(tables)}
  #pragma omp parallel for num_threads({threads}) schedule(static) if (parallel)
  for (int64_t b = 0; b < B; ++b) {{
    {newline.join(lines)}
  }}"""


def _place(part: int, spec: Lookup, sources: Sequence[Operand], places: dict[int, Place]) -> Place:
    if part >= 0:
        return places[part]
    x = sources[~part]
    return Place(x.pointer, x.strides[0], x.ctype, x.size(1))


def _piece(kind: str, wide: int, out: Operand) -> str:
    if kind == "concat":
        return f"for (int64_t d = 0; d < piece.width; ++d) piece.to[b * {out.strides[0]} + d] = from[d];"
    acc = "double" if out.ctype == "double" else "float"
    value = f"const {acc} v = from[at + d]; sum[d] += {'v * v' if kind == 'sum_of_squares' else 'v'};"
    return f"for (int64_t at = 0; at < piece.width; at += {wide}) for (int64_t d = 0; d < {wide}; ++d) {{ {value} }}"


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
