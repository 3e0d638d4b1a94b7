"""What is read from a table, and where: `table[:, index]`, `index_select(table, 1, index)`, an embedding."""

from __future__ import annotations

import torch
from torch import fx

from recompile.rewrite import Builder, arguments

from .axes import shape

aten = torch.ops.aten
LOOKUPS = (aten.index, aten.index_select, aten.embedding)


def looked_up(node: fx.Node) -> tuple[fx.Node, int, fx.Node] | None:
    """(table, dim, index) of an operator of `LOOKUPS`, with a dim for each of the index' in that dim's place.

    None if there are several indices, or if the gradient is none of a table's rows.
    """
    given = arguments(node)
    if node.target is aten.embedding.default:
        plain = not (given["sparse"] or given["scale_grad_by_freq"])
        return (given["weight"], 0, given["indices"]) if plain else None
    if node.target is aten.index_select.default:
        table, index = given["self"], given["index"]
        return (table, given["dim"], index) if shape(table) and len(shape(index)) == 1 else None
    places = [dim for dim, index in enumerate(given["indices"]) if index is not None]
    return (given["self"], places[0], given["indices"][places[0]]) if len(places) == 1 else None


def padding(node: fx.Node) -> int | None:
    """The row of an embedding that takes no gradient, if there is one."""
    if node.target is not aten.embedding.default:
        return None
    row: int = arguments(node)["padding_idx"]
    return row if row >= 0 else None


def without_padding(node: fx.Node, build: Builder) -> fx.Node:
    """The table of an embedding, so that its row of padding takes no gradient."""
    weight, row = arguments(node)["weight"], padding(node)
    held = build.call(aten.detach.default, build.call(aten.select.int, weight, 0, row))
    return build.call(aten.select_scatter.default, weight, held, 0, row)
