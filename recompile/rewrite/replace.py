"""Put one node in the place of another without changing what anybody sees."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from recompile.errors import RecompileError
from recompile.graph.walls import is_wall
from recompile.rewrite.base import Refuse
from recompile.rewrite.build import Builder
from recompile.rewrite.effects import storages
from recompile.rewrite.schema import differ, op_name, same


def replace(old: tuple[fx.Node, ...], new: Any, builder: Builder) -> None:
    """Give the users of the nodes `old` the nodes `new` instead.

    One old node that gives several tensors may be replaced by a tuple of nodes, one for each.

    Raises:
        RecompileError: a new node has another dtype, device or shape: a mistake in the rule.
        Refuse: it would change what shares memory with what, and that could be seen.
    """
    pairs = list(_pairs(old, new))
    for was, now in pairs:
        if not isinstance(now, fx.Node):
            raise RecompileError(f"{builder.rule} gives no node for {was.name}", got=repr(now))
    now_of = {was: _like(was, now, builder) for was, now in pairs}
    for was, now in now_of.items():
        if why := builder.effects.why_not_alias(was, now, builder.made):
            raise Refuse(why, was)
    for was, now in now_of.items():
        _hand_over(was, now, builder)


def _pairs(old: tuple[fx.Node, ...], new: Any) -> list[tuple[fx.Node, Any]]:
    news = new if isinstance(new, tuple) else (new,)
    if len(old) == len(news):
        return list(zip(old, news, strict=True))
    if len(old) == 1 and all(user.target is operator.getitem for user in old[0].users):
        return [(user, news[user.args[1]]) for user in old[0].users]  # type: ignore[index]
    raise RecompileError(f"{len(news)} nodes cannot replace {len(old)} of {', '.join(n.name for n in old)}")


def _like(old: fx.Node, new: fx.Node, builder: Builder) -> fx.Node:
    """`new`, made contiguous if `old` was: later views rely on that."""
    was, now = old.meta.get("val"), new.meta.get("val")
    if not (isinstance(was, torch.Tensor) and isinstance(now, torch.Tensor)):
        return new
    shapes_differ = was.ndim != now.ndim or any(map(differ, was.shape, now.shape))
    if shapes_differ or (was.dtype, was.device) != (now.dtype, now.device):
        raise RecompileError(
            f"{builder.rule} changes what {old.name} is",
            expected=f"{was.dtype} {list(was.shape)} on {was.device}",
            got=f"{now.dtype} {list(now.shape)} on {now.device} from {op_name(new.target)}",
        )
    if same_strides(was, now):
        return new
    if not was.is_contiguous():
        raise Refuse(
            f"{old.name} has strides {list(was.stride())}, its replacement {list(now.stride())}", old
        )
    return builder.call(torch.ops.aten.contiguous.default, new)


def same_strides(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether both lie in memory alike; the stride of a dimension of size 1 does not matter."""
    sizes = zip(a.shape, a.stride(), b.stride(), strict=True)
    return all(same(size, 1) or same(x, y) for size, x, y in sizes)


def _hand_over(old: fx.Node, new: fx.Node, builder: Builder) -> None:
    memory = set(storages(old))
    old.meta["recompile_replaced_by"] = builder.rule  # for a dump, which hears of the next line
    old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in builder.made)
    if memory != set(storages(new)):
        _refresh_views(new, memory, builder)


def _refresh_views(node: fx.Node, memory: set[int], builder: Builder) -> None:
    """The users that are views of what `node` replaced are now views of `node`."""
    for user in node.users:
        if user.op == "call_function" and not is_wall(user) and memory & set(storages(user)):
            builder.refresh(user)
            _refresh_views(user, memory, builder)
