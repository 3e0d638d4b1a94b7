"""Region ops and the code generators for them."""

from typing import Any

from torch import fx

from recompile.lowering.attention import Attention
from recompile.lowering.lookup import Lookup


def describe(node: fx.Node) -> str:
    """One line about a region: `26 bags over 26 tables -> concat, sum`."""
    return _attention(node) if "attention" in str(node.target) else _lookup(node)


def _lookup(node: fx.Node) -> str:
    spec = Lookup.parse(str(node.args[2]))
    outputs = ", ".join(out.kind for out in spec.outputs)
    return f"{len(spec.bags)} bags over {len(spec.tables)} tables -> {outputs}"


def _attention(node: fx.Node) -> str:
    spec = Attention.parse(str(node.args[4]))
    loaded = [f"{name} {_shape(x)}" for name, x in zip(spec.extras, node.args[3], strict=True)]  # type: ignore[arg-type]
    q, k, v = (_shape(x) for x in node.args[:3])
    lines = [
        f"{'softmax' if spec.softmax else 'pointwise'} attention, q {q}, k {k}, v {v}",
        f"score = {spec.kept or spec.score}",
        f"where {spec.keep}, else skipped" if spec.keep != "true" else "",
        f"weights times {spec.weight}" if spec.weight else "",
        f"with {', '.join(loaded)}" if loaded else "",
    ]
    return "; ".join(line for line in lines if line)


def _shape(node: Any) -> str:
    return str(list(node.meta["val"].shape))


__all__ = ["describe"]
