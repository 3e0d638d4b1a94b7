"""What the report says about a region: its sentence, the user's lines, and its cost beside what it replaced."""

from __future__ import annotations

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .cost import Cost, cost
from .ledger import Ledger
from .lowering import describe
from .report import CostRecord, RegionRecord, user_line
from .torch_private.symbols import example


def region_record(node: fx.Node, ledger: Ledger) -> RegionRecord:
    """The record of a region operator's node."""
    lines = sorted({user_line(n) for n in (node, *node.users) if user_line(n)})
    tables = len(node.args[0]) if isinstance(node.args[0], (list, tuple)) else 0
    replaced, own = ledger.before(node), cost(node)
    if not own.flops and _is_users(node):  # what a user's kernel computes is not known: as much as before
        own = Cost(own.bytes, replaced.flops)
    before, after = _cost(replaced, node), _cost(own, node)
    spec = node.args[-1] if isinstance(node.args[-1], str) else ""
    return RegionRecord(node.name, str(node.target), tables, describe(node), lines, spec, before, after)


def _is_users(node: fx.Node) -> bool:
    name = str(node.target).removeprefix("recompile.")
    return not name.startswith(("lookup", "attention"))


def _cost(found: Cost, node: fx.Node) -> CostRecord:
    like = next(leaf for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor))
    examples = [example(amount, like) for amount in found]
    return CostRecord(str(found.bytes), str(found.flops), examples[0], examples[1])
