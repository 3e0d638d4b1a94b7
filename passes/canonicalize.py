"""Makes spellings meet, without changing a bit of any value.

    stack([a, b], 1)        ->  cat([unsqueeze(a, 1), unsqueeze(b, 1)], 1)
    dropout(x, p, False)    ->  x
    unbind(x, 1)[i]         ->  select(x, 1, i)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from recompile.graph.walls import is_wall
from recompile.rewrite import Context, Pass, register

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class Canonicalize(Pass):
    """Rewrites to one spelling (see the module)."""

    numerics = "exact"
    before = ("fuse-lookups", "pool-sequences")

    def run(self, graph: fx.Graph, ctx: Context) -> None:
        rules = (stack_to_cat, unbind_to_select, drop_dropout)
        for node in list(graph.nodes):
            for rule in rules:
                name = rule.__name__.replace("_", "-")
                ctx.rule(name)
                new = None if node._erased else rule(node)
                if new is not None:
                    ctx.tried(name)
                    ctx.fired(name)
                    node.replace_all_uses_with(new)
                    graph.erase_node(node)


def emit(before: fx.Node, target: object, *args: object) -> fx.Node:
    """A new node before another one, with its value's metadata and the other's place in the user's code."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(target, args)  # type: ignore[arg-type]
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    with before.meta["val"].fake_mode:
        node.meta["val"] = target(*values)  # type: ignore[operator]
    node.meta["stack_trace"] = before.meta.get("stack_trace")
    return node


def stack_to_cat(node: fx.Node) -> fx.Node | None:
    """`stack` is `cat` of unsqueezed inputs."""
    if node.target is not aten.stack.default:
        return None
    dim = node.args[1] if len(node.args) > 1 else 0
    dim = dim % node.meta["val"].dim()  # type: ignore[operator]
    return emit(node, aten.cat.default, [emit(node, aten.unsqueeze.default, x, dim) for x in node.args[0]], dim)  # type: ignore[union-attr]


def unbind_to_select(node: fx.Node) -> fx.Node | None:
    """One element of `unbind` is `select`: both are views of the same tensor."""
    if node.target is not operator.getitem or not isinstance(node.args[0], fx.Node):
        return None
    source, index = node.args
    if source.target is not aten.unbind.int or any(is_wall(u) for u in node.users):  # type: ignore[union-attr]
        return None
    dim = source.args[1] if len(source.args) > 1 else 0  # type: ignore[union-attr]
    return emit(node, aten.select.int, source.args[0], dim, index)  # type: ignore[union-attr]


def drop_dropout(node: fx.Node) -> fx.Node | None:
    """Dropout outside training is its input; kept where that would make an output of an input, or share a written value."""
    if node.target is not aten.dropout.default or node.args[2] is not False:
        return None
    source = node.args[0]
    fixed = any(u.op == "output" or is_wall(u) for u in [*node.users, *source.users])  # type: ignore[union-attr]
    return None if fixed else source  # type: ignore[return-value]
