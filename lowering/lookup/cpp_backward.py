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
    Member,
    Operand,
    Shape,
    count,
    describe,
    described,
    expression,
    loads,
    member,
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
        if bag.weight and bag.weight_load in weighted:
            classes[replace(shape, into=into, writes="weights")].append(j)
    functions, tables = [], []
    by_table: dict[int, list[str]] = defaultdict(list)
    weighing: list[str] = []
    for c, (shape, bags) in enumerate(classes.items()):
        name, by_row = f"class{c}", shape.writes == "rows"
        targets = [rows[spec.bags[j].table] if by_row else weighted[spec.bags[j].weight_load] for j in bags]
        members = [
            _member(j, spec.bags[j], weights, sources, gathers[j], shape, target)
            for j, target in zip(bags, targets, strict=True)
        ]
        struct, declarations, array = described(name, members)
        functions.append(f"\n{struct}\n{_scatter(name, shape, declarations)}")
        tables.append(array)
        for k, j in enumerate(bags):
            (by_table[spec.bags[j].table] if by_row else weighing).append(f"{{{name}, &{name}_bags[{k}]}}")
    body = f"""
  const int64_t B = {_batch(spec, sources)};
  {_zeros([*weighted.values(), *(rows[t] for t in rows if t not in by_table)])}
  {(chr(10) + "  ").join(tables)}"""
    body += _rows_body(by_table, rows, weights, threads) + _weights_body(weighing, threads)
    return f"constexpr int64_t BAGS = {len(spec.bags)};\n{HELPERS}{LANES}{HELPERS_OF_GRADIENTS}" + "".join(
        functions
    ), body


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


def _member(
    j: int,
    bag: Bag,
    weights: Sequence[Operand],
    sources: Sequence[Operand],
    gathers: Sequence[tuple[str, str, int, str, str]],
    shape: Shape,
    target: Operand,
) -> Member:
    values = member(j, bag, weights[bag.table], sources)
    values |= {"frozen": ("int64_t", str(bag.frozen_row)), "into": (f"{target.ctype}*", target.pointer)}
    if shape.writes == "weights":
        by_sample, by_position = ("0", "1") if bag.offsets >= 0 else (target.stride(0), target.stride(1))
        values |= {"into_b": ("int64_t", by_sample), "into_l": ("int64_t", by_position)}
    for k, (_, ctype, _, pointer, stride) in enumerate(gathers):
        values |= {f"g{k}_at": (f"const {ctype}*", pointer), f"g{k}_b": ("int64_t", stride)}
    return values


def _scatter(name: str, shape: Shape, declarations: str) -> str:
    """The function of one class: rows from `begin` to `end`, or the weights of samples `begin` to `end`."""
    by_row = shape.writes == "rows"
    per_sample, per_row = _max_steps(shape) if shape.bag.pooling == "max" else _sum_steps(shape)
    first, last, owned = ("0", "B", "row < begin || row >= end") if by_row else ("begin", "end", _outside())
    return f"""// gradient of {describe(shape)}
void {name}(const void* described, int64_t begin, int64_t end, int64_t B) {{
  const auto& bag = *static_cast<const {name}_bag*>(described);
  {declarations}
  using A = {shape.acc};
  Bad bad;  // the forward kernel has reported already
  for (int64_t b = {first}; b < {last}; ++b) {{
    {positions(shape)}
    [[maybe_unused]] const int64_t L = last - first;
    {per_sample}
    for (int64_t p = first; p < last; ++p) {{
      {loads(shape)}
      {skip(shape)}
      const int64_t row = {expression(shape.bag.row)};
      if ({owned}) continue;
      [[maybe_unused]] const {shape.table}* r = table + row * row_stride;
      {per_row}
    }}
  }}
}}
"""


def _outside() -> str:
    return "uint64_t(row) >= uint64_t(rows)"


def _each_column(shape: Shape, at: str, step: str) -> str:
    """A loop over the row's columns `d`, N at a time, with `g`: the bag's gradient there, from column `at` on.

    It is summed over the outputs that hold the bag. No N columns cross the end of a sum's width.
    """
    most, terms = 16, []
    for k, entry in enumerate(shape.into):
        kind, _, wide = entry.split()
        while kind != "concat" and int(wide) < shape.dim and int(wide) % most:
            most //= 2
        column = f"{at} + d" if kind == "concat" else f"d % {wide}"
        value = f"read<A, N>(g{k}_at + b * g{k}_b + {column})"
        terms.append(f"A(2) * read<A, N>(r + d) * {value}" if kind == "sum_of_squares" else value)
    return f"""columns<A, {shape.dim}, {most}>([&](auto lanes, int64_t d) {{
        constexpr int N = decltype(lanes)::value;
        const auto g = {" + ".join(terms)};
        {step}
      }});"""


def _sum_steps(shape: Shape) -> tuple[str, str]:
    """(code before a sample's rows, code for one row)."""
    bag, acc = shape.bag, shape.acc
    at = f"p * {shape.dim}" if bag.pooling == "none" else "0"
    before = _divisor(shape) if bag.divisor else ""
    if not shape.into:
        return "", ""
    if shape.writes == "weights":
        dot = "const auto product = g * read<A, N>(r + d); for (int n = 0; n < N; ++n) dot += product[n];"
        over = " / divisor" if bag.divisor else ""
        target = "into[b * into_b + p * into_l]"
        return before, (
            f"{acc} dot = 0;\n      {_each_column(shape, at, dot)}\n      {target} = {target} + dot{over};"
        )
    scale = f"{acc}({expression(bag.weight)})" if bag.weight else f"{acc}(1)"
    scale += " / divisor" if bag.divisor else ""
    scaled = bool(bag.weight or bag.divisor)
    add = f"store<A, N>(read<A, N>(to + d) + g{' * scale' if scaled else ''}, to + d);"
    lines = ["if (row == frozen) continue;", f"{shape.table}* to = into + row * {shape.dim};"]
    lines += [f"const {acc} scale = {scale};"] if scaled else []
    return before, "\n      ".join([*lines, _each_column(shape, at, add)])


def _divisor(shape: Shape) -> str:
    """Counts the kept rows again: cheaper than keeping the counts between the passes."""
    if "count" not in shape.bag.divisor:
        return f"const {shape.acc} divisor = {expression(shape.bag.divisor)};"
    needs_row = "nonzero" in shape.bag.count
    read = (
        f"const int64_t row = {expression(shape.bag.row)};\n"
        f"      if ({_outside()}) continue;\n"
        f"      const {shape.table}* r = table + row * row_stride;"
        if needs_row
        else ""
    )
    return f"""{shape.acc} count = 0;
    for (int64_t p = first; p < last; ++p) {{
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
    for (int64_t p = first; p < last; ++p) {{
      {loads(shape)}
      {skip(shape)}
      const int64_t row = {expression(shape.bag.row)};
      if ({_outside()}) continue;
      const {shape.table}* r = table + row * row_stride;
      for (int64_t d = 0; d < {dim}; ++d)
        if (!any || {shape.acc}(r[d]) > value[d] || (r[d] != r[d] && value[d] == value[d]))
          {{ value[d] = r[d]; largest[d] = p; }}
      any = true;
    }}"""
    grads = [_element(shape, k) for k in range(len(shape.into))]
    step = (
        f"if (row != frozen) {{ {shape.table}* to = into + row * {dim};\n"
        f"        for (int64_t d = 0; d < {dim}; ++d)\n"
        f"          if (largest[d] == p) to[d] = to[d] + ({' + '.join(grads) or '0'}); }}"
    )
    return before, step


def _element(shape: Shape, k: int) -> str:
    """Output `k`'s gradient of column `d`; a maximum is never in a sum of squares."""
    kind, _, wide = shape.into[k].split()
    return f"{shape.acc}(g{k}_at[b * g{k}_b + {'d' if kind == 'concat' else f'd % {wide}'}])"


HELPERS_OF_GRADIENTS = """
// Calls f with vectors' first columns: of as many lanes as fit a register and are not above MOST, the rest one by one.
template <typename A, int D, int MOST, typename F> inline void columns(const F& f) {
  constexpr int N = lanes_of<A>(D, MOST);
  for (int64_t d = 0; d < D / N * N; d += N) f(std::integral_constant<int, N>(), d);
  for (int64_t d = D / N * N; d < D; ++d) f(std::integral_constant<int, 1>(), d);
}
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
