"""Where the bags' values go: straight into a concatenation, or to a scratch buffer that only sums read.

The first phase of the kernel writes each bag once, to its *place*. The second walks the samples and does what is left:
sums over the fields, copies of other values into a concatenation, and bags that more than one output holds.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from recompile.lowering.lookup.cpp_common import Operand, part_width, plus
from recompile.lowering.lookup.spec import Lookup, Output


@dataclass(frozen=True)
class Place:
    """`width` columns of a buffer `[B, stride]`, from `column` on."""

    base: str
    column: str
    stride: str
    ctype: str
    width: str

    @property
    def pointer(self) -> str:
        """The place in sample 0."""
        return self.base if self.column == "0" else f"{self.base} + {self.column}"


def find_places(
    spec: Lookup, weights: Sequence[Operand], sources: Sequence[Operand], outs: Sequence[Operand]
) -> tuple[dict[int, Place], str]:
    """Each bag's place, and the declaration of the scratch buffer ("" if none is needed)."""
    places: dict[int, Place] = {}
    for out, operand in zip(spec.outputs, outs, strict=True):
        for part, place in _columns(out, operand, spec, sources):
            if part >= 0:
                places.setdefault(part, place)
    ctype = "double" if any(w.ctype == "double" for w in weights) else "float"
    column = "0"
    for j in range(len(spec.bags)):
        if j not in places:
            wide = part_width(j, spec, sources)
            places[j] = Place("scratch.get()", column, "scratch_stride", ctype, wide)
            column = plus(column, wide)
    if column == "0":
        return places, ""
    return places, (
        f"const int64_t scratch_stride = {column};  // values that only sums read\n  "
        f"std::unique_ptr<{ctype}[]> scratch(new {ctype}[B * scratch_stride]);"
    )


def _columns(
    out: Output, operand: Operand, spec: Lookup, sources: Sequence[Operand]
) -> list[tuple[int, Place]]:
    """A concatenation's parts and where each stands in it."""
    if out.kind != "concat":
        return []
    found, column = [], "0"
    for part in out.parts:
        wide = part_width(part, spec, sources)
        found.append((part, Place(operand.pointer, column, operand.strides[0], operand.ctype, wide)))
        column = plus(column, wide)
    return found


def second_phase(
    spec: Lookup, sources: Sequence[Operand], outs: Sequence[Operand], places: dict[int, Place]
) -> tuple[list[str], str]:
    """(tables, code) of the copies and sums; empty if there are none."""
    tables: list[str] = []
    steps: list[str] = []
    for o, (out, operand) in enumerate(zip(spec.outputs, outs, strict=True)):
        write = _copies if out.kind == "concat" else _sums
        write(o, out, operand, spec, sources, places, tables, steps)
    if not steps:
        return [], ""
    newline = "\n      "
    return (
        tables,
        f"""
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int64_t b = 0; b < B; ++b) {{
      {newline.join(steps)}
    }}""",
    )


def _copies(
    o: int,
    out: Output,
    operand: Operand,
    spec: Lookup,
    sources: Sequence[Operand],
    places: dict[int, Place],
    tables: list[str],
    steps: list[str],
) -> None:
    pieces: dict[str, list[str]] = defaultdict(list)
    for part, target in _columns(out, operand, spec, sources):
        source = _place(part, sources, places)
        if source != target:
            entry = f"{source.pointer}, {source.stride}, {source.width}, {target.pointer}"
            pieces[source.ctype].append(entry)
    for ctype, entries in pieces.items():
        name = f"copies{o}_{len(tables)}"
        fields = f"const {ctype}* from; int64_t stride, width; {operand.ctype}* to;"
        tables.append(_table(name, fields, entries))
        steps.append(
            f"for (const auto& c : {name}) for (int64_t d = 0; d < c.width; ++d) "
            f"c.to[b * {operand.strides[0]} + d] = c.from[b * c.stride + d];"
        )


def _sums(
    o: int,
    out: Output,
    operand: Operand,
    spec: Lookup,
    sources: Sequence[Operand],
    places: dict[int, Place],
    tables: list[str],
    steps: list[str],
) -> None:
    acc = "double" if operand.ctype == "double" else "float"
    add = "add_square" if out.kind == "sum_of_squares" else "add"
    pieces: dict[str, list[str]] = defaultdict(list)
    for place in _merged([_place(p, sources, places) for p in out.parts]):
        pieces[place.ctype].append(f"{place.pointer}, {place.stride}, {place.width}")
    lines = [f"{{ Values<{acc}, {out.width}> sum;"]
    for ctype, entries in pieces.items():
        name = f"addends{o}_{len(tables)}"
        tables.append(_table(name, f"const {ctype}* from; int64_t stride, width;", entries))
        lines.append(
            f"  for (const auto& a : {name}) for (int64_t d = 0; d < a.width; d += {out.width}) "
            f"sum.{add}(a.from + b * a.stride + d);"
        )
    steps += [*lines, f"  sum.write({operand.pointer} + b * {operand.strides[0]}); }}"]


def _merged(places: list[Place]) -> list[Place]:
    """Neighbours in the same buffer as one."""
    found: list[Place] = []
    for place in places:
        last = found[-1] if found else None
        if last and last.base == place.base and plus(last.column, last.width) == place.column:
            found[-1] = Place(last.base, last.column, last.stride, last.ctype, plus(last.width, place.width))
        else:
            found.append(place)
    return found


def _place(part: int, sources: Sequence[Operand], places: dict[int, Place]) -> Place:
    if part >= 0:
        return places[part]
    x = sources[~part]
    return Place(x.pointer, "0", x.strides[0], x.ctype, x.size(1))


def _table(name: str, fields: str, entries: list[str]) -> str:
    listed = ",\n    ".join("{" + entry + "}" for entry in entries)
    return f"const struct {{ {fields} }} {name}[] = {{\n    {listed}}};"
