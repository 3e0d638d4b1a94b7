"""The `recompile::lookup` region op: a group of table lookups."""

from recompile.lowering.lookup import inductor, op
from recompile.lowering.lookup.spec import Bag, Lookup, Output, Table

__all__ = ["Bag", "Lookup", "Output", "Table", "inductor", "op"]
