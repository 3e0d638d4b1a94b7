"""C++ for the gradients of a group of lookups: each task owns a stripe of one table's rows.

A task fills its stripe with zeros, then walks all ids of the table's bags in order and adds the gradients of the rows
it owns. No two tasks write the same row, so the result does not depend on the number of threads. Ids were checked
by the forward kernel; here a row outside the stripe is simply not ours.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
    plus,
    positions,
    shape_of,
    skip,
)
from recompile.lowering.lookup.spec import Bag, Lookup

# Bytes of gradient in one stripe: half of a core's level-2 cache on most servers of today.
STRIPE_BYTES = 1 << 20


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
    by_table: dict[int, list[int]] = defaultdict(list)
    for j, bag in enumerate(spec.bags):
        writes = _writes(bag, rows, weighted)
        if writes:
            shape = shape_of(bag, spec, weights[bag.table], sources, "")
            into = tuple(f"{kind} {ctype} {wide}" for kind, ctype, wide, _, _ in gathers[j])
            classes[replace(shape, into=into, writes=writes)].append(j)
            by_table[bag.table].append(j)
    functions, tables, where = [], [], {}
    for c, (shape, members) in enumerate(classes.items()):
        functions.append(_scatter(f"class{c}", shape))
        entries = []
        for k, j in enumerate(members):
            bag = spec.bags[j]
            where[j] = f"{{class{c}, &bags{c}[{k}]}}"
            entries.append(
                "{" + ", ".join(_values(j, bag, weights, sources, gathers[j], rows, weighted)) + "}"
            )
        tables.append(f"const class{c}_bag bags{c}[] = {{\n    " + ",\n    ".join(entries) + "};")
    body = _body(by_table, where, tables, rows, weighted, weights, _batch(spec, sources), threads)
    return f"constexpr int64_t BAGS = {len(spec.bags)};\n{HELPERS}" + "".join(functions), body


def _batch(spec: Lookup, sources: Sequence[Operand]) -> str:
    first = spec.bags[0]
    if first.offsets < 0:
        return sources[first.loads[0]].sizes[0]
    return f"({sources[first.offsets].sizes[0]} - {int(first.include_last_offset)})"


def _writes(bag: Bag, rows: Mapping[int, Operand], weighted: Mapping[int, Operand]) -> str:
    wanted = ["rows"] if bag.table in rows else []
    return "+".join(wanted + (["weights"] if bag.weight and bag.loads[1] in weighted else []))


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
    rows: Mapping[int, Operand],
    weighted: Mapping[int, Operand],
) -> list[str]:
    values = [*bag_values(j, bag, weights[bag.table], sources), str(bag.frozen_row)]
    values.append(rows[bag.table].pointer if bag.table in rows else "nullptr")
    if bag.weight and bag.loads[1] in weighted:
        out = weighted[bag.loads[1]]
        by_sample, by_position = ("0", "1") if bag.offsets >= 0 else (out.stride(0), out.stride(1))
        values += [out.pointer, by_sample, by_position]
    for _, _, _, pointer, stride in gathers:
        values += [pointer, stride]
    return values


def _scatter(name: str, shape: Shape) -> str:
    fields = [*bag_fields(shape), "int64_t frozen", f"{shape.table}* into"]
    if "weights" in shape.writes:
        fields += [f"{shape.loads[1]}* weight_into", "int64_t w_b", "int64_t w_l"]
    for k, entry in enumerate(shape.into):
        fields += [f"const {entry.split()[1]}* g{k}", f"int64_t g{k}_b"]
    per_sample, per_row = _max_steps(shape) if shape.bag.pooling == "max" else _sum_steps(shape)
    return f"""
struct {name}_bag {{ {"; ".join(fields)}; }};
// gradient of {describe(shape)}
void {name}(const void* described, int64_t begin, int64_t end, int64_t B) {{
  const auto& bag = *static_cast<const {name}_bag*>(described);
  Bad bad;  // the forward kernel has reported already
  for (int64_t b = 0; b < B; ++b) {{
    {positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;
    {per_sample}
    for (int64_t l = first; l < last; ++l) {{
      {loads(shape)}
      {skip(shape)}
      const int64_t row = {expression(shape.bag.row)};
      if (row < begin || row >= end) continue;
      [[maybe_unused]] const {shape.table}* r = bag.table + row * bag.row_stride;
      {per_row}
    }}
  }}
}}
"""


def _gradient(shape: Shape, at: str) -> str:
    """The bag's gradient at column `d` of row position `at`, summed over the outputs that hold it."""
    terms = []
    for k, entry in enumerate(shape.into):
        kind, _, wide = entry.split()
        position = f"{at} + d" if kind == "concat" else f"d % {wide}"
        value = f"{shape.acc}(bag.g{k}[b * bag.g{k}_b + {position}])"
        terms.append(f"2 * {shape.acc}(r[d]) * {value}" if kind == "sum_of_squares" else value)
    return " + ".join(terms) or "0"


def _sum_steps(shape: Shape) -> tuple[str, str]:
    bag, acc, dim = shape.bag, shape.acc, shape.dim
    at = f"l * {dim}" if bag.pooling == "none" else "0"
    scale = f"{acc}({expression(bag.weight)})" if bag.weight else "1"
    before = ""
    if bag.divisor:
        before = _divisor(shape)
        scale += " / divisor"
    add = f"for (int64_t d = 0; d < {dim}; ++d) to[d] = to[d] + ({_gradient(shape, at)}) * scale;"
    if scale == "1":
        add = f"for (int64_t d = 0; d < {dim}; ++d) to[d] = to[d] + ({_gradient(shape, at)});"
    else:
        add = f"const {acc} scale = {scale};\n        {add}"
    steps = ""
    if "rows" in shape.writes:
        steps = f"if (row != bag.frozen) {{ {shape.table}* to = bag.into + row * {dim};\n        {add} }}"
    if "weights" in shape.writes:
        over = " / divisor" if bag.divisor else ""
        steps += (
            f"\n      {acc} dot = 0; for (int64_t d = 0; d < {dim}; ++d) dot += ({_gradient(shape, at)}) * {acc}(r[d]);"
            f"\n      bag.weight_into[b * bag.w_b + l * bag.w_l] += dot{over};"
        )
    return before, steps


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
    step = (
        f"if (row != bag.frozen) {{ {shape.table}* to = bag.into + row * {dim};\n"
        f"        for (int64_t d = 0; d < {dim}; ++d)\n"
        f"          if (largest[d] == l) to[d] = to[d] + ({_gradient(shape, '0')}); }}"
    )
    return before, step


def _body(
    by_table: Mapping[int, Sequence[int]],
    where: Mapping[int, str],
    tables: Sequence[str],
    rows: Mapping[int, Operand],
    weighted: Mapping[int, Operand],
    weights: Sequence[Operand],
    batch: str,
    threads: int,
) -> str:
    members, owners, start = [], [], 0
    for t, bags in by_table.items():
        members += [where[j] for j in bags]
        grad = rows.get(t)
        dim, size = weights[t].sizes[1], f"sizeof({weights[t].ctype})"
        pointer = f"reinterpret_cast<char*>({grad.pointer})" if grad else "nullptr"
        owners.append(
            f"{{{pointer}, {weights[t].sizes[0]}, int64_t({dim} * {size}), {start}, {start + len(bags)}}}"
        )
        start += len(bags)
    untouched = [t for t in rows if t not in by_table]
    zeros = [
        f"std::memset({g.pointer}, 0, {' * '.join(('sizeof(' + g.ctype + ')', *g.sizes))});"
        for g in [*weighted.values(), *(rows[t] for t in untouched)]
    ]
    newline = "\n  "
    if not owners:
        return newline + newline.join(zeros)
    return f"""
  const int64_t B = {batch};
  {newline.join(zeros)}
  {newline.join(tables)}
  const struct {{ void (*scatter)(const void*, int64_t, int64_t, int64_t); const void* bag; }} members[] = {{
    {(", " + newline + "  ").join(members)}}};
  struct Table {{ char* grad; int64_t rows, row_bytes, first, last, stripe, before; }};
  Table tables[] = {{
    {(", " + newline + "  ").join(owners)}}};
  int64_t tasks = 0;
  for (auto& t : tables) {{
    t.stripe = {threads} == 1 ? t.rows : std::max<int64_t>({STRIPE_BYTES} / t.row_bytes, 1);
    // at most four stripes a thread: each walks all ids of its table
    t.stripe = std::max<int64_t>(std::max(t.stripe, (t.rows + {4 * threads} - 1) / {4 * threads}), 1);
    t.before = tasks;
    tasks += std::max<int64_t>((t.rows + t.stripe - 1) / t.stripe, 1);
  }}
  #pragma omp parallel for num_threads({threads}) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {{
    int64_t which = 0;
    while (which + 1 < {len(owners)} && tables[which + 1].before <= task) ++which;
    const auto& t = tables[which];
    const int64_t begin = (task - t.before) * t.stripe, end = std::min(begin + t.stripe, t.rows);
    if (t.grad) std::memset(t.grad + begin * t.row_bytes, 0, (end - begin) * t.row_bytes);
    for (int64_t m = t.first; m < t.last; ++m) members[m].scatter(members[m].bag, begin, end, B);
  }}"""
