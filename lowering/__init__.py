"""Region ops and the code generators for them."""

from typing import Any

import torch
from torch import fx

from recompile.lowering.attention import Attention
from recompile.lowering.attention import reference as attention_reference
from recompile.lowering.lookup import Lookup
from recompile.lowering.lookup import reference as lookup_reference
from recompile.lowering.lookup.cpp_common import Operand
from recompile.lowering.region import Region, region, regions
from recompile.lowering.region_cpp import fault
from recompile.wording import plural


def describe(node: fx.Node) -> str:
    """One line about a region: `26 lookups over 26 tables -> concat, sum`."""
    family = _family(str(node.target))
    own = {"lookup": _lookup, "attention": _attention}
    return own[family](node) if family in own else regions[family].describe(node)


def reference(operator: str, *args: Any) -> list[torch.Tensor]:
    """What a forward region operator computes, in plain PyTorch; of an attention the output alone.

    Args:
        operator: its name; on any device.
        args: the operator's.
    """
    *tensors, spec = args
    family = _family(operator)
    if family == "attention":
        q, k, v, extras = tensors
        return [attention_reference.forward(q, k, v, extras, Attention.parse(spec))[0]]
    if family == "lookup":
        weights, sources = tensors
        return lookup_reference.forward(weights, sources, Lookup.parse(spec))
    found = regions[family].reference(*tensors, **regions[family].parse(spec))
    return list(found) if isinstance(found, tuple) else [found]


def _family(operator: str) -> str:
    """The region that an operator, on any device, is of: `recompile.lookup_triton.default` is a lookup."""
    return operator.split(".")[1].removesuffix("_triton")


def _lookup(node: fx.Node) -> str:
    spec = Lookup.parse(str(node.args[2]))
    outputs = ", ".join(out.kind for out in spec.outputs)
    single = sum(bag.pooling == "none" for bag in spec.bags)
    counts = (single, "lookup"), (len(spec.bags) - single, "bag")
    found = " and ".join(plural(n, word) for n, word in counts if n)
    return f"{found} over {plural(len(spec.tables), 'table')} -> {outputs}"


def _attention(node: fx.Node) -> str:
    spec = Attention.parse(str(node.args[4]))
    loaded = [f"{name} {_shape(x)}" for name, x in zip(spec.extras, node.args[3], strict=True)]  # type: ignore[arg-type]
    q, k, v = (_shape(x) for x in node.args[:3])
    lines = [
        f"{'softmax' if spec.softmax else 'pointwise'} attention, q {q}, k {k}, v {v}",
        f"score = {spec.kept or spec.score}",
        f"where {spec.keep}, else skipped" if spec.keep != "true" else "",
        f"attention weights times {spec.weight}" if spec.weight else "",
        f"with {', '.join(loaded)}" if loaded else "",
    ]
    return "; ".join(line for line in lines if line)


def _shape(node: Any) -> str:
    return str(list(node.meta["val"].shape))


__all__ = ["Operand", "Region", "describe", "fault", "reference", "region", "regions"]
