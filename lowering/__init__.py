"""Region ops and the code generators for them."""

from torch import fx

from recompile.lowering.lookup import Lookup


def describe(node: fx.Node) -> str:
    """One line about a region: `26 bags over 26 tables -> concat, sum`."""
    spec = Lookup.parse(str(node.args[2]))
    outputs = ", ".join(out.kind for out in spec.outputs)
    return f"{len(spec.bags)} bags over {len(spec.tables)} tables -> {outputs}"


__all__ = ["describe"]
