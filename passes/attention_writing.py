"""Writes the region op in the place of an attention that was read (`attention_reading.py`)."""

from __future__ import annotations

import math
import operator
from typing import Any

import sympy
import torch
from torch import fx

from recompile.graph.order import erase
from recompile.lowering import scalar
from recompile.lowering.attention import Attention
from recompile.lowering.attention.op import op_for
from recompile.lowering.score import is_table, table, tables_in
from recompile.rewrite import Builder, Refuse, replace, same
from recompile.torch_private.symbols import SYM

from .attention_ends import delivered
from .attention_reading import Reading
from .axes import Axes, arrange, layout, shape
from .computed import learns
from .library_attention import LIBRARY, by_library
from .looked_up import padding, without_padding
from .score_masks import masks

aten = torch.ops.aten


def write(of: Reading, rule: str) -> None:
    """Replaces what `of` covers, for the rule of this name.

    Raises:
        Refuse: it cannot be written.
    """
    target, axes = delivered(of.root, of.second.axes[2])
    if any(of.walls(target)):
        target, axes = of.root, of.second.axes[2]
    build = Builder(of.effects, target, rule, target)
    try:
        replace((target,), _Writing(of, build).result(target, axes), build)
    finally:
        build.discard()
    erase(target)
    for node in sorted(of.region.covered, reverse=True):
        erase(node)
        if node.target is aten.dropout.default and not node.users:
            node.graph.erase_node(node)  # `erase` leaves what draws numbers


class _Writing:
    """The nodes of one attention, made by `build`."""

    def __init__(self, of: Reading, build: Builder) -> None:
        self.of, self.build = of, build
        self.batch, self.sizes = of.second.batch, of.second.sizes
        self.value = of.root.meta["val"]

    def result(self, target: fx.Node, axes: Axes) -> fx.Node:
        """What stands in the place of `target`, whose dims are `axes`."""
        lies = layout(target.meta["val"]) or tuple(range(len(axes)))
        axes = tuple(axes[k] for k in lies)
        spec, loads = self._spec(axes)
        out = self._computed(spec, loads)
        if spec.order:
            out = self.build.call(aten.permute.default, out, list(spec.order))
        if not same(shape(out), [shape(target)[k] for k in lies]):
            out = self.build.call(aten.reshape.default, out, self._shape(axes))
        if lies != tuple(sorted(lies)):
            out = self.build.call(aten.permute.default, out, [lies.index(k) for k in range(len(lies))])
        return out

    def _computed(self, spec: Attention, loads: dict[str, tuple[fx.Node, Axes]]) -> fx.Node:
        """The op, or the library's, and what is done to each row of its result."""
        device = self.value.device.type
        op = op_for(device)
        if op is None:
            raise Refuse(f"there is no kernel for {device}", self.of.root)
        wanted = ([*self.batch, "i", "d"], [*self.batch, "j", "d"], [*self.batch, "j", "e"])
        operands = zip((self.of.q, self.of.k, self.of.v), wanted, strict=True)
        given = [self._laid_out(*operand, atoms) for operand, atoms in operands]
        if self.of.loaded:
            sizes = [self.sizes[x] if x in self.of.loaded else -1 for x in wanted[0]]
            given[0] = self.build.call(aten.expand.default, given[0], sizes)
        if self.of.sums is not None:
            given[2] = self.of.sums.with_ones(given[2], self.build)
        extras = [self._extra(name, *place) for name, place in loads.items()]
        how = by_library(spec, device, len(self.batch) + 2)
        if how is not None:
            out = self.build.call(LIBRARY, *given, None, 0.0, **how)
        else:
            out = self.build.call(operator.getitem, self.build.call(op, *given, extras, str(spec)), 0)
        out = self._divided(out)
        return out if self.of.sums is None else self.of.sums.divide(out, self.build)

    def _shape(self, axes: Axes) -> list[Any]:
        """The sizes of these axes, -1 for one that is merged of several unknown ones."""
        sizes = [[self.sizes[atom] for atom in axis] for axis in axes]
        known = [math.prod(s) if len(s) < 2 or all(type(x) is int for x in s) else None for s in sizes]
        if known.count(None) > 1:
            raise Refuse("several dims of unknown size are merged in the result", self.of.root)
        return [-1 if size is None else size for size in known]

    def _divided(self, out: fx.Node) -> fx.Node:
        dtype = out.meta["val"].dtype
        for node, axes in self.of.divisors:
            by = self._loaded(node, axes, [*self.batch, "i", "1"], self.sizes)
            out = self.build.call(aten.div.Tensor, out, by)
        return out if out.meta["val"].dtype is dtype else self.build.call(aten.to.dtype, out, dtype)

    def _laid_out(self, node: fx.Node, axes: Axes, atoms: list[str]) -> fx.Node:
        if node.meta["val"].dtype is not self.value.dtype:
            node = self.build.call(aten.to.dtype, node, self.value.dtype)
        return arrange(node, axes, atoms, self.sizes, self.build)

    def _extra(self, name: str, node: fx.Node, axes: Axes) -> fx.Node:
        if name[0] != "T":
            return self._loaded(node, axes, [*self.batch, *"ij"], self.sizes)
        node = node if padding(node) is None else without_padding(node, self.build)
        sizes = {**self.sizes, "t": shape(node)[axes.index(("t",))]}
        return self._loaded(node, axes, [*self.batch, "t"], sizes)

    def _loaded(self, node: fx.Node, axes: Axes, atoms: list[str], sizes: dict[str, Any]) -> fx.Node:
        value, device = node.meta["val"], self.value.device
        if node.target is aten.dropout.default:
            seeds = [sizes[atom] if (atom,) in axes else 1 for atom in atoms]
            return self.build.call(aten.randint.low, 0, 2**31, seeds, device=device)
        if isinstance(value, SYM):
            # A product: Inductor makes a tensor of a float in it, and a new graph for each float elsewhere.
            dtype = torch.float32 if isinstance(value, torch.SymFloat) else torch.int64
            one = self.build.call(aten.full.default, [1] * len(atoms), 1, dtype=dtype, device=device)
            return self.build.call(aten.mul.Tensor, one, node)
        return arrange(node, axes, atoms, sizes, self.build)

    def _spec(self, axes: Axes) -> tuple[Attention, dict[str, tuple[fx.Node, Axes]]]:
        """The spec of a result with these axes, and the loads that it reads, by their names there."""
        score, atoms = self.of.score, [*self.batch, "i", "e"]
        masked = masks(score, self.of.softmax, self._constants())
        exprs = [score, masked.kept, masked.keep, self.of.weight]
        used = {s.name for e in exprs for s in e.free_symbols}
        used |= {type(t).__name__ for e in exprs for t in tables_in(e)}
        loads = {name: place for name, place in self.of.region.loads.items() if name in used}
        names = {old: f"{old[0]}{k}" for k, old in enumerate(loads)}
        value, kept, keep, weight = (_renamed(e, names) for e in exprs)
        flat = [atom for axis in axes for atom in axis]
        flat += [atom for atom in atoms if atom not in flat]  # of size 1
        order = tuple(atoms.index(atom) for atom in flat)
        spec = Attention(
            score=scalar.text(value),
            softmax=self.of.softmax,
            extras=tuple(names.values()),
            keep=scalar.text(keep),
            kept="" if kept == value else scalar.text(kept),
            negligible=masked.negligible,
            safe=self.of.safe,
            weight="" if weight == 1 else scalar.text(weight),
            order=() if order == tuple(range(len(atoms))) else order,
        )
        learned = set().union(*map(_differentiable, exprs))
        return spec, {
            names[old]: (node if old in learned else self._without_gradient(old, node), axes)
            for old, (node, axes) in loads.items()
        }

    def _without_gradient(self, name: str, node: fx.Node) -> fx.Node:
        """What is only compared: a kernel would make zeros of a gradient that eager does not have."""
        real = name[0] == "x" and learns(node)
        return self.build.call(aten.detach.default, node) if real else node

    def _constants(self) -> set[str]:
        """The loads that may turn out to be masks: they have a value for each key, and learn nothing from it."""
        loads = self.of.region.loads.items()
        return {
            name for name, (node, axes) in loads if name[0] == "x" and ("j",) in axes and not learns(node)
        }


def _differentiable(expr: sympy.Basic) -> set[str]:
    """The names of the loads that a derivative of `expr` exists by: those not just compared, or cut to integers."""
    if scalar.is_truth(expr) or isinstance(expr, scalar.trunc):
        return set()
    if isinstance(expr, sympy.Symbol):
        return {expr.name}
    own = {type(expr).__name__} if is_table(expr) else set()
    return own.union(*map(_differentiable, () if is_table(expr) else expr.args))


def _renamed(expr: sympy.Basic, names: dict[str, str]) -> sympy.Basic:
    symbols = {scalar.symbol(old): scalar.symbol(new) for old, new in names.items()}
    expr = expr.xreplace(symbols)
    return expr.replace(is_table, lambda t: table(names[type(t).__name__])(*t.args))
