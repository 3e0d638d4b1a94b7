"""Triton for the output of an attention: a program keeps a tile of queries and loops over tiles of keys.

Under a softmax the sum is rescaled whenever a larger score is met (online softmax). A row whose kept scores are all
negligible is computed again from the full score of every key, in a second loop that runs only where there is one.

For the gradients each row keeps its largest score and the log of the sum of exp(score - largest), not their sum: that
of a row of -1e9 would lose the log.
"""

import math
import textwrap
from collections.abc import Sequence

import sympy
from torch import Tensor

from recompile.lowering.attention.triton_frame import Launch, kernel
from recompile.lowering.attention.triton_schedule import Schedule, choose, padded
from recompile.lowering.attention.triton_tile import Problem, Tile
from recompile.lowering.lookup.triton_kernel import indent
from recompile.lowering.score_triton import Statements, bare, in_powers_of_two

LN2 = "0.6931471805599453"


def launch(problem: Problem, out: Tensor, lse: Tensor) -> Launch:
    """The launch that fills `out`, and `lse` under a softmax."""
    frame = problem.frame()
    for name, x in (("q", problem.q), ("k", problem.k), ("v", problem.v), ("out", out)):
        frame.tensor(name, x, 2)
    if problem.spec.softmax:
        frame.tensor("lse", lse, 2)
    tile = Tile(problem, frame, "i")
    body = [*tile.positions(), tile.rows("q", "q", problem.q, "i"), *tile.loads(kept=True)]
    body += _softmax(tile, out) if problem.spec.softmax else _plain(tile, out)
    return kernel(
        "attention", title(problem), frame, "BLOCK_M", problem.m, body, schedules(problem, "forward")
    )


def schedules(problem: Problem, name: str) -> list[Schedule]:
    """What to try for one of the kernels."""
    width = max(problem.dim, problem.value_dim)
    heavy = any(name[0] == "T" or problem.varies(name) == {"i", "j"} for name in problem.spec.extras)
    return choose(name, problem.dtype, width, heavy, problem.m, problem.n)


def title(problem: Problem) -> str:
    """What a kernel computes, for its reader."""
    spec = problem.spec
    over = "softmax over j of " if spec.softmax else ""
    lines = ["out[i] = sum over j of p[i, j] * v[j]", "s = <q[i], k[j]>", f"p = {over}{spec.score}"]
    lines += [f"    times {spec.weight}"] if spec.weight else []
    lines += [f"    where {spec.keep}, else 0"] if problem.skips else []
    filled = [textwrap.fill(line, 110, subsequent_indent="        ") for line in lines]
    return textwrap.indent("\n".join(["attention", *filled]), "    ").strip()


def _plain(tile: Tile, out: Tensor) -> list[str]:
    problem = tile.problem
    before, head = tile.span(problem.keep)
    printer = tile.statements([problem.kept, problem.keep])
    score = [*tile.define(printer, "p", problem.kept), *mask(tile, printer, problem.keep)]
    return [
        f"acc = tl.zeros([BLOCK_M, {padded(problem.value_dim)}], tl.float32)",
        *before,
        head,
        *indent([*_step(tile, score), "p = tl.where(inside, p, 0.0)", *_add(tile, "acc")]),
        _store(tile, out, "acc"),
    ]


def _softmax(tile: Tile, out: Tensor) -> list[str]:
    problem = tile.problem
    before, head = tile.span(problem.keep)
    first = _rows(tile, out, problem.kept, problem.keep, head, problem.in_powers_of_two, "")
    if not problem.skips:
        return first
    settled = f"({_natural(problem.in_powers_of_two)} > {negligible(problem)})"
    unsettled = f"unsettled = (queries < {tile.sizes['i']}) & ~{settled}"
    # Not in powers of two: -1e9 plus a score is to be rounded as eager rounds it.
    again = _rows(tile, out, problem.score, sympy.true, tile.whole(), False, "unsettled")
    # q is loaded again, lest it be held in registers, as the matrix unit takes it, over both loops.
    again = [tile.rows("q", "q", problem.q, "i"), *again]
    return [*before, *first, unsettled, "if tl.max(unsettled.to(tl.int32)) > 0:", *indent(again)]


def negligible(problem: Problem) -> str:
    value = problem.spec.negligible
    return repr(value) if math.isfinite(value) else f'float("{value}")'


def _natural(twos: bool) -> str:
    return f"most * {LN2}" if twos else "most"


def _rows(
    tile: Tile, out: Tensor, score: sympy.Basic, keep: sympy.Basic, head: str, twos: bool, which: str
) -> list[str]:
    """The softmax over the keys that the loop meets, and its store; of the rows `which` only, if given."""
    problem = tile.problem
    exp = "tl.exp2" if twos else "tl.exp"
    score = in_powers_of_two(score) if twos else score
    printer = tile.statements([score, keep, problem.weight])
    lines = [*tile.define(printer, "score", score), *mask(tile, printer, keep)]
    weight = printer.define("weight", problem.weight) if problem.weight != 1 else []
    step = [
        *_step(tile, lines),
        'score = tl.where(inside, score, float("-inf"))',
        "larger = tl.maximum(most, tl.max(score, 1))",
        # Before the first kept key the largest is -inf, and -inf - -inf is NaN.
        'shift = tl.where(larger == float("-inf"), 0.0, larger)',
        f"p = {exp}(score - shift[:, None])",
        f"rescale = {exp}(most - shift)",
        "total = total * rescale + tl.sum(p, 1)",
        *weight,
        *(["p = p * weight"] if weight else []),
        *_add(tile, "acc * rescale[:, None]"),
        "most = larger",
    ]
    inside = which or f"queries < {tile.sizes['i']}"
    log_total = f"tl.log2(total) * {LN2}" if twos else "tl.log(total)"
    return [
        'most = tl.full([BLOCK_M], float("-inf"), tl.float32)',
        "total = tl.zeros([BLOCK_M], tl.float32)",
        f"acc = tl.zeros([BLOCK_M, {padded(problem.value_dim)}], tl.float32)",
        head,
        *indent(step),
        *(["total = tl.where(most == float('-inf'), 1.0, total)"] if problem.spec.safe else []),
        _store(tile, out, "acc / total[:, None]", which),
        f"tl.store(lse_at + queries * 2, {_natural(twos)}, mask={inside})",
        f"tl.store(lse_at + queries * 2 + 1, {log_total}, mask={inside})",
    ]


def _step(tile: Tile, score: Sequence[str]) -> list[str]:
    """The start of a step: everything up to the scores."""
    return [
        *tile.next_positions(),
        tile.rows("k", "k", tile.problem.k, "j"),
        f"s = {tile.dot('q', 'tl.trans(k)')}",
        *tile.loads(kept=False),
        *score,
    ]


def mask(
    tile: Tile, printer: Statements, keep: sympy.Basic, queries: bool = False, more: str = ""
) -> list[str]:
    """Declares `inside`: the pairs that a step counts."""
    here = tile.inside("ij" if queries else "j")
    if keep == sympy.true:
        return [f"inside = {bare(here + more)}"]
    lines, text = printer.value(keep)
    return [*lines, f"inside = {here}{more} & {text}"]


def _add(tile: Tile, acc: str) -> list[str]:
    v = tile.rows("v", "v", tile.problem.v, "j")
    return [v, f"acc = {tile.dot(tile.narrow('p'), 'v', acc)}"]


def _store(tile: Tile, out: Tensor, value: str, which: str = "") -> str:
    at, inside = tile.row_address("out", out, "i")
    inside += f" & {which}[:, None]" if which else ""
    narrow = tile.narrow(f"({value})" if " " in value else value)
    return f"tl.store({at}, {narrow}, mask={inside})"
