"""C++ for the gradients of a group of lookups: each task owns a stripe of one table's rows.

A task fills its stripe with zeros, then walks all ids of the table's bags in order and adds the gradients of the rows
it owns. Gradients of the weights of rows are made sample by sample instead. Either way no two tasks write the same
element, so the result does not depend on the number of threads. Ids were checked by the forward kernel; here a row
outside the stripe is simply not ours.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    part_width,
    plus,
    positions,
    shape_of,
    skip,
)
from recompile.lowering.lookup.spec import Bag, Lookup

# Bytes of gradient in one stripe: half of a core's level-2 cache on most servers of today.
STRIPE_BYTES = 1 << 20
# Samples in one unit of work on the weights of rows.
RUN = 256


def backward(
    spec: Lookup,
    grads: Sequence[Operand],
    weights: Sequence[Operand],
    sources: Sequence[Operand],
    rows: Mapping[int, Operand],
    weighted: Mapping[int, Operand],
    threads: int,
) -> tuple[str, str]:
    """(functions, body) that fill `rows` (table -> its gradient) and `weighted` (source -> its gradient)."""
    gathers = _gathers(spec, grads, sources)
    classes: dict[Shape, list[int]] = defaultdict(list)
    for j, bag in enumerate(spec.bags):
        shape = shape_of(bag, spec, weights[bag.table], sources, "")
        into = tuple(f"{kind} {ctype} {wide}" for kind, ctype, wide, _, _ in gathers[j])
        if bag.table in rows:
            classes[replace(shape, into=into, writes="rows")].append(j)
        if bag.weight and bag.loads[1] in weighted:
            classes[replace(shape, into=into, writes="weights")].append(j)
    functions, tables = [], []
    by_table: dict[int, list[str]] = defaultdict(list)
    weighing: list[str] = []
    for c, (shape, members) in enumerate(classes.items()):
        functions.append(_scatter(f"class{c}", shape))
        entries = []
        for k, j in enumerate(members):
            bag, here = spec.bags[j], f"{{class{c}, &bags{c}[{k}]}}"
            (by_table[bag.table] if shape.writes == "rows" else weighing).append(here)
            target = rows[bag.table] if shape.writes == "rows" else weighted[bag.loads[1]]
            values = _values(j, bag, weights, sources, gathers[j], shape, target)
            entries.append("{" + ", ".join(values) + "}")
        tables.append(f"const class{c}_bag bags{c}[] = {{\n    " + ",\n    ".join(entries) + "};")
    body = f"""
  const int64_t B = {_batch(spec, sources)};
  {_zeros([*weighted.values(), *(rows[t] for t in rows if t not in by_table)])}
  {(chr(10) + "  ").join(tables)}"""
    body += _rows_body(by_table, rows, weights, threads) + _weights_body(weighing, threads)
    return f"constexpr int64_t BAGS = {len(spec.bags)};\n{HELPERS}{LANES}{MEMBER}" + "".join(functions), body


def _batch(spec: Lookup, sources: Sequence[Operand]) -> str:
    first = spec.bags[0]
    if first.offsets < 0:
        return sources[first.loads[0]].sizes[0]
    return f"({sources[first.offsets].sizes[0]} - {int(first.include_last_offset)})"


def _gathers(
    spec: Lookup, grads: Sequence[Operand], sources: Sequence[Operand]
) -> dict[int, list[tuple[str, str, int, str, str]]]:
    """For each bag, the gradients it collects: (output's kind, C++ type, output's width, pointer, stride)."""
    found: dict[int, list[tuple[str, str, int, str, str]]] = defaultdict(list)
    for out, grad in zip(spec.outputs, grads, strict=True):
        column = "0"
        for p in out.parts:
            pointer = f"{grad.pointer} + ({column})" if out.kind == "concat" else grad.pointer
            if p >= 0:
                found[p].append((out.kind, grad.ctype, out.width, pointer, grad.stride(0)))
            column = plus(column, part_width(p, spec, sources))
    return found


def _values(
    j: int,
    bag: Bag,
    weights: Sequence[Operand],
    sources: Sequence[Operand],
    gathers: Sequence[tuple[str, str, int, str, str]],
    shape: Shape,
    target: Operand,
) -> list[str]:
    values = [*bag_values(j, bag, weights[bag.table], sources), str(bag.frozen_row), target.pointer]
    if shape.writes == "weights":
        by_sample, by_position = ("0", "1") if bag.offsets >= 0 else (target.stride(0), target.stride(1))
        values += [by_sample, by_position]
    for _, _, _, pointer, stride in gathers:
        values += [pointer, stride]
    return values


def _scatter(name: str, shape: Shape) -> str:
    """The function of one class: rows from `begin` to `end`, or the weights of samples `begin` to `end`."""
    by_row = shape.writes == "rows"
    fields = [*bag_fields(shape), "int64_t frozen"]
    fields += (
        [f"{shape.table}* into"]
        if by_row
        else [f"{shape.loads[1]}* into", "int64_t into_b", "int64_t into_l"]
    )
    for k, entry in enumerate(shape.into):
        fields += [f"const {entry.split()[1]}* g{k}", f"int64_t g{k}_b"]
    per_sample, per_row = _max_steps(shape) if shape.bag.pooling == "max" else _sum_steps(shape)
    first, last, owned = ("0", "B", "row < begin || row >= end") if by_row else ("begin", "end", _outside())
    return f"""
struct {name}_bag {{ {"; ".join(fields)}; }};
// gradient of {describe(shape)}
void {name}(const void* described, int64_t begin, int64_t end, int64_t B) {{
  const auto& bag = *static_cast<const {name}_bag*>(described);
  Bad bad;  // the forward kernel has reported already
  for (int64_t b = {first}; b < {last}; ++b) {{
    {positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;
    {per_sample}
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      const int64_t row = {expression(shape.bag.row)};
      if ({owned}) continue;
      [[maybe_unused]] const {shape.table}* r = bag.table + row * bag.row_stride;
      {per_row}
    }}
  }}
}}
"""


def _outside() -> str:
    return "uint64_t(row) >= uint64_t(bag.rows)"


def _lanes(shape: Shape) -> list[tuple[int, int]]:
    """The row's columns cut into (start, lanes), such that no cut crosses the end of a sum's width."""
    widest = 16
    for entry in shape.into:
        kind, _, wide = entry.split()
        while kind != "concat" and int(wide) < shape.dim and int(wide) % widest:
            widest //= 2
    cuts, start = [], 0
    while start < shape.dim:
        lanes = widest
        while start + lanes > shape.dim:
            lanes //= 2
        cuts.append((start, lanes))
        start += lanes
    return cuts


def _gradient(shape: Shape, at: str, start: int, lanes: int) -> str:
    """Columns `start` to `start + lanes` of the bag's gradient, summed over the outputs that hold it."""
    terms = []
    for k, entry in enumerate(shape.into):
        kind, _, wide = entry.split()
        column = f"{at} + {start}" if kind == "concat" else str(start % int(wide))
        value = f"read<{shape.acc}, {lanes}>(bag.g{k} + b * bag.g{k}_b + {column})"
        twice = f"{shape.acc}(2) * read<{shape.acc}, {lanes}>(r + {start})"
        terms.append(f"{twice} * {value}" if kind == "sum_of_squares" else value)
    return f"({' + '.join(terms)})"


def _sum_steps(shape: Shape) -> tuple[str, str]:
    """(code before a sample's rows, code for one row)."""
    bag, acc = shape.bag, shape.acc
    at = f"l * {shape.dim}" if bag.pooling == "none" else "0"
    before = _divisor(shape) if bag.divisor else ""
    newline = "\n        "
    if not shape.into:
        return "", ""
    if shape.writes == "weights":
        dots = [
            f"{{ const auto product = {_gradient(shape, at, start, lanes)} * read<{acc}, {lanes}>(r + {start}); "
            f"for (int n = 0; n < {lanes}; ++n) dot += product[n]; }}"
            for start, lanes in _lanes(shape)
        ]
        over = " / divisor" if bag.divisor else ""
        target = "bag.into[b * bag.into_b + l * bag.into_l]"
        return before, f"{acc} dot = 0;{newline}{newline.join(dots)}{newline}{target} = {target} + dot{over};"
    scale = f"{acc}({expression(bag.weight)})" if bag.weight else f"{acc}(1)"
    scale += " / divisor" if bag.divisor else ""
    scaled = " * scale" if bag.weight or bag.divisor else ""
    adds = [
        f"store<{acc}, {lanes}>(read<{acc}, {lanes}>(to + {start}) + {_gradient(shape, at, start, lanes)}{scaled},"
        f" to + {start});"
        for start, lanes in _lanes(shape)
    ]
    lines = [f"if (row == bag.frozen) continue;\n      {shape.table}* to = bag.into + row * {shape.dim};"]
    lines += [f"const {acc} scale = {scale};"] if scaled else []
    return before, newline.join([*lines, *adds])


def _divisor(shape: Shape) -> str:
    """Counts the kept rows again: cheaper than keeping the counts between the passes."""
    if "count" not in shape.bag.divisor:
        return f"const {shape.acc} divisor = {expression(shape.bag.divisor)};"
    needs_row = "nonzero" in shape.bag.count
    read = (
        f"const int64_t row = {expression(shape.bag.row)};\n"
        f"      if (uint64_t(row) >= uint64_t(bag.rows)) continue;\n"
        f"      const {shape.table}* r = bag.table + row * bag.row_stride;"
        if needs_row
        else ""
    )
    return f"""{shape.acc} count = 0;
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      {read}
      {count(shape)}
    }}
    const {shape.acc} divisor = {expression(shape.bag.divisor)};"""


def _max_steps(shape: Shape) -> tuple[str, str]:
    dim = shape.dim
    before = f"""int64_t largest[{dim}];
    {shape.acc} value[{dim}];
    bool any = false;
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      const int64_t row = {expression(shape.bag.row)};
      if (uint64_t(row) >= uint64_t(bag.rows)) continue;
      const {shape.table}* r = bag.table + row * bag.row_stride;
      for (int64_t d = 0; d < {dim}; ++d)
        if (!any || {shape.acc}(r[d]) > value[d]) {{ value[d] = r[d]; largest[d] = l; }}
      any = true;
    }}"""
    grads = [_element(shape, k) for k in range(len(shape.into))]
    step = (
        f"if (row != bag.frozen) {{ {shape.table}* to = bag.into + row * {dim};\n"
        f"        for (int64_t d = 0; d < {dim}; ++d)\n"
        f"          if (largest[d] == l) to[d] = to[d] + ({' + '.join(grads) or '0'}); }}"
    )
    return before, step


def _element(shape: Shape, k: int) -> str:
    """Output `k`'s gradient of column `d`; a maximum is never in a sum of squares."""
    kind, _, wide = shape.into[k].split()
    return f"{shape.acc}(bag.g{k}[b * bag.g{k}_b + {'d' if kind == 'concat' else f'd % {wide}'}])"


MEMBER = """
struct Member { void (*run)(const void*, int64_t, int64_t, int64_t); const void* bag; };
"""


def _zeros(targets: Sequence[Operand]) -> str:
    fills = [f"std::memset({g.pointer}, 0, {' * '.join((f'sizeof({g.ctype})', *g.sizes))});" for g in targets]
    return "\n  ".join(fills)


def _rows_body(
    by_table: Mapping[int, Sequence[str]],
    rows: Mapping[int, Operand],
    weights: Sequence[Operand],
    threads: int,
) -> str:
    if not by_table:
        return ""
    members: list[str] = []
    owners: list[str] = []
    for t, bags in by_table.items():
        row_bytes = f"int64_t({weights[t].sizes[1]} * sizeof({weights[t].ctype}))"
        span = f"{len(members)}, {len(members) + len(bags)}"
        owners.append(
            f"{{reinterpret_cast<char*>({rows[t].pointer}), {weights[t].sizes[0]}, {row_bytes}, {span}}}"
        )
        members += bags
    newline = ",\n    "
    return f"""
  const Member members[] = {{
    {newline.join(members)}}};
  struct Table {{ char* grad; int64_t rows, row_bytes, first, last, stripe, before; }};
  Table tables[] = {{
    {newline.join(owners)}}};
  int64_t tasks = 0;
  for (auto& t : tables) {{
    // at most four stripes a thread: each walks all ids of its table
    const int64_t least = {"t.rows" if threads == 1 else f"(t.rows + {4 * threads - 1}) / {4 * threads}"};
    t.stripe = std::max<int64_t>({{least, {STRIPE_BYTES} / t.row_bytes, 1}});
    t.before = tasks;
    tasks += std::max<int64_t>((t.rows + t.stripe - 1) / t.stripe, 1);
  }}
  #pragma omp parallel for num_threads({threads}) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {{
    int64_t which = 0;
    while (which + 1 < {len(owners)} && tables[which + 1].before <= task) ++which;
    const auto& t = tables[which];
    const int64_t begin = (task - t.before) * t.stripe, end = std::min(begin + t.stripe, t.rows);
    std::memset(t.grad + begin * t.row_bytes, 0, (end - begin) * t.row_bytes);
    for (int64_t m = t.first; m < t.last; ++m) members[m].run(members[m].bag, begin, end, B);
  }}"""


def _weights_body(weighing: Sequence[str], threads: int) -> str:
    if not weighing:
        return ""
    newline = ",\n    "
    return f"""
  const Member weighing[] = {{
    {newline.join(weighing)}}};
  #pragma omp parallel for num_threads({threads}) schedule(static)
  for (int64_t begin = 0; begin < B; begin += {RUN})
    for (const auto& m : weighing) m.run(m.bag, begin, std::min<int64_t>(begin + {RUN}, B), B);"""
