"""C++ for the backward of an attention on the CPU: scores are computed again, tile by tile.

With g = <grad[i], v[j]> and the slopes of the score (reference.py has the formulas), a tile of P and one of dS are formed
in place of the products Q K^T and grad V^T; then dV += P^T grad, dK += dS^T Q, dQ += dS K. An item of work is one index of
the outer batch axes and some of the inner ones, or where these are few, one tile of keys of them. What several threads
would add to (a table's gradient, or that of Q where threads share it) each adds up by itself; it is summed at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import add

from recompile.lowering.attention import cpp_gradients as gradients
from recompile.lowering.attention.cpp import PARALLEL, hoisted_memory, tile_size
from recompile.lowering.attention.cpp_backward_text import (
    DELTA,
    EACH_ROW,
    FEW,
    MANY,
    PACK,
    RUN,
    SCRATCH,
    SHARED,
    VISIT,
    WIDE,
)
from recompile.lowering.attention.cpp_cells import cells
from recompile.lowering.attention.cpp_keep import Keep
from recompile.lowering.attention.cpp_pairs import hoisting
from recompile.lowering.attention.cpp_plan import Plan
from recompile.lowering.attention.cpp_slopes import Slopes
from recompile.lowering.attention.cpp_struct import (
    Members,
    declare_extras,
    line_offset,
    ranges,
    setters,
    size_of,
    tables,
    tile_struct,
)
from recompile.lowering.attention.cpp_tiles import OPTIONS, OPTIONS_END, TILES
from recompile.lowering.attention.spec import Attention
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.score_cpp import MATH, literal

# Query rows and keys in a tile, at most: two tiles of pairs are 16 KiB each, beside packed Q, K, V and grad.
ROWS, KEYS = 66, 64


@dataclass(frozen=True)
class Given:
    """What the backward is given."""

    grad: Operand
    q: Operand
    k: Operand
    v: Operand
    extras: Sequence[Operand]
    out: Operand
    lse: Operand


def backward(
    spec: Attention, given: Given, outputs: Sequence[Operand], wanted: Sequence[int], threads: int
) -> tuple[str, str]:
    """(functions, body of the kernel) that compute the gradients of q, k, v and of the extras `wanted`."""
    q, k = given.q, given.k
    rank = len(q.sizes) - 2
    names = [spec.extras[e] for e in wanted]
    plan = Plan.of(spec, rank, given.extras, q.sizes[-2], k.sizes[-2])
    keep = Keep(plan, plan.named(spec.keep))
    pairs = Slopes(plan, keep.expr, names)
    members = _members(plan, given, outputs, names)
    tensors = {"q": q, "k": k, "v": given.v, "grad": given.grad}
    if spec.softmax:
        tensors |= {"out": given.out, "lse": given.lse}
    found = pairs.targets
    fields = [
        "float *p, *d;",
        "float *dq_all, *dk_all, *dv_all, *dq, *dk, *dv;",
        *gradients.fields(plan, found),
    ]
    later = [f"t.d{x} = t.d{x}_all{_strided('d' + x, range(rank))};" for x in "qkv"]
    later += gradients.pointers(plan, found)
    ranged = ranges(plan, keep, softmax=False)
    laid_out, prepare = map(add, tables(plan), cells(plan, keep.cells, threads))
    for name in pairs.by_row:
        fields.append(f"const float* {name};")
        later.append(f"t.{name} = {name} + {line_offset(range(rank))} * M;")
        laid_out += f"\n  const float* {name} = nullptr;"
    slots = gradients.slots_of(plan, found)
    how = FEW if plan.is_few else MANY
    shared = "\n          shared(t, i, 0, to, bad);" if plan.hoisted else ""
    normalized = f"norm[i] = {'norm[i] == 0 ? top[i] = 0.0f : ' * spec.safe}1.0f / norm[i];"
    wide = WIDE.format(negligible=literal(spec.negligible), shared=shared, normalized=normalized)
    text = f"""
// The backward of {spec.score}{" for each pair, a softmax over the keys" if spec.softmax else ""}, where {spec.keep}
struct AttentionBackward {{
  {members}{laid_out}
{tile_struct(plan, {name: x.ctype for name, x in tensors.items()}, keep, fields)}
{setters(plan, tensors, keep, later)}{ranged}{hoisting(plan, [n for n, shared in slots.items() if shared])}
{pairs}{gradients.collecting(plan, found)}
{_scratch(plan, pairs)}{wide * spec.softmax}{PACK.format(packed=how["packed"])}{_visit(plan, pairs, how)}{_run(plan, pairs, names, prepare, threads)}
}};
"""
    body = f"\n  AttentionBackward{{{', '.join(members.values)}}}.run();"
    return f"{OPTIONS}{MATH}{TILES}{gradients.GRADIENTS}{text}{OPTIONS_END}", body


def _members(plan: Plan, given: Given, outputs: Sequence[Operand], names: Sequence[str]) -> Members:
    members = Members()
    batch = [str(a) for a in range(plan.rank)]
    q, k, v = given.q, given.k, given.v
    for name, value in (("M", q.sizes[-2]), ("N", k.sizes[-2]), ("D", q.sizes[-1]), ("E", v.sizes[-1])):
        members.number(name, value)
    for a in range(plan.rank):
        members.number(f"B{a}", given.grad.sizes[a])
    members.constants += [
        f"BM = round_up({tile_size(q.sizes[-2], ROWS)}, R)",
        f"BN = round_up({tile_size(k.sizes[-2], KEYS)}, PANEL)",
    ]
    dims = {"q": "md", "k": "nd", "v": "ne", "grad": "me", "out": "me", "lse": "m"}
    shown = "q k v grad out lse" if plan.spec.softmax else "q k v grad"
    for name in shown.split():
        members.operand(name, getattr(given, name), [*batch, *dims[name]])
    for name, x in zip("qkv", outputs[:3], strict=True):
        members.operand(f"d{name}", x, [*batch, *dims[name]], output=True)
        members.number(f"d{name}_elements", _numel(x))
    for name, x in zip(names, outputs[3:], strict=True):
        members.operand(f"d{name}", x, [*batch, *("t" if name[0] == "T" else "mn")], output=True)
        members.number(f"d{name}_elements", _numel(x))
    declare_extras(plan, members)
    return members


def _scratch(plan: Plan, pairs: Slopes) -> str:
    tiles = "".join(f", {e}{{BM * BN}}" for e in gradients.tiles_of(pairs.targets))
    slots = "".join(f"\n    Memory<int32_t> {name}_slots{{BM * BN}};" for name in pairs.slots)
    return SCRATCH.format(tiles=tiles, slots=slots, hoisted=hoisted_memory(plan))


def _visit(plan: Plan, pairs: Slopes, how: Mapping[str, str]) -> str:
    tiles = gradients.tiles_of(pairs.targets)
    summed = [e for e, target in tiles.items() if target.shared]
    chosen = "if (kind == KEPT) pairs_kept({0}); else pairs_masked({0});"
    if pairs.spec.softmax:
        chosen = "if (is_wide(t.lse[(i0 + i) * lse_m])) pairs_full({0}); else " + chosen
    wide = "w.wide[i0 / R] ? Range{0, round_up(n, W), MASKED} : " if pairs.spec.softmax else ""
    here = [not target.shared for target in pairs.targets]
    collect = "collect(t, i, from, std::min(to, n));"
    return VISIT.format(
        keys=how["keys"],
        products=how["products"],
        range=f"{wide}range(t, i0, i1 - 1)",
        shared=SHARED if plan.hoisted or any(pairs.slots.values()) else "",
        zeroed="".join(f"\n    std::fill(t.{e}, t.{e} + BM * BN, 0.0f);" for e in summed),
        pairs=chosen.format("t, i0 + i, p + i * BN, d + i * BN, from, to, bad"),
        collect=EACH_ROW.format(call=collect) if any(here) else "",
        collect_shared=EACH_ROW.format(call=collect.replace("collect", "collect_shared"))
        if not all(here)
        else "",
    )


def _strided(name: str, axes: Sequence[int]) -> str:
    return "".join(f" + at[{a}] * {name}_{a}" for a in axes)


def _owned(plan: Plan, name: str, by_key: str) -> str:
    """Whether no two items add to the same element of a gradient."""
    conditions = [by_key]
    for a in range(plan.rank):
        alone = f"B{a} == 1" + (" || groups == 1" if a >= plan.rank - plan.inner else "")
        conditions.append(f"({name}_{a} != 0 || {alone})")
    return " && ".join(c for c in conditions if c) or "true"


def _fresh(plan: Plan, name: str, by_key: str) -> str:
    """Whether an item adds to its part of a gradient for one batch index only: it sets the part first."""
    alone = [f"({name}_{a} != 0 || B{a} == 1)" for a in range(plan.rank)]
    return " && ".join(c for c in ("M > 0", by_key, *alone) if c)


def _numel(x: Operand) -> str:
    known = math.prod(int(size) for size in x.sizes if size.isdigit())
    return " * ".join([str(known), *(f"({size})" for size in x.sizes if not size.isdigit())])


def _run(plan: Plan, pairs: Slopes, names: Sequence[str], prepare: str, threads: int) -> str:
    outer = list(range(plan.rank - plan.inner))
    inner = list(range(plan.rank - plan.inner, plan.rank))
    owned = {"dq": "!by_key", "dk": "", "dv": ""}
    for name in names:
        if name[0] != "T":
            owned[f"d{name}"] = "" if plan.loads[name].by_column else "!by_key"
    created = "".join(
        f"\n    const Gradient {name}_sum({name}, {name}_elements, {_owned(plan, name, by_key)}, {threads});"
        for name, by_key in owned.items()
    )
    return RUN.format(
        outer_size=size_of(outer),
        inner_size=size_of(inner),
        threads=threads,
        prepare=prepare,
        created=created + gradients.parts(plan, pairs.targets, threads),
        fresh="".join(
            f"\n    const bool fresh_{x} = {_fresh(plan, 'd' + x, '!by_key' * (x == 'q'))};" for x in "qkv"
        ),
        cleared="".join(
            f"\n      {f'if (!fresh_{name[1:]}) ' * (name in ('dq', 'dk', 'dv'))}{name}_sum.clear(thread, count);"
            for name in owned
        ),
        delta=DELTA if plan.spec.softmax else "",
        by_row="".join(
            f"\n    Floats {name}_memory({size_of(range(plan.rank))} * M);\n    {name} = {name}_memory;"
            for name in pairs.by_row
        ),
        pointed="".join(f"\n      t.{name}_all = {name}_sum.of(thread);" for name in owned)
        + "".join(
            f"\n      t.d{t.name}_all = d{t.name}_part.of(thread);"
            for t in pairs.targets
            if t.name not in plan.loads
        ),
        scratch="".join(f"\n      t.{x} = w.{x};" for x in _tile_memory(plan, pairs)),
        wide="\n        find_wide(t, r0, r1, w);" if pairs.spec.softmax else "",
        finished="".join(f"\n      {name}_sum.finish(thread, count);" for name in owned),
        totals=gradients.table_totals(plan, pairs.targets, names, threads),
        parallel=PARALLEL,
    )


def _tile_memory(plan: Plan, pairs: Slopes) -> list[str]:
    return [
        *"pd",
        *gradients.tiles_of(pairs.targets),
        *(f"{name}_slots" for name in pairs.slots),
        *(symbol.name for symbol in plan.hoisted.values()),
    ]
