"""What a tensor holds for sample b at position l: views, casts, comparisons and arithmetic followed back to loads.

    (torch.arange(L) < n[:, None]).unsqueeze(-1).float()     at axes (b, l, 1)     is     l < x1, with x1 = n
    1 - (ids == 0).float()                                   at axes (b, l)        is     Ne(x0, 0)

*Axes* name the dims of a tensor: "b0", "b1", ... count samples, "l" positions, "d" columns; "" is a dim of size 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch._ops import OpOverload

from recompile.lowering import scalar
from recompile.rewrite import Builder, Refuse, arguments, same

from .ids import CASTS, COMPARE, INTEGERS, LOGIC, id_step, ids_of, is_constant

aten = torch.ops.aten
Axes = tuple[str, ...]
_BROADCAST: tuple[Axes, ...] = (("b0",), ("b0", ""), ("", "l"), ("", ""))  # what a kernel reads as [B, L]
_VIEWS = (
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.reshape.default,
    aten.permute.default,
)
_LOGIC = LOGIC | {aten.mul: sympy.And}  # multiplication joins truths as `and` does


def before_view(node: fx.Node, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """The tensor that `node` is a view or repetition of, and its axes; None if it is no view."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, fx.Node) or not isinstance(node.target, OpOverload):
        return None
    given, old, new = arguments(node), _shape(source), _shape(node)
    if node.target is aten.unsqueeze.default:
        return source, axes[: given["dim"]] + axes[given["dim"] + 1 :]
    if node.target is aten.permute.default:
        return source, tuple(axes[given["dims"].index(k)] for k in range(len(old)))
    packet = node.target.overloadpacket
    if packet in (aten.expand, aten.repeat) or node.target is aten.repeat_interleave.self_int:
        return None if given.get("dim", 0) is None else _before_repeat(source, old, new, axes)
    if packet in (aten.reshape, aten.squeeze):
        return _before_reshape(source, old, new, axes)
    return None


def after_view(node: fx.Node, axes: Axes) -> Axes | None:
    """The axes of `node`, a view of what has `axes` that permutes dims or adds and drops some of size 1."""
    if node.target not in _VIEWS:
        return None
    names = tuple(str(k) for k in range(len(_shape(node))))
    view = before_view(node, names)
    if view is None:
        return None
    at = dict(zip(view[1], axes, strict=True))  # a dim of `node` -> its axis
    return tuple(at.get(name, "") for name in names)


def _before_repeat(source: fx.Node, old: Any, new: Any, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Where dims of size 1 are repeated, and new ones stand in front."""
    pairs = list(zip(old, new[len(new) - len(old) :], axes[len(new) - len(old) :], strict=True))
    if not all(same(a, b) or same(a, 1) for a, b, _ in pairs):
        return None
    return source, tuple(axis if same(a, b) else "" for a, b, axis in pairs)


def _before_reshape(source: fx.Node, old: Any, new: Any, axes: Axes) -> tuple[fx.Node, Axes] | None:
    """Where only dims of size 1 come or go."""
    wide = [(size, axis) for size, axis in zip(new, axes, strict=True) if not same(size, 1)]
    if not same([size for size in old if not same(size, 1)], [size for size, _ in wide]):
        return None
    left = iter(wide)
    return source, tuple("" if same(size, 1) else next(left)[1] for size in old)


class Reader:
    """Reads elements off the graph.

    Args:
        builder: makes the views of what is loaded.
        samples: the axes that count samples; where they are several, what is loaded is reshaped to one.
        sizes: of `samples`, and of "l".
    """

    def __init__(self, builder: Builder, samples: Axes, sizes: Sequence[Any]) -> None:
        self.builder, self.samples = builder, samples
        self.wanted, self.sizes = (*samples, "l"), list(sizes)
        self._loads: dict[tuple[fx.Node, Axes], sympy.Symbol] = {}
        self._known: dict[tuple[fx.Node, Axes], sympy.Basic] = {}

    def element(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        """The element of `node`: a truth for booleans, and for numbers that are 1 and 0 for true and false.

        Raises:
            Refuse: it is another for each column, or written in place.
        """
        if (node, axes) not in self._known:
            self._known[node, axes] = self._read(node, axes)
        return self._known[node, axes]

    def _read(self, node: fx.Node, axes: Axes) -> sympy.Basic:
        if self.builder.effects.is_written(node):
            raise Refuse(f"{node.name}, which the lookup reads, is written in place", node)
        found = self._computed(node, axes)
        if found is not None and not scalar.is_long(found):
            return found
        view = before_view(node, axes)
        if view is not None:
            return self.element(*view)
        loaded = self._load(node, axes)
        return sympy.Ne(loaded, 0) if _val(node).dtype is torch.bool else loaded

    def _computed(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        """`node` as an expression of the elements that it is computed from; None if it can only be loaded."""
        if node.op != "call_function" or not isinstance(node.target, OpOverload):
            return None
        packet = node.target.overloadpacket
        if packet is aten.arange:
            return _counted(node) if axes == ("l",) and not same(_shape(node)[0], 1) else None
        if packet in COMPARE:
            return self._compared(node, axes)
        if packet is aten.bitwise_not and _val(node).dtype is not torch.bool:
            return None  # ~1 is -2
        if packet in _LOGIC:
            return self._joined(_LOGIC[packet], node, node.args, axes)
        if (operand := _one_minus(node)) is not None:
            return self._joined(sympy.Not, node, [operand], axes)
        if node.target in CASTS:
            found = self.element(node.args[0], axes)  # type: ignore[arg-type]
            numbers = not (scalar.is_truth(found) or _val(node.args[0]).is_complex())
            if _val(node).dtype is torch.bool and numbers:
                return sympy.Ne(found, 0)
            if scalar.is_truth(found) or _keeps_numbers(_val(node.args[0]).dtype, _val(node).dtype):
                return found
        step = id_step(node)
        if step is None:
            return None
        if len(step[0]) == 1:
            return step[1](self.element(step[0][0], axes))
        source, found = ids_of(
            node
        )  # a choice, by a condition on what it chooses from: a load of its own size
        loaded = None if source is node else self.element(source, axes)
        return (
            found.xreplace({scalar.symbol("x0"): loaded}) if loaded is not None and loaded.is_Symbol else None
        )

    def _joined(
        self, join: Callable[..., sympy.Basic], node: fx.Node, operands: Sequence[Any], axes: Axes
    ) -> sympy.Basic | None:
        if not all(isinstance(x, fx.Node) for x in operands):
            return None
        parts = [self.element(x, _aligned(x, axes)) for x in operands]
        return join(*parts) if all(map(scalar.is_truth, parts)) else None

    def _compared(self, node: fx.Node, axes: Axes) -> sympy.Basic | None:
        sides: list[Any] = []
        for x in node.args[:2]:
            if isinstance(x, fx.Node):
                sides.append(self.element(x, _aligned(x, axes)))
            elif type(x) is int:
                sides.append(sympy.Integer(x))
            elif type(x) is float and torch.tensor(x, dtype=torch.float32).item() == x:
                sides.append(sympy.Integer(int(x)) if x.is_integer() else sympy.Float(x))
            else:
                return None  # eager rounds this number, the kernel would not
        held = [_val(x).dtype for x in node.args[:2] if isinstance(x, fx.Node)]
        numbers = [x for x in node.args[:2] if type(x) is int]
        if not all(is_constant(x, dtype) for x in numbers for dtype in held if dtype in INTEGERS):
            return None  # eager wraps it around
        compare = COMPARE[node.target.overloadpacket]  # type: ignore[union-attr]
        if not any(map(scalar.is_truth, sides)):
            return compare(*sides)
        truth, number = sides
        if not number.is_number or (holds := compare(sympy.S.One, number)) == compare(sympy.S.Zero, number):
            return None
        return truth if holds == sympy.true else sympy.Not(truth)

    def loaded(self, node: fx.Node, axes: Axes) -> sympy.Symbol:
        """A load of `node`, whatever it is computed from.

        Raises:
            Refuse: it is another for each column.
        """
        view = before_view(node, axes)
        return self._load(node, axes) if view is None else self.loaded(*view)

    def _load(self, node: fx.Node, axes: Axes) -> sympy.Symbol:
        axes = tuple("" if same(size, 1) else axis for size, axis in zip(_shape(node), axes, strict=True))
        if "d" in axes:
            raise Refuse("the multiplier differs from column to column", node)
        return self._loads.setdefault((node, axes), scalar.symbol(f"load{len(self._loads)}"))

    def numbered(
        self, exprs: Sequence[sympy.Basic], full: sympy.Basic | None = None
    ) -> tuple[list[fx.Node], list[sympy.Basic]]:
        """What the expressions load, `[B, L]` with either size 1 allowed or `[B]`; and they, in x0, x1, ...

        The load `full` is expanded to `[B, L]`, so that its gradient has a place for each position.
        """
        of = {symbol: place for place, symbol in self._loads.items()}
        used = dict.fromkeys(s for e in exprs for s in sorted(e.free_symbols, key=str) if s in of)
        names = {symbol: scalar.symbol(f"x{k}") for k, symbol in enumerate(used)}
        loads = [self._laid_out(*of[s], full=s == full) for s in used]
        return loads, [e.subs(names, simultaneous=True) for e in exprs]

    def _laid_out(self, node: fx.Node, axes: Axes, full: bool) -> fx.Node:
        held = [axis for axis in self.wanted if axis in axes]
        if len(self.wanted) == 2 and axes in (("b0", "l"), *(() if full else _BROADCAST)):
            return node
        call = self.builder.call
        if [axis for axis in axes if axis] != held:
            node = call(
                aten.permute.default, node, sorted(range(len(axes)), key=lambda k: _rank(axes[k], held))
            )
        sizes = [size if axis in held else 1 for axis, size in zip(self.wanted, self.sizes, strict=True)]
        node = call(aten.reshape.default, node, sizes)
        if full or len(sizes) > 2:
            node = call(aten.expand.default, node, self.sizes)
        return node if len(sizes) == 2 else call(aten.reshape.default, node, [-1, self.sizes[-1]])


def _rank(axis: str, held: list[str]) -> int:
    return held.index(axis) if axis else len(held)


def _aligned(x: fx.Node, axes: Axes) -> Axes:
    """The axes of an operand that is broadcast to `axes`."""
    return axes[len(axes) - _val(x).dim() :]


def _counted(node: fx.Node) -> sympy.Basic | None:
    """`arange` at position l."""
    given = arguments(node)
    start, step = given.get("start", 0), given.get("step", 1)
    if type(start) is not int or type(step) is not int:
        return None
    return start + step * scalar.symbol("l")


def _one_minus(node: fx.Node) -> fx.Node | None:
    """m of `1 - m`."""
    if node.target is aten.rsub.Scalar and node.args[1] == 1 and len(node.args) == 2:
        return node.args[0]  # type: ignore[return-value]
    given = arguments(node) if node.target in (aten.sub.Tensor, aten.sub.Scalar) else {}
    one = given.get("self") == 1 and given.get("alpha") == 1 and isinstance(given["other"], fx.Node)
    return given["other"] if one else None


def _keeps_numbers(old: torch.dtype, new: torch.dtype) -> bool:
    """Whether a comparison of cast numbers is one of the numbers: ids and lengths are below 2**24."""
    if torch.bool in (old, new) or old.is_complex or new.is_complex:
        return False
    if new.is_floating_point:
        return new.itemsize >= 4 and (new.itemsize >= old.itemsize or not old.is_floating_point)
    if old.is_floating_point:
        return False
    before, after = torch.iinfo(old), torch.iinfo(new)
    return after.min <= before.min and before.max <= after.max


def _val(node: Any) -> torch.Tensor:
    return node.meta["val"]  # type: ignore[no-any-return]


def _shape(node: fx.Node) -> Any:
    return getattr(node.meta.get("val"), "shape", ())
