"""One canonical spelling for each of many: small functions that `canonicalize` applies, node by node.

Each is given the node, its arguments by schema name, and a builder of nodes; it returns what the node
is, spelled canonically, or None where that is the node itself. None of them changes a bit of any value; where
a tensor is used several times, its gradient may be the same sum in another order.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from recompile.rewrite import Builder, arguments, same, same_strides
from recompile.torch_private.symbols import SYM, constant

aten = torch.ops.aten
Spelling = Callable[[fx.Node, dict[str, Any], Builder], "fx.Node | None"]
SPELLINGS: dict[Any, list[Spelling]] = defaultdict(list)  # operator -> its spellings, in the order tried


def spelling(*targets: Any) -> Callable[[Spelling], Spelling]:
    """Try this function on every node that calls one of these operators."""

    def add(function: Spelling) -> Spelling:
        for target in targets:
            SPELLINGS[target].append(function)
        return function

    return add


def spellings_of(node: fx.Node) -> list[Spelling]:
    """What to try on `node`."""
    target = node.target.overloadpacket if isinstance(node.target, OpOverload) else node.target
    return SPELLINGS.get(target, [])


ALIASES = {
    aten.absolute: aten.abs, aten.negative: aten.neg, aten.fix: aten.trunc, aten.clip: aten.clamp,
    aten.subtract: aten.sub, aten.multiply: aten.mul, aten.divide: aten.div, aten.true_divide: aten.div,
    aten.not_equal: aten.ne, aten.less: aten.lt, aten.less_equal: aten.le,
    aten.greater: aten.gt, aten.greater_equal: aten.ge, aten.special_expit: aten.sigmoid,
    aten.arccos: aten.acos, aten.arccosh: aten.acosh, aten.arcsin: aten.asin, aten.arcsinh: aten.asinh,
    aten.arctan: aten.atan, aten.arctanh: aten.atanh, aten.arctan2: aten.atan2,
}  # fmt: skip


@spelling(*ALIASES)
def operator_from_alias(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`multiply`, `clip`, `less_equal`, NumPy's names, are `mul`, `clamp`, `le`."""
    op: Any = node.target
    return build.call(getattr(ALIASES[op.overloadpacket], op._overloadname), *node.args, **node.kwargs)


@spelling(aten.detach)
def drop_detach(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`x.detach()` is `x` if that is made of integers: it has no gradient."""
    return None if _may_have_gradient(node.args[0]) else node.args[0]  # type: ignore[arg-type,return-value]


def _may_have_gradient(node: fx.Node) -> bool:
    """Whether a real number, as only these have gradients, comes into the graph above `node`, through real ones."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        value = node.meta.get("val")
        real = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())
        if isinstance(value, (Tensor, *SYM)) and not real:
            continue
        if node.op != "call_function":
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        todo += new
    return False


@spelling(torch.tensor, torch.as_tensor)
def full_from_tensor(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`torch.tensor(-1e9)` is `full([], -1e9)`."""
    value = node.meta["val"]
    if len(node.args) != 1 or not isinstance(node.args[0], (bool, int, float)):
        return None
    if not node.kwargs.keys() <= {"dtype", "device"}:
        return None
    return build.call(aten.full.default, [], node.args[0], dtype=value.dtype, device=value.device)


_FILLED = {
    aten.new_zeros: aten.zeros, aten.zeros_like: aten.zeros, aten.new_ones: aten.ones, aten.ones_like: aten.ones,
    aten.new_full: aten.full, aten.full_like: aten.full,
}  # fmt: skip


@spelling(*_FILLED)
def filled_from_like(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`x.new_zeros(size)`, and `ones_like(x)` of a known size, are `zeros` and `ones`, which do not read x."""
    value, op = node.meta["val"], node.target.overloadpacket  # type: ignore[union-attr]
    size = given.get("size", list(value.shape))
    plain = value.is_contiguous() and value.layout is torch.strided and not given["pin_memory"]
    if not plain or any(isinstance(n, SYM) for n in size):
        return None
    fill = [given["fill_value"]] if "fill_value" in given else []
    return build.call(_FILLED[op].default, size, *fill, dtype=value.dtype, device=value.device)


@spelling(
    aten.view, aten.reshape, aten.view_as, aten.reshape_as, aten.flatten, aten.unflatten, aten.squeeze,
    aten.expand, aten.expand_as, aten.broadcast_to, aten.permute, aten.slice, aten.narrow, aten.alias,
    aten.contiguous, aten.clone, aten.to, aten._to_copy, aten.type_as, aten.dropout, aten.feature_dropout,
)  # fmt: skip
def drop_no_op(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`x[:]`, `x.view(x.shape)`, `x.float()` of a float, `x.contiguous()`, dropout in evaluation, or of 0: `x`."""
    source = node.args[0]
    old, new = _val(source), node.meta["val"]
    drops = given.get("train") and given["p"] != 0
    if drops or (old.dtype, old.device, old.layout) != (new.dtype, new.device, new.layout):
        return None
    if not same(old.shape, new.shape) or not same_strides(old, new):
        return None
    if _lays_out(node, given) and not _layout_is_known(source):  # type: ignore[arg-type]
        return None
    return source  # type: ignore[return-value]


@spelling(aten.cat, aten.concat, aten.concatenate)
def drop_cat_of_one(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`cat([x])` is `x`."""
    first, *others = given["tensors"]
    laid_out = same_strides(_val(first), node.meta["val"]) and _layout_is_known(first)
    return first if laid_out and not others else None


@spelling(aten.type_as, aten.to, aten._to_copy)
def cast_to_dtype(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """A cast that changes nothing but the dtype is `to.dtype(x, dtype)`."""
    source, new = node.args[0], node.meta["val"]
    old = _val(source)
    if node.target is aten.to.dtype or old.dtype == new.dtype or _lays_out(node, given):
        return None
    if (old.device, old.layout) != (new.device, new.layout) or not same_strides(old, new):
        return None
    return build.equal(aten.to.dtype, source, new.dtype)


@spelling(operator.getitem)
def select_from_unbind(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`unbind(x, d)[i]` is `select(x, d, i)`."""
    pieces, index = node.args
    if not isinstance(pieces, fx.Node) or pieces.target is not aten.unbind.int:
        return None
    return build.equal(aten.select.int, pieces.args[0], _dim(pieces), index)


@spelling(operator.getitem)
def expand_from_meshgrid(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`meshgrid(a, b)[0]` is `expand(reshape(a, [-1, 1]), ...)`."""
    grids, place = node.args
    if not isinstance(grids, fx.Node) or grids.target not in (aten.meshgrid.default, aten.meshgrid.indexing):
        return None
    asked = arguments(grids)
    tensors, columns_first = asked["tensors"], asked.get("indexing") == "xy"
    dim = 1 - place if columns_first and len(tensors) > 1 and place < 2 else place  # type: ignore[operator]
    line = build.call(
        aten.reshape.default, tensors[place], [-1 if k == dim else 1 for k in range(len(tensors))]
    )
    return build.call(aten.expand.default, line, list(node.meta["val"].shape))


_EQUAL_PIECES = (aten.split.Tensor, aten.chunk.default)  # equal but for the last
_PIECES = (aten.split.sizes, aten.split_with_sizes.default, aten.tensor_split.sections)


@spelling(operator.getitem)
def slice_from_split(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`split(x, n, d)[i]` is `slice(x, d, i * n, (i + 1) * n)`, likewise for `chunk`."""
    pieces, index = node.args
    if not isinstance(pieces, fx.Node) or pieces.target not in (*_EQUAL_PIECES, *_PIECES):
        return None
    if not isinstance(index, int) or index < 0:
        return None
    dim, values = _dim(pieces), pieces.meta["val"]
    before = [0] if pieces.target in _EQUAL_PIECES else range(index)
    sizes = [_int(values[i].shape[dim]) for i in (*before, index)]
    if None in sizes:
        return None
    start = sizes[0] * index if pieces.target in _EQUAL_PIECES else sum(sizes[:-1])
    return build.equal(aten.slice.Tensor, pieces.args[0], dim, start, start + sizes[-1])


@spelling(aten.narrow)
def slice_from_narrow(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`narrow(x, d, start, n)` is `slice(x, d, start, start + n)`."""
    start, length = given["start"], given["length"]
    if type(start) is not int or type(length) is not int or start < 0:
        return None
    return build.equal(aten.slice.Tensor, given["self"], given["dim"], start, start + length)


@spelling(aten.stack)
def cat_from_stack(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`stack([a, b], d)` is `cat([unsqueeze(a, d), unsqueeze(b, d)], d)`."""
    dim = given["dim"]
    return build.call(
        aten.cat.default, [build.call(aten.unsqueeze.default, x, dim) for x in given["tensors"]], dim
    )


@spelling(aten.concat, aten.concatenate)
def cat_from_concat(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`concat` is `cat`."""
    return build.call(aten.cat.default, given["tensors"], given["dim"]) if type(given["dim"]) is int else None


@spelling(aten.cat)
def flatten_cat(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`cat([cat([a, b], d), c], d)` is `cat([a, b, c], d)`, where nobody else uses the inner one."""
    dim, dtype = given["dim"], node.meta["val"].dtype
    new: list[fx.Node] = []
    for x in given["tensors"]:
        inner = x.target is aten.cat.default and len(x.users) == 1 and _dim(x) == dim
        new += arguments(x)["tensors"] if inner and _val(x).dtype == dtype else [x]
    return build.call(aten.cat.default, new, dim) if len(new) > len(given["tensors"]) else None


@spelling(aten.t, aten.transpose, aten.swapaxes, aten.swapdims, aten.numpy_T, aten.mT)
def permute_from_transpose(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`t(x)` and `transpose(x, a, b)` are `permute`."""
    source = node.args[0]
    order = list(range(_val(source).ndim))
    if len(order) < 2:
        return None
    if node.target is aten.numpy_T.default:
        return build.equal(aten.permute.default, source, order[::-1])
    a, b = node.args[1:3] if len(node.args) == 3 else (-2, -1)
    order[a], order[b] = order[b], order[a]  # type: ignore[index]
    return build.equal(aten.permute.default, source, order)


@spelling(aten.searchsorted)
def bucketize_from_searchsorted(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`searchsorted(edges, x)` of one list of edges is `bucketize(x, edges)`."""
    if node.target is not aten.searchsorted.Tensor or _val(given["sorted_sequence"]).ndim != 1:
        return None
    if given["sorter"] is not None or given["side"] not in (None, "left", "right"):
        return None
    how = {"out_int32": given["out_int32"], "right": given["right"] or given["side"] == "right"}
    return build.call(aten.bucketize.Tensor, given["self"], given["sorted_sequence"], **how)


@spelling(aten.movedim, aten.moveaxis)
def permute_from_movedim(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`movedim(x, a, b)` is `permute`."""
    source = given["self"]
    rank = _val(source).ndim
    moved = [x if isinstance(x, (list, tuple)) else [x] for x in (given["source"], given["destination"])]
    old, new = ([dim % rank for dim in dims] for dims in moved)
    order = [dim for dim in range(rank) if dim not in old]
    for place, dim in sorted(zip(new, old, strict=True)):
        order.insert(place, dim)
    return build.equal(aten.permute.default, source, order)


@spelling(aten.squeeze)
def drop_unsqueeze_squeeze(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`squeeze(unsqueeze(x, d), d)` is `x`."""
    source, dims = given["self"], given.get("dim")
    if source.target is not aten.unsqueeze.default or dims not in (_dim(source), [_dim(source)]):
        return None
    return source.args[0]  # type: ignore[no-any-return]


@spelling(aten.unsqueeze)
def drop_squeeze_unsqueeze(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`unsqueeze(squeeze(x, d), d)` is `x` if dimension d of `x` is 1."""
    source, dim = given["self"], given["dim"]
    if source.target is not aten.squeeze.dim or _dim(source) != dim:
        return None
    before = source.args[0]
    return before if same(_val(before).shape, node.meta["val"].shape) else None


@spelling(aten.view, aten.flatten, aten.view_as, aten.reshape_as, aten.unflatten)
def reshape_from_view(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`view`, `flatten` and `unflatten` are `reshape`.

    Not the other way round: fake tensors do not always know whether `reshape` copies. On a CPU, eager's
    `batch_norm` of a permuted tensor is laid out otherwise than its fake tensor, and a `view` of it fails.
    """
    source, shape = node.args[0], list(node.meta["val"].shape)
    if node.target is aten.view.default:
        return build.equal(aten.reshape.default, source, given["size"])
    if node.target is aten.view.dtype:
        return None
    unknown = [i for i, size in enumerate(shape) if not isinstance(size, int)]
    if len(unknown) == 1 and 0 not in shape:
        shape[unknown[0]] = -1
    return build.equal(aten.reshape.default, source, shape)


@spelling(aten.index_select)
def embedding_from_index_select(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`index_select(table, 0, ids)` is `embedding(table, ids)`, for a table that is an input."""
    table, ids = given["self"], given["index"]
    is_table = table.op == "placeholder" and _val(table).ndim == 2 and _val(table).dtype.is_floating_point
    if not is_table or given["dim"] != 0 or _val(ids).ndim != 1:
        return None
    return build.equal(aten.embedding.default, table, ids)


@spelling(aten.reshape)
def embedding_before_reshape(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`reshape(embedding(table, flatten(ids)), shape)` is `reshape(embedding(table, ids), shape)`."""
    lookup = given["self"]
    if lookup.target is not aten.embedding.default or len(lookup.users) != 1:
        return None
    flat = lookup.args[1]
    if flat.target is not aten.reshape.default or _val(flat).ndim != 1:
        return None
    ids = flat.args[0]
    if _val(ids).ndim < 2 or not same(_val(ids).shape[:1], node.meta["val"].shape[:1]):
        return None
    if any(build.effects.between(x, node) is not None for x in (flat, lookup)):
        return None
    rows = build.call(aten.embedding.default, lookup.args[0], ids, *lookup.args[2:], **lookup.kwargs)
    return build.equal(aten.reshape.default, rows, given["shape"])


@spelling(aten.expand_as, aten.broadcast_to)
def expand_from_expand_as(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`expand_as` and `broadcast_to` are `expand`."""
    return build.equal(aten.expand.default, node.args[0], list(node.meta["val"].shape))


@spelling(aten.square, aten.mul)
def pow_from_square(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`square(x)` and `x * x` are `pow(x, 2)`; so are their gradients, since doubling is exact."""
    x = given["self"]
    if given.get("other", x) is not x or not node.meta["val"].dtype.is_floating_point:
        return None
    return build.equal(aten.pow.Tensor_Scalar, x, 2)


@spelling(aten.einsum)
def bmm_from_einsum(node: fx.Node, given: dict[str, Any], build: Builder) -> fx.Node | None:
    """`einsum("bl,bld->bd", m, x)` is `squeeze(bmm(unsqueeze(m, 1), x), 1)`: as `einsum` itself does it.

    For two operands with one batch letter in front, one contracted letter, and at most one more letter each.
    """
    inputs, arrow, out = given["equation"].replace(" ", "").partition("->")
    letters, operands = inputs.split(","), given["tensors"]
    if not arrow or "." in inputs or len(letters) != 2 or given["path"] is not None:
        return None
    (a, b), (x, y) = letters, operands
    batch, summed = a[:1], (set(a) & set(b)) - set(out)
    free = [[c for c in term if c != batch and c not in summed] for term in letters]
    clear = b[:1] == batch and len(summed) == 1 and out == "".join([batch, *free[0], *free[1]])
    if not clear or any(len(f) > 1 or len(term) != len(f) + 2 for f, term in zip(free, letters, strict=True)):
        return None
    (k,) = summed
    if not all(same(_val(x).shape[a.index(c)], _val(y).shape[b.index(c)]) for c in (batch, k)):
        return None
    new = build.call(aten.bmm.default, _matrix(x, a, k, -1, build), _matrix(y, b, k, 1, build))
    for dim in (2, 1):
        new = new if free[dim - 1] else build.call(aten.squeeze.dim, new, dim)
    return new


def _matrix(x: fx.Node, term: str, summed: str, place: int, build: Builder) -> fx.Node:
    """`x` as [batch, rows, columns] with the summed letter last (place -1) or second (place 1)."""
    if len(term) == 2:
        return build.call(aten.unsqueeze.default, x, 1 if place == -1 else 2)
    swap = term.index(summed) != place % 3
    return build.call(aten.permute.default, x, [0, 2, 1]) if swap else x


def _lays_out(node: fx.Node, given: dict[str, Any]) -> bool:
    """Whether the call asks for a memory format."""
    return node.target is aten.contiguous.default or given.get("memory_format") not in (
        None,
        torch.preserve_format,
    )


_CONTIGUOUS = {aten.embedding, aten.linear, aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.contiguous}


def _layout_is_known(node: fx.Node) -> bool:
    """Whether eager surely lays out `node` as its fake tensor says: see `reshape_from_view`."""
    todo, seen = [node], {node}
    while todo:
        node = todo.pop()
        target = node.target
        if node.op != "call_function" or getattr(target, "overloadpacket", None) in _CONTIGUOUS:
            continue
        if not isinstance(target, OpOverload) or not (torch.Tag.pointwise in target.tags or _is_view(target)):
            return False
        todo += [n for n in node.all_input_nodes if n not in seen]
        seen.update(node.all_input_nodes)
    return True


def _is_view(op: OpOverload) -> bool:
    return any(result.alias_info is not None for result in op._schema.returns) or op is aten.cat.default


def _int(size: Any) -> Any:
    """A size as a number, or None if it is not known."""
    return size if type(size) is int else constant(size)


def _val(node: Any) -> Tensor:
    return node.meta["val"]  # type: ignore[no-any-return]


def _dim(node: fx.Node) -> int:
    """The argument `dim` of a node, from the front."""
    dim: int = arguments(node)["dim"]
    return dim
