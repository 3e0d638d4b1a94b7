"""C++ for a group of lookups on the CPU: one function a class of bags, tables of pointers, one parallel loop.

Bags that differ only in their pointers and strides form a class and share a function, so the text grows with the
number of classes, not of tables. Work is cut into (bag, run of samples): a thread stays with one table for as long as
it can, which keeps the address translations of large tables warm. A row is fetched one sample ahead.
Ids are checked before a row's address is formed; the first bad one is thrown after the parallel loop.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from recompile.lowering import scalar
from recompile.lowering.lookup.spec import Bag, Lookup

# Below this many bytes of rows one thread is faster than starting two (about 5 us, two cores of a 2.6 GHz Xeon).
PARALLEL_BYTES = 1 << 16
# Samples in one unit of work.
RUN = 256

HELPERS = """
template <typename A, typename B> inline auto recompile_mod(A a, B b) { auto m = a % b; return m < 0 ? m + b : m; }
template <typename A, typename B> inline auto recompile_max(A a, B b) { return a > b ? a : b; }
template <typename A, typename B> inline auto recompile_min(A a, B b) { return a < b ? a : b; }
// The first id out of range, or offset out of order, that any thread met.
struct Bad {
  std::atomic<int64_t> bag{-1};
  int64_t id = 0, limit = 0;
  void report(int64_t which, int64_t value, int64_t bound) {
    int64_t none = -1;
    if (bag.compare_exchange_strong(none, which)) { id = value; limit = bound; }
  }
};
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

    @property
    def acc(self) -> str:
        return "double" if self.table == "double" else "float"


def shape_of(bag: Bag, spec: Lookup, table: Operand, sources: Sequence[Operand], out: str) -> Shape:
    """The class that a bag belongs to."""
    common = Bag(0, (), bag.pooling, bag.row, bag.keep, bag.weight, bag.count, bag.divisor)
    return Shape(
        dim=spec.tables[bag.table].dim,
        table=table.ctype,
        out=out,
        loads=tuple(sources[s].ctype for s in bag.loads),
        bag=common,
        offsets=sources[bag.offsets].ctype if bag.offsets >= 0 else "",
    )


def bag_fields(shape: Shape) -> list[str]:
    """Members of the struct that describes one bag to its class's function."""
    fields = [f"const {shape.table}* table", "int64_t rows", "int64_t row_stride", "int64_t index"]
    for k, ctype in enumerate(shape.loads):
        fields += [f"const {ctype}* x{k}_at", f"int64_t x{k}_b", f"int64_t x{k}_l"]
    if shape.offsets:
        fields += [f"const {shape.offsets}* offsets", "int64_t bounds", "int64_t ids"]
    else:
        fields += ["int64_t length"]
    return fields


def bag_values(j: int, bag: Bag, table: Operand, sources: Sequence[Operand]) -> list[str]:
    """The initializer of that struct for bag `j`."""
    values = [table.pointer, table.size(0), table.strides[0], str(j)]
    for s in bag.loads:
        x = sources[s]
        # With offsets a source is one value an id: position p takes the place of the sample.
        by_sample, by_position = ("0", x.stride(0)) if bag.offsets >= 0 else (x.stride(0), x.stride(1))
        values += [x.pointer, by_sample, by_position]
    if bag.offsets >= 0:
        values += [sources[bag.offsets].pointer, sources[bag.offsets].size(0), sources[bag.loads[0]].size(0)]
    else:
        values += [sources[bag.loads[0]].size(1)]
    return values


def positions(shape: Shape) -> str:
    """Declares `first`, `last` for sample `b`."""
    if not shape.offsets:
        return "const int64_t first = 0, last = bag.length;"
    return (
        "int64_t first = bag.offsets[b], last = b + 1 < bag.bounds ? int64_t(bag.offsets[b + 1]) : bag.ids;\n"
        "    if (first < 0 || last < first || last > bag.ids || (b == 0 && first != 0)) {\n"
        "      bad.report(bag.index + BAGS, b == 0 ? first : last, bag.ids);\n"
        "      first = last = 0;\n"
        "    }"
    )


def loads(shape: Shape, sample: str = "b") -> str:
    """Declares x0, x1, ... at position `l` of a sample: integers as int64_t, the rest in float or double."""
    lines = []
    for k, ctype in enumerate(shape.loads):
        real = ctype if ctype == "double" else "float"
        kind = real if ctype in ("float", "double", "at::Half", "at::BFloat16") else "int64_t"
        lines.append(f"const {kind} x{k} = bag.x{k}_at[{sample} * bag.x{k}_b + l * bag.x{k}_l];")
    return "\n      ".join(lines)


def expression(text: str) -> str:
    return scalar.to_cpp(scalar.parse(text))


def skip(shape: Shape) -> str:
    return "" if shape.bag.keep == "true" else f"if (!{expression(shape.bag.keep)}) continue;"


def _prefetch(shape: Shape) -> str:
    """Fetches the rows of a sample a little ahead; wrong ids are harmless to a prefetch."""
    bounds = "const int64_t from = 0, to = bag.length;"
    if shape.offsets:
        bounds = "const int64_t from = bag.offsets[ahead], to = ahead + 1 < bag.bounds ? int64_t(bag.offsets[ahead + 1]) : bag.ids;"
    start, stop = (
        ("from", "to") if not shape.offsets else ("std::max<int64_t>(from, 0)", "std::min(to, bag.ids)")
    )
    size = {"float": 4, "double": 8}.get(shape.table, 2)
    return f"""
    if (const int64_t ahead = b + bag_ahead; ahead < end) {{
      {bounds}
      for (int64_t l = {start}; l < {stop}; ++l) {{
      {loads(shape, "ahead")}
      {skip(shape)}
      const auto at = reinterpret_cast<uintptr_t>(bag.table) + uintptr_t(int64_t({expression(shape.bag.row)}) * bag.row_stride) * {size};
      for (int64_t line = 0; line < {min(shape.dim * size, 512)}; line += 64) __builtin_prefetch(reinterpret_cast<const void*>(at + line));
      }}
    }}"""


def row(shape: Shape) -> str:
    """Declares `row`, checked, and `r`, its first element."""
    return f"""const int64_t row = {expression(shape.bag.row)};
      if (uint64_t(row) >= uint64_t(bag.rows)) {{ bad.report(bag.index, row, bag.rows); continue; }}
      const {shape.table}* r = bag.table + row * bag.row_stride;"""


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


def _forward(name: str, shape: Shape) -> str:
    """The function that computes the bags of one class for samples `begin` to `end`."""
    dim, acc, pooling = shape.dim, shape.acc, shape.bag.pooling
    each = f"for (int64_t d = 0; d < {dim}; ++d)"
    weight = f"{acc}({expression(shape.bag.weight)}) * " if shape.bag.weight else ""
    open_, step, close = {
        "none": ("", f"{each} out[l * {dim} + d] = {shape.out}(r[d]);", ""),
        "sum": (f"{acc} value[{dim}] = {{}};", f"{each} value[d] += {weight}{acc}(r[d]);", "store"),
        "max": (
            f"{acc} value[{dim}] = {{}}; bool any = false;",
            f"{each} value[d] = any ? std::max(value[d], {acc}(r[d])) : {acc}(r[d]);\n      any = true;",
            "store",
        ),
    }[pooling]
    scale = f" / {acc}({expression(shape.bag.divisor)})" if shape.bag.divisor else ""
    store = f"{each} out[d] = {shape.out}(value[d]{scale});" if close else ""
    ahead = "" if dim == 1 or not _worth_prefetch(shape) else _prefetch(shape)
    return f"""
struct {name}_bag {{ {"; ".join(bag_fields(shape))}; {shape.out}* out; int64_t out_stride; }};
// {describe(shape)}
void {name}(const {name}_bag& bag, int64_t begin, int64_t end, Bad& bad) {{
  {_ahead(shape) if ahead else ""}
  for (int64_t b = begin; b < end; ++b) {{
    {positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;{ahead}
    {shape.out}* out = bag.out + b * bag.out_stride;
    {open_}
    [[maybe_unused]] {acc} count = 0;
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      {row(shape)}
      {step}
      {count(shape)}
    }}
    {store}
  }}
}}
"""


def _worth_prefetch(shape: Shape) -> bool:
    return True


def _ahead(shape: Shape) -> str:
    """How many samples ahead rows are fetched: about 16 rows, as far as a core has requests in flight."""
    length = (
        "std::max<int64_t>(bag.ids / std::max<int64_t>(bag.bounds, 1), 1)" if shape.offsets else "bag.length"
    )
    return f"const int64_t bag_ahead = std::max<int64_t>(1, 16 / std::max<int64_t>({length}, 1));"


def describe(shape: Shape) -> str:
    """One line about a class, for the reader of a kernel."""
    where = "" if shape.bag.keep == "true" else f" where {shape.bag.keep}"
    over = f" / ({shape.bag.divisor})" if shape.bag.divisor else ""
    kind = {"none": "rows", "sum": "sum of rows", "max": "max of rows"}[shape.bag.pooling]
    ids = f"ids {shape.loads[0]}" + (" with offsets" if shape.offsets else "")
    return f"{kind}{where}{over}: {shape.table}[{shape.dim}] tables, {ids}, row = {shape.bag.row}"


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
    return head + HELPERS + "".join(functions), body.replace(
        f"  constexpr int64_t BAGS = {len(spec.bags)};\n", "", 1
    )


def _length(spec: Lookup, members: list[int], sources: Sequence[Operand]) -> str:
    bag = spec.bags[members[0]]
    return "4" if bag.offsets >= 0 else f"int64_t({sources[bag.loads[0]].size(1)})"


def width(bag: Bag, spec: Lookup, sources: Sequence[Operand]) -> str:
    """Columns that a bag takes."""
    dim = spec.tables[bag.table].dim
    return f"{dim} * {sources[bag.loads[0]].size(1)}" if bag.pooling == "none" else str(dim)


def part_width(part: int, spec: Lookup, sources: Sequence[Operand]) -> str:
    return width(spec.bags[part], spec, sources) if part >= 0 else sources[~part].size(1)


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
