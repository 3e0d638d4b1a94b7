"""What the report says about a region: its sentence, the user's lines, its tensors, and what it costs."""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.utils._pytree import tree_leaves

from .cost import Cost, cost
from .ledger import Ledger
from .lowering import describe
from .node_entry import value_of, value_text
from .report import CostRecord, RegionRecord, user_line
from .torch_private.symbols import example

# Operations a CPU makes in float32 while it moves one byte: from one slow core to a server's whole socket.
BALANCES = 4, 40
# What moves and computes less takes under 5 us at 10 GB/s and 100 GFLOP/s: less than starting it, on several threads.
LAUNCH = Cost(50_000, 500_000)


def region_record(node: fx.Node, ledger: Ledger) -> RegionRecord:
    """The record of a region operator's node."""
    replaced, own = ledger.before(node), cost(node)
    if not own.flops and _is_users(node):  # what a user's kernel computes is not known: as much as before
        own = Cost(own.bytes, replaced.flops)
    before, after = _cost(replaced, node), _cost(own, node)
    device = _tensor(node).device.type
    return RegionRecord(
        name=node.name,
        op=str(node.target),
        tables=len(node.args[0]) if isinstance(node.args[0], (list, tuple)) else 0,
        summary=describe(node),
        lines=sorted({user_line(n) for n in (node, *node.users) if user_line(n)}),
        spec=node.args[-1] if isinstance(node.args[-1], str) else "",
        device=device,
        reads={n.name: value_text(value_of(n)) for n in node.all_input_nodes},
        writes=_writes(node),
        before=before,
        after=after,
        bound=bound(Cost(after.example_bytes, after.example_flops)) if device == "cpu" else "",
    )


def bound(amount: Cost) -> str:
    """What limits a kernel of this cost on CPUs: "launch", "memory", "compute", or "" where it depends on the CPU."""
    if amount.bytes < LAUNCH.bytes and amount.flops < LAUNCH.flops:
        return "launch"
    low, high = (balance * amount.bytes for balance in BALANCES)
    if amount.flops < low:
        return "memory"
    return "compute" if amount.flops > high else ""


def _writes(node: fx.Node) -> list[str]:
    """The results that the graph reads."""
    value = value_of(node)
    if isinstance(value, torch.Tensor):
        return [value_text(value)]
    read = {user.args[1] for user in node.users if user.target is operator.getitem}
    return [value_text(part) for k, part in enumerate(value) if k in read]


def _is_users(node: fx.Node) -> bool:
    name = str(node.target).removeprefix("recompile.")
    return not name.startswith(("lookup", "attention"))


def _cost(found: Cost, node: fx.Node) -> CostRecord:
    examples = [example(amount, _tensor(node)) for amount in found]
    return CostRecord(str(found.bytes), str(found.flops), examples[0], examples[1])


def _tensor(node: fx.Node) -> torch.Tensor:
    """One of a region's results."""
    return next(leaf for leaf in tree_leaves(node.meta["val"]) if isinstance(leaf, torch.Tensor))
