"""The struct that a kernel is: sizes, strides and pointers by name, constants where they are known.

struct Tile is what one thread works on: a batch index, query rows i0 to i1 and keys j0 to j1, and where they are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from recompile.lowering.attention.cpp_keep import Keep
from recompile.lowering.attention.cpp_pairs import pointer
from recompile.lowering.attention.cpp_plan import Line, Load, Plan
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.score_cpp import statements, text


@dataclass
class Members:
    """Fields of the struct, and what the entry sets them to."""

    constants: list[str] = field(default_factory=list)
    fields: list[str] = field(default_factory=list)
    values: list[str] = field(default_factory=list)

    def number(self, name: str, value: str) -> None:
        if value.isdigit():
            self.constants.append(f"{name} = {value}")
        else:
            self.set("int64_t", name, value)

    def set(self, kind: str, name: str, value: str) -> None:
        self.fields.append(f"{kind} {name};")
        self.values.append(value)

    def operand(self, name: str, x: Operand, dims: Sequence[str], output: bool = False) -> None:
        """Its pointer, and its strides by the names of its dims (0 where it is broadcast)."""
        self.set(f"{'' if output else 'const '}{x.ctype}*", name, x.pointer)
        for k, dim in enumerate(dims):
            size, stride = x.sizes[k], x.strides[k]
            broadcast = "0" if size == "1" else stride
            self.number(f"{name}_{dim}", broadcast if size.isdigit() else f"({size}) == 1 ? 0 : {stride}")

    def __str__(self) -> str:
        lines = [f"static constexpr int64_t {x};" for x in _wrapped(self.constants)] + _joined(self.fields)
        return "\n  ".join(lines)


def _wrapped(names: list[str]) -> list[str]:
    return [", ".join(names[k : k + 8]) for k in range(0, len(names), 8)]


def _joined(fields: list[str]) -> list[str]:
    return [" ".join(fields[k : k + 5]) for k in range(0, len(fields), 5)]


def declare_extras(plan: Plan, members: Members) -> None:
    """Members for loads and tables."""
    batch = [str(a) for a in range(plan.rank)]
    for name, x in plan.extras.items():
        if name in plan.loads:
            members.operand(name, x, [*batch, "m", "n"])
        else:
            members.operand(name, x, [*batch, "t"])
            members.number(f"{name}_size", x.sizes[-1])
    for line in plan.lines.values():
        low = f"(({_index(line)}) + {min(0, line.a)} * (M - 1) + {min(0, line.b)} * (N - 1))"
        members.fields.append(f"const float* {line.name}_line = nullptr;")
        members.values.append("nullptr")
        _methods(line, low, members)


def _methods(line: Line, low: str, members: Members) -> None:
    # Position of index x in the line: x - low upwards, high - x downwards.
    reach = f"{abs(line.a)} * (M - 1) + N"
    top = f"{max(0, line.a) if line.b < 0 else min(0, line.a)} * (M - 1)"
    members.fields += [
        f"int64_t {line.name}_low() const {{ return {low}; }}",
        f"int64_t {line.name}_length() const {{ return {reach}; }}",
    ]
    members.fields.append(f"int64_t {line.name}_first() const {{ return {top}; }}")


def _index(line: Line) -> str:
    return text(line.c, {"M": "int64_t", "N": "int64_t"}, "int64_t")


def size_of(axes: Sequence[int]) -> str:
    """How many indices these batch axes have."""
    return " * ".join(f"B{a}" for a in axes) or "1"


def line_offset(axes: Sequence[int]) -> str:
    """The place of batch index `at` among the indices of these axes."""
    shown = "int64_t(0)"
    for a in axes:
        shown = f"({shown} * B{a} + at[{a}])" if shown != "int64_t(0)" else f"at[{a}]"
    return shown


def decode(axes: Sequence[int], index: str) -> str:
    """Sets `at` from a number that counts through these axes."""
    if not axes:
        return ""
    lines = [f"int64_t rest = {index};"]
    for a in reversed(axes):
        lines.append(f"at[{a}] = rest % B{a};" if a != axes[0] else f"at[{a}] = rest;")
        if a != axes[0]:
            lines.append(f"rest /= B{a};")
    return "\n    ".join(lines)


def tile_struct(plan: Plan, tensors: Mapping[str, str], keep: Keep, more: Sequence[str] = ()) -> str:
    """The struct Tile."""
    fields = [f"const {ctype}* {name};" for name, ctype in tensors.items()]
    for load in plan.loads.values():
        fields += _tile_load(load)
    fields += [f"const float* {line.name};" for line in plan.lines.values()]
    tables = {gather.table for gather in plan.gathers.values()}
    fields += [f"const float* {table};" for table in sorted(tables)]
    types = plan.types
    for symbol in plan.hoisted.values():
        fields.append(f"{types[symbol.name].replace('bool', 'int32_t')}* {symbol};")
    fields += [f"bool any{k}, all{k};" for k in range(len(keep.columns))]
    fields += [f"const uint8_t* cells{k};" for k in range(len(keep.cells))]
    fields += [f"int64_t {name}_low, {name}_high;" for name, x in keep.spans.items() if x.where == "column"]
    newline = "\n    "
    return f"""
  struct Tile {{
    int64_t at[{max(plan.rank, 1)}] = {{}};
    int64_t i0, i1, j0, j1;
    {newline.join([*fields, *more])}
  }};"""


def _tile_load(load: Load) -> list[str]:
    if load.where == "batch":
        return [f"{load.ctype} {load.name};"]
    if load.where == "column":
        ctype = load.operand.ctype
        return [f"const {ctype}* {load.name}_from;", f"const {load.ctype}* {load.name};",
                f"alignas(64) {load.ctype} {load.name}_line[BN];"]  # fmt: skip
    return [f"const {load.operand.ctype}* {load.name};"]


def setters(plan: Plan, tensors: Mapping[str, Operand], keep: Keep, more: Sequence[str] = ()) -> str:
    """Functions that point a tile at a batch index and at keys: at the outer axes first, then at the inner ones."""
    outer = list(range(plan.rank - plan.inner))
    inner = list(range(plan.rank - plan.inner, plan.rank))
    early: list[str] = []
    late: list[str] = []
    early_keys: list[str] = []
    late_keys: list[str] = []
    for name, x in tensors.items():
        late.append(f"t.{name} = {pointer(x, name, range(plan.rank))};")
    for load in plan.loads.values():
        is_late = bool(load.axes & set(inner))
        (late if is_late else early).append(_set_load(load))
        if load.where == "column":
            (late_keys if is_late else early_keys).append(
                f"t.{load.name} = line(t.{load.name}_from + t.j0 * {load.name}_n, {load.name}_n, t.j1 - t.j0, t.{load.name}_line);"
            )
    for line in plan.lines.values():
        axes = sorted(line.axes)
        value = f"t.{line.name} = {line.name}_line + {line_offset(axes)} * {line.name}_stride();"
        (late if line.axes & set(inner) else early).append(value)
    for table in sorted({gather.table for gather in plan.gathers.values()}):
        axes = sorted(next(g.axes for g in plan.gathers.values() if g.table == table))
        value = f"t.{table} = {table}_all + {line_offset(axes)} * {table}_size;"
        (late if set(axes) & set(inner) else early).append(value)
    for k, expr in enumerate(keep.cells):
        axes = sorted(plan.depends(expr)[0])
        early.append(f"t.cells{k} = cells{k}_all + {line_offset(axes)} * cell_count();")
    return f"""
  void outer(Tile& t, int64_t index) const {{
    {_with_at([decode(outer, "index"), *early])}
  }}
  void inner(Tile& t, int64_t index) const {{
    {_with_at([decode(inner, "index"), *late, *more])}
  }}
  void keys(Tile& t) const {{
    {_lines([*early_keys, *_columns(plan, keep), *_spans_of_keys(keep)])}
  }}
  void inner_keys(Tile& t) const {{
    {_lines(late_keys)}
  }}"""


def _with_at(lines: list[str]) -> str:
    return _lines(["[[maybe_unused]] int64_t* const at = t.at;", *lines])


def _lines(lines: list[str]) -> str:
    return "\n    ".join(line for line in lines if line)


def _set_load(load: Load) -> str:
    at = pointer(load.operand, load.name, sorted(load.axes))
    if load.where == "batch":
        return f"t.{load.name} = static_cast<{load.ctype}>(*({at}));"
    return f"t.{load.name}{'_from' * (load.where == 'column')} = {at};"


def _columns(plan: Plan, keep: Keep) -> list[str]:
    """Finds whether conditions on the key alone hold for any, and for all, of a tile's keys."""
    lines = []
    for k, expr in enumerate(keep.columns):
        lines.append(f"t.any{k} = false, t.all{k} = true;")
        inside = []
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol.name in plan.loads:
                load = plan.loads[symbol.name]
                inside.append(f"const {load.ctype} {symbol} = t.{symbol}{'[c]' * (load.where == 'column')};")
        if "j" in {s.name for s in expr.free_symbols}:
            inside.append("const int32_t j = int32_t(t.j0 + c);")
        written, results = statements([expr], plan.types)
        lines.append(f"for (int64_t c = 0; c < t.j1 - t.j0; ++c) {{ {' '.join([*inside, *written])} "
                     f"const bool kept = {results[0]}; t.any{k} |= kept; t.all{k} &= kept; }}")  # fmt: skip
    return lines


def _spans_of_keys(keep: Keep) -> list[str]:
    """Finds the least and greatest value of loads over a tile's keys."""
    return [
        f"t.{name}_low = least(t.{name}, 1, t.j1 - t.j0), t.{name}_high = greatest(t.{name}, 1, t.j1 - t.j0);"
        for name, load in keep.spans.items()
        if load.where == "column"
    ]


def _spans_of_rows(keep: Keep) -> str:
    return "".join(
        f"\n    const int64_t {name}_low = {_over_rows('least', name)}, {name}_high = {_over_rows('greatest', name)};"
        for name, load in keep.spans.items()
        if load.where == "row"
    )


def _over_rows(function: str, name: str) -> str:
    return f"{function}(t.{name} + i0 * {name}_m, {name}_m, i1 - i0 + 1)"


def ranges(plan: Plan, keep: Keep, softmax: bool) -> str:
    """Functions that say which keys some rows keep, and which of a tile's columns a loop has to visit."""
    possible, certain = keep.possible(), keep.certain()
    first, end = keep.bounds()
    loads = "".join(
        f"\n    [[maybe_unused]] const int64_t {name} = t.{name};"
        for name, load in plan.loads.items()
        if load.where == "batch" and load.ctype != "float"
    )
    whole = "&& to <= t.j1 - t.j0 " if softmax else ""
    return f"""
  // The keys that rows i0 to i1 may keep.
  void bounds(const Tile& t, [[maybe_unused]] int64_t i0, [[maybe_unused]] int64_t i1, int64_t& first, int64_t& end) const {{{loads}
    first = std::max<int64_t>(0, {first});
    end = std::min<int64_t>(N, {end});
  }}
  // The columns that a loop over rows i0 to i1 visits, in whole registers.
  Range range(const Tile& t, [[maybe_unused]] int64_t i0, [[maybe_unused]] int64_t i1) const {{{loads}{_spans_of_rows(keep)}
    int64_t first, end;
    bounds(t, i0, i1, first, end);
    const int64_t from = round_down(std::max<int64_t>(first - t.j0, 0), PANEL), to = round_up(std::min(end, t.j1) - t.j0, W);
    if (end <= first || std::max(first, t.j0) >= std::min(end, t.j1)) return {{0, 0, SKIPPED}};
    [[maybe_unused]] const int64_t j0 = t.j0 + from, j1 = std::min(t.j0 + to, t.j1) - 1;
    if (!{possible}) return {{0, 0, SKIPPED}};
    return {{from, to, {certain} {whole}? KEPT : MASKED}};
  }}"""


def tables(plan: Plan) -> tuple[str, str]:
    """(members, statements of `run`) that lay out the tables as floats."""
    members, lines = [], []
    for line in plan.lines.values():
        axes = sorted(line.axes)
        x = plan.extras[line.table]
        value = "low + x" if line.b > 0 else "low + length - 1 - x"
        members.append(f"int64_t {line.name}_stride() const {{ return {line.name}_length() + 2 * W; }}")
        lines.append(f"""
    Floats {line.name}_memory({size_of(axes)} * {line.name}_stride());
    {line.name}_line = {line.name}_memory;
    for (int64_t b = 0; b < {size_of(axes)}; ++b) {{
      [[maybe_unused]] int64_t at[{max(plan.rank, 1)}];
      {decode(axes, "b")}
      float* const to = {line.name}_memory + b * {line.name}_stride();
      const int64_t low = {line.name}_low(), length = {line.name}_length();
      for (int64_t x = 0; x < length; ++x) to[x] = entry({pointer(x, line.table, axes)}, {line.table}_t, {line.table}_size, {value}, {line.table[1:]}, bad);
      std::fill(to + length, to + {line.name}_stride(), 0.0f);
    }}""")
    for table in sorted({gather.table for gather in plan.gathers.values()}):
        x = plan.extras[table]
        axes = [a for a in range(plan.rank) if x.sizes[a] != "1"]
        members.append(f"const float* {table}_all = nullptr;")
        if x.ctype == "float" and x.strides[-1] == "1" and not axes:
            lines.append(f"\n    {table}_all = {table};")
            continue
        lines.append(f"""
    Floats {table}_memory({size_of(axes)} * {table}_size);
    {table}_all = {table}_memory;
    for (int64_t b = 0; b < {size_of(axes)}; ++b) {{
      [[maybe_unused]] int64_t at[{max(plan.rank, 1)}];
      {decode(axes, "b")}
      read({pointer(x, table, axes)}, {table}_t, {table}_size, {table}_memory + b * {table}_size);
    }}""")
    return "".join(f"\n  {x}" for x in members), "".join(lines)
