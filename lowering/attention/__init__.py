"""The `recompile::attention` region op: scores between two contractions, never held for all pairs."""

from recompile.lowering.attention import inductor, op
from recompile.lowering.attention.spec import Attention

__all__ = ["Attention", "inductor", "op"]
